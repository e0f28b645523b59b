"""Runs `medr1` commands in forks of one process that has imported everything: seconds less for each.

    python tests/fork_server.py SOCKET

A client sends one JSON line {"argv", "cwd", "stdout", "stderr"} (the last two name files) and reads the exit status.
"""

import json
import os
import socketserver
import sys
import traceback

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as `medr1` does, before anything imports transformers

import torch
import transformers.models.auto.modeling_auto  # noqa: F401

import medr1.cli
import medr1.study.demo
import medr1.study.run
from medr1.config import Config

DEMO = medr1.study.demo.demo_config


def small_demo(seed: int) -> Config:
    """The demo's recipe with two steps on few phantoms."""
    recipe = DEMO(seed)
    sections = {
        "data": {"num_phantoms": 640},
        "rollout": {"max_new_tokens": 8},
        "optimizer": {"steps": 2, "prompts_per_step": 2},
        "log": {"eval_records": 8},
    }
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    )


medr1.study.demo.demo_config = small_demo


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        child = os.fork()
        if child == 0:
            os._exit(run(request))
        _, status = os.waitpid(child, 0)
        self.wfile.write(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run(request: dict[str, str]) -> int:
    os.chdir(request["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["medr1", *request["argv"]]
    status: int | str | None = 0
    try:
        medr1.cli.main()
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    with socketserver.UnixStreamServer(sys.argv[1], Handler) as server:
        print("ready", flush=True)
        server.serve_forever()
