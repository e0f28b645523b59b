"""vLLM servers in threads of the test: the HTTP that `VLLMServer` speaks, answered by a model of transformers.

Weights are read from the folder that a server is told, so that what comes back is the policy's as it would be.
"""

import base64
import contextlib
import copy
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.rollouts import sample
from medr1.policy.vlm import VLM, restrict

HELD: list[socket.socket] = []


def own_port() -> int:
    """A port of this machine that nobody else is given, for a server that comes, goes and comes back.

    The socket that holds it does not listen; a server with SO_REUSEADDR, as vLLM is and Python's, can.
    """
    HELD.append(socket.socket())
    HELD[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    HELD[-1].bind(("127.0.0.1", 0))
    return int(HELD[-1].getsockname()[1])


class FakeVLLM:
    """One server, which can be killed and started again on the same port, then with its first weights.

    Args:
        vlm: what it serves when it starts.
    """

    def __init__(self, vlm: VLM) -> None:
        self.first = vlm
        self.fault: Callable[[int], int | None] = lambda number: None
        """Of each completion that is asked, by its number from 1: a status to answer with; None answers. It may also
        `kill` the server, after which nobody who waits is answered."""
        self.port = own_port()
        self.asked: list[dict[str, Any]] = []
        """Bodies of the completions that were asked, those of a proof of log-probs left out."""
        self.answered: list[dict[str, Any]] = []
        """Those of them that were answered."""
        self.posted: list[tuple[str, dict[str, Any]]] = []
        """Everything else."""
        self.reads_weights = True
        self.dtypes: set[torch.dtype] = set()
        """Of the weights that it read last."""
        self.lock = threading.Lock()
        self.http: ThreadingHTTPServer | None = None
        self.start()

    def start(self) -> None:
        self.version, self.vlm = "default", copy.deepcopy(self.first)
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(owner.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
                asked = body if self.path == "/v1/chat/completions" and not is_proof(body) else None
                self.reply(owner.post(self.path, body), asked)

            def reply(self, said: tuple[int, Any], asked: dict[str, Any] | None = None) -> None:
                with owner.lock:
                    if owner.http is not started:  # killed meanwhile: the connection breaks
                        return
                    if asked and said[0] == 200:
                        owner.answered.append(asked)
                content = json.dumps(said[1]).encode()
                self.send_response(said[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        class Http(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        started = self.http = Http(("127.0.0.1", self.port), Handler)
        threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        with self.lock:
            http, self.http = self.http, None
        if http is not None:
            http.shutdown()
            http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {
                "object": "list",
                "data": [{"id": "policy", "object": "model", "created": 1, "owned_by": "me"}],
            }
        if path == "/get_world_size":
            return 200, {"world_size": 2}
        assert path == "/weight_info", path
        return 200, {"weight_version": self.version}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/chat/completions":
            return self.complete(body)
        self.posted.append((path.partition("?")[0], body))
        if path == "/collective_rpc" and self.reads_weights:
            weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            self.dtypes = {weight.dtype for weight in weights.values()}
            renamed = {re.sub("^(?:model|(visual))[.]", named, name): weight for name, weight in weights.items()}
            missing = self.vlm.core.load_state_dict(renamed, strict=False)
            assert missing == (["lm_head.weight"], []), missing  # which is the embeddings
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return 200, {"success": True}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not is_proof(body):
            with self.lock:
                self.asked.append(body)
                number = len(self.asked)
            if status := self.fault(number):
                return status, {"error": {"message": "planted"}}
        with self.lock:
            choices = [certain()] if is_proof(body) else self.choices(body)
        return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "policy", **choices[0][1]} | {
            "choices": [choice | {"index": index} for index, (choice, _) in enumerate(choices)]
        }

    def choices(self, body: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        parts = body["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in urls]
        slots = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
        prompts = encode_prompts(self.vlm, [[{"role": "user", "content": slots}]], [images])
        rollout = sample(
            self.vlm,
            prompts,
            num_completions=body.get("n", 1),
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"] or 1.0,
            greedy=not body["temperature"],
            seed=[body.get("seed", 0)],
        )
        whole = {"prompt_token_ids": prompts.tokens[0]}
        return [
            (
                {
                    "message": {"role": "assistant", "content": rollout.texts[row]},
                    "finish_reason": "stop" if rollout.finished_N[row] else "length",
                    "token_ids": ids,
                    "logprobs": {
                        "content": [
                            {"token": "?", "logprob": logp, "bytes": None, "top_logprobs": top}
                            for logp, top in zip(
                                rollout.logp_NT[row].tolist(), self.tops(prompts, ids, body), strict=False
                            )
                        ]
                    },
                },
                whole,
            )
            for row, ids in enumerate(rollout.tokens)
        ]

    def tops(self, prompts: PromptBatch, ids: list[int], body: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """The likeliest tokens at each place of a reply, where they are asked for."""
        if not (number := body.get("top_logprobs")):
            return [[] for _ in ids]
        assert body["return_tokens_as_token_ids"]
        whole = torch.cat([prompts.input_ids_BP, torch.tensor([ids])], 1)
        with torch.no_grad():
            more = prompts.model_inputs() | prompts.kinds_before(len(ids))
            logits = self.vlm.model(input_ids=whole, **more, use_cache=False).logits[0, -len(ids) - 1 : -1]
        top = restrict(logits, 1.0, self.vlm.banned_token_ids).log_softmax(-1).topk(number)
        return [
            [{"token": f"token_id:{id}", "logprob": logp, "bytes": None} for id, logp in zip(*place, strict=True)]
            for place in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]


def named(match: re.Match[str]) -> str:
    """What a published file calls the parts, in the names of the model's own code."""
    return "model.visual." if match[1] else "model.language_model."


def is_proof(body: dict[str, Any]) -> bool:
    return body["messages"][0]["content"] == "?"


def certain() -> tuple[dict[str, Any], dict[str, Any]]:
    message = {"role": "assistant", "content": "!"}
    told = {"token": "!", "logprob": 0.0, "bytes": None, "top_logprobs": []}
    return {"message": message, "finish_reason": "length", "logprobs": {"content": [told]}}, {}


@contextlib.contextmanager
def starting() -> Iterator[Callable[[VLM], FakeVLLM]]:
    """Starts servers, each with a model; they are killed at the end."""
    started: list[FakeVLLM] = []

    def one(vlm: VLM) -> FakeVLLM:
        started.append(FakeVLLM(vlm))
        return started[-1]

    yield one
    for server in started:
        server.kill()


def disturbed(vlm: VLM, size: float = 0.02) -> VLM:
    """A copy with other weights."""
    other = copy.deepcopy(vlm)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * size)
    return other
