"""Weights sent by vLLM's own classes to a server that writes down what it is asked; run where vLLM and medr1 are.

In place of NCCL stands a list: of what would be sent, checked by vLLM against what the server was told to expect.
"""

import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm.distributed.weight_transfer.nccl_engine as nccl
from fake_vllm import FakeVLLM
from safetensors.torch import load_file
from tiny_vlms import tiny_vlm

from medr1.policy.rollouts_vllm import Server
from medr1.policy.transfer import connect

UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
CLEAN = ["/reset_mm_cache", "/reset_encoder_cache", "/reset_prefix_cache", "/update_weight_version"]

os.environ["NO_PROXY"] = "127.0.0.1"
sent: list[Any] = []
endpoints: list[Any] = []
nccl.open_trainer_endpoint = lambda info: endpoints.append(info) or SimpleNamespace(destroy=endpoints.clear)
nccl.NCCLTrainerWeightTransferEngine._broadcast = lambda self, source, meta: sent.extend(
    self._checked_iter(iter(source), meta)
)

vlm = tiny_vlm("qwen2_vl")
vlm.core.save_pretrained(sys.argv[1])
saved = load_file(Path(sys.argv[1]) / "model.safetensors")
fake = FakeVLLM(vlm)
server = Server(fake.url, vlm.stop_token_ids[0], prefix="medr1-x-")
on_gpu: Any = SimpleNamespace(core=vlm.core, device=torch.device("cuda"))
server.connect = partial(connect, on_gpu, torch.bfloat16)

server.load("medr1-x-0")
paths = [path for path, _ in fake.posted]
assert paths == ["/shutdown_weight_transfer_engine", "/init_weight_transfer_engine", *UPDATE, *CLEAN], paths
info = fake.posted[1][1]["init_info"]
assert (info["master_address"], info["world_size"], info["rank_offset"]) == ("127.0.0.1", 3, 1), info
assert endpoints[0].master_port == info["master_port"]
told = fake.posted[3][1]["update_info"]
assert sorted(told["names"]) == sorted(saved) == sorted(name for name, _ in sent)
assert set(told["dtype_names"]) == {"bfloat16"}
for name, weight in sent:
    assert torch.equal(weight, saved[name].bfloat16()), name
server.prove("medr1-x-0")

fake.posted.clear()
server.load("medr1-x-1")
assert [path for path, _ in fake.posted] == UPDATE + CLEAN, "one group for all steps"

fake.kill()
assert server.attempt(lambda: server.load("medr1-x-2")) is None and server.link is None and not endpoints
fake.start()
fake.posted.clear()
server.load("medr1-x-2")
assert fake.posted[1][0] == "/init_weight_transfer_engine", "another group with a server that was started anew"
