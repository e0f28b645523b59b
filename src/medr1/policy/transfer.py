"""Weights from the trainer's GPU to those of a vLLM server over NCCL, by vLLM's own transfer (0.32), without files.

    vllm serve MODEL --logprobs-mode processed_logprobs --weight-transfer-config '{"backend": "nccl"}'
    medr1 train --set rollout.engine=vllm --set rollout.vllm_transfer=nccl …    # with vLLM installed beside medr1

vLLM's trainer-side engine makes the group and sends; here is said which weights, by which names, to whom. No GPU has
run this: tested are the requests, by vLLM's own classes, with nothing sent between them. A server that dies while it is
sent weights leaves NCCL, and so the run, waiting: end it and run the same command.
"""

import socket
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from medr1.errors import MedR1Error
from medr1.policy.rollouts_colocate import weights_as_saved
from medr1.policy.vlm import VLM


class Client(Protocol):
    """The server's side of the protocol."""

    url: str

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def connect(vlm: VLM, dtype: torch.dtype, client: Client, num_workers: int) -> Any:
    """vLLM's engine of the trainer's side, in one group with the workers of a server; `send_weights()` sends.

    Args:
        dtype: of floats on their way.

    Raises:
        MedR1Error: no GPU or no vLLM here.
    """
    try:
        from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:
        raise MedR1Error(
            f"rollout.vllm_transfer = nccl needs vLLM 0.32 in this environment ({error}); install it beside medr1, or"
            " set it to files"
        ) from error
    if vlm.device.type != "cuda":
        raise MedR1Error("rollout.vllm_transfer = nccl needs a GPU here and at the server; set it to files")

    class Policy(WeightSource):
        def metadata(self) -> list[Any]:
            return [
                ParamMeta(name, dtype if weight.is_floating_point() else weight.dtype, tuple(weight.shape))
                for name, weight in weights_as_saved(vlm)
            ]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights_as_saved(vlm):
                yield name, weight.to(dtype) if weight.is_floating_point() else weight

    address = urlsplit(client.url)
    with socket.create_connection((address.hostname, address.port or 80)) as towards, socket.socket() as free:
        here = towards.getsockname()[0]
        free.bind((here, 0))
        port = free.getsockname()[1]
    info = NCCLTrainerInitInfo(master_address=here, master_port=port, world_size=1 + num_workers, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Policy())
