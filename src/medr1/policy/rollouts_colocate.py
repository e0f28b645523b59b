"""Sampling by vLLM inside the process that trains: the weights go from memory to memory and never through a file.

    pip install 'vllm==0.32.*' && pip install -e .    # in this order, see docs/scale.md
    medr1 train --set rollout.engine=vllm-colocate …

The engine is vLLM's `LLM` without processes of its own. A temporary folder tells it the configuration and the
processor of the policy; its weights it has from the policy, and again after each update, adapters added to what they
adapt. On a GPU it sleeps while the policy is trained: its weights wait in the machine's memory, its cache is
given back.
Of several training processes each has an engine (data parallel), or `tensor_parallel` of them have one together.

What is sampled is what `rollouts.sample` samples, by the same checks as with a server (`rollouts_vllm`).
"""

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, distributed, nn
from transformers.core_model_loading import revert_weight_conversion

from medr1.data.images import load_image
from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.policy import four_bit
from medr1.policy.encoding import PromptBatch, render_prompt
from medr1.policy.mismatch import TOP, Greedy, Watch, check_prompt
from medr1.policy.pixels import as_scaled
from medr1.policy.rollouts import Rollout, rollout_of, seeds_of
from medr1.policy.vlm import VLM
from medr1.processes import gather, tell

ENGINE = "rollout.engine = vllm-colocate"
FORMAT = "medr1"
"""What vLLM calls weights that come from a policy in memory."""
NAME = "vLLM"
"""Who drew a completion, in `Rollout.samplers`."""
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where weights can be handed to it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""vLLM reads them from the environment."""


class ColocatedVLLM(Watch):
    """A vLLM engine in this process, which samples for one training run; it starts with the first sample.

    Args:
        vlm: the policy.
        mode: one of prompts.MODES.
        dtype: what the engine computes in, "float32" or "bfloat16".
        memory: share of the GPU's memory that the engine may take, its weights included; on a CPU of the machine's.
        tensor_parallel: so many processes have one engine together.

    Raises:
        MedR1Error: no vLLM here, a base in 4 bits, or a number of processes that cannot be divided like that.
    """

    remedies = (
        "vLLM has another view of this model; set rollout.engine to local",
        "run the same command, which goes on from the last checkpoint with a new engine",
    )

    def __init__(self, vlm: VLM, *, mode: str, dtype: str, memory: float, tensor_parallel: int = 1) -> None:
        super().__init__()
        self.vlm, self.mode, self.dtype, self.memory = vlm, mode, dtype, memory
        self.tensor_parallel = tensor_parallel
        self.sleeps = vlm.device.type != "cpu"
        self.current = self.told = False
        self.llm: Any = None
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise MedR1Error(
                f"{ENGINE} needs vLLM in this environment ({error}); install vLLM 0.32 and then medr1, or set"
                " rollout.engine to local or vllm"
            ) from error
        if four_bit.is_four_bit(vlm.core):
            raise MedR1Error(
                f"{ENGINE} hands whole weights to vLLM, and those of {vlm.name} are in 4 bits; set rollout.engine to"
                " local, or to vllm with a server of the same base"
            )
        processes = distributed.get_world_size() if distributed.is_initialized() else 1
        if processes % tensor_parallel:
            raise MedR1Error(
                f"rollout.vllm_tensor_parallel = {tensor_parallel} does not divide the {processes} processes of this"
                " run; start a multiple of it with torchrun --nproc-per-node, or set it to 1"
            )

    def close(self) -> None:
        """End the engine, and with it the process group that this process is in."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.folder.cleanup()
            self.llm = None

    def push(self, step: int, *, load: bool = True) -> None:
        """The policy has changed: the next `sample` hands its weights over first."""
        self.current = False

    def sample(
        self,
        records: Sequence[Record],
        prompts: PromptBatch,
        *,
        num_completions: int,
        max_new_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
        part: tuple[int, int] = (0, 1),
    ) -> Rollout:
        """As `rollouts.sample`, by the engine and with the policy's weights, which must be whole here.

        Args:
            records: what `prompts` were made of.
            seed: from which seeds are drawn, or those of each prompt.
            part: number of this process and of all; each draws seeds for its own part of the step's prompts.

        Returns:
            A rollout whose log-probs are the engine's (see `grpo.rollout_weights`).

        Raises:
            MedR1Error: the engine reads a prompt otherwise than we do, or has no room for it.
        """
        settings = {"n": num_completions, "max_tokens": max_new_tokens, "temperature": temperature, "logprobs": 0}
        ours = prompts.tokens
        asked = [
            (record.id, len(ids), self._prompt(record), self._params(seed=one, **settings))
            for record, ids, one in zip(records, ours, seeds_of(seed, len(records), part), strict=True)
        ]
        first = 0
        if self.tensor_parallel > 1:  # those who have an engine together ask it the same
            group, member = divmod(part[0], self.tensor_parallel)
            parts = gather(asked)[group * self.tensor_parallel : (group + 1) * self.tensor_parallel]
            first, asked = sum(map(len, parts[:member])), [one for each in parts for one in each]
        replies = self._replies(asked)[first : first + len(records)]
        for record, reply, ids in zip(records, replies, ours, strict=True):
            check_prompt(NAME, record, reply.prompt_token_ids, ids, self.remedies[0])
        completions = [
            (
                list(row.token_ids),
                [given[token].logprob for given, token in zip(row.logprobs, row.token_ids, strict=True)],
                row.finish_reason == "stop",
            )
            for reply in replies
            for row in sorted(reply.outputs, key=lambda row: row.index)
        ]
        return rollout_of(self.vlm, prompts, completions, [NAME] * len(completions))

    def greedy(self, records: Sequence[Record], prompts: PromptBatch, max_new_tokens: int) -> list[Greedy]:
        """What the engine makes of these records, taking the most likely token each time.

        Raises:
            MedR1Error: it has no room for one.
        """
        params = self._params(max_tokens=max_new_tokens, temperature=0.0, logprobs=TOP)
        asked = [
            (record.id, len(ids), self._prompt(record), params)
            for record, ids in zip(records, prompts.tokens, strict=True)
        ]
        return [
            Greedy(
                prompt_ids=reply.prompt_token_ids,
                tokens=list(row.token_ids),
                logps=[given[token].logprob for given, token in zip(row.logprobs, row.token_ids, strict=True)],
                tops=[{token: told.logprob for token, told in given.items()} for given in row.logprobs],
            )
            for reply in self._replies(asked)
            for row in reply.outputs
        ]

    def _params(self, **settings: Any) -> Any:
        from vllm import SamplingParams

        size = self.vlm.core.config.get_text_config().vocab_size
        return SamplingParams(
            logit_bias={token: -100.0 for token in self.vlm.banned_token_ids if token < size},
            stop_token_ids=self.vlm.stop_token_ids,
            detokenize=False,
            **settings,
        )

    def _replies(self, asked: Sequence[tuple[str, int, dict[str, Any], Any]]) -> list[Any]:
        """Of the engine, to the name of a record, the length of its prompt, the prompt, and how it is answered."""
        with self._in_one_line(), _untouched(), self._awake():
            longest = self.llm.model_config.max_model_len
            for name, length, _, params in asked:
                if length + params.max_tokens > longest:
                    raise MedR1Error(
                        f"record {name}: its {length} tokens and rollout.max_new_tokens = {params.max_tokens} are more"
                        f" than the {longest} that vLLM has room for; raise rollout.vllm_memory, or leave the record"
                        " out"
                    )
            bos = self.vlm.tokenizer.bos_token
            adds_bos = not (bos and asked[0][2]["prompt"].startswith(bos))
            replies: list[Any] = self.llm.generate(
                [prompt for _, _, prompt, _ in asked],
                [params for *_, params in asked],
                use_tqdm=False,
                tokenization_kwargs={"add_special_tokens": adds_bos},
            )
        return replies

    def _prompt(self, record: Record) -> dict[str, Any]:
        text = render_prompt(self.vlm, build_messages(record, self.mode), thinking=self.mode == "think")
        images = [as_scaled(self.vlm.processor, load_image(path)) for path in record.images]
        return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Within this block the engine has its memory and the policy's weights."""
        if self.sleeps:
            torch.cuda.empty_cache()  # what the trainer holds and does not use
        if self.llm is None:
            self.llm = self._start()
        else:
            if self.sleeps:
                self.llm.wake_up(tags=["weights"])
            if not self.current:
                self._hand_over()
            if self.sleeps:
                self.llm.wake_up(tags=["kv_cache"])
        self.current = True
        yield
        if self.sleeps:
            self.llm.sleep(level=1)  # from level 2 some families do not come back as they were

    def _start(self) -> Any:
        from vllm import LLM
        from vllm.model_executor.model_loader import register_model_loader
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader

        vlm = self.vlm

        @register_model_loader(FORMAT)
        class FromPolicy(BaseModelLoader):
            def download_model(self, model_config: Any) -> None:
                pass

            def load_weights(self, model: Any, model_config: Any) -> None:
                model.load_weights(weights_as_saved(vlm))

        self.folder = TemporaryDirectory(prefix="medr1-vllm-")
        vlm.core.config.save_pretrained(self.folder.name)
        vlm.processor.save_pretrained(self.folder.name)
        settings: dict[str, Any] = {
            "model": self.folder.name,
            "load_format": FORMAT,
            "dtype": self.dtype,
            "logprobs_mode": "processed_logprobs",
            "gpu_memory_utilization": self.memory,
            "max_model_len": -1,  # as long as the cache has room for
            "limit_mm_per_prompt": {"video": 0, "audio": 0},
            "distributed_executor_backend": "external_launcher" if distributed.is_initialized() else "uni",
            "tensor_parallel_size": self.tensor_parallel,
            "seed": 0,
            "enable_sleep_mode": self.sleeps,
        }
        if vlm.device.type == "cpu":
            # Compiling takes minutes; and vLLM dies of a request with a seed whose prompt it reads in parts (0.32).
            settings |= {"enforce_eager": True, "enable_chunked_prefill": False}
        return LLM(**settings)

    @contextlib.contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """What vLLM raises, as a MedR1Error."""
        try:
            yield
        except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            # Of a refused setting the first line says only that there is one.
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            reason = said.strip().split("\n")[0] or type(error).__name__
            raise MedR1Error(
                f"{ENGINE}: vLLM does not serve {self.vlm.name} here ({reason}); where that is for want of memory, set"
                f" another rollout.vllm_memory than {self.memory:g}, else rollout.engine to local"
            ) from error

    def _hand_over(self) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_as_saved(self.vlm)})
        stale = [name for names in self.llm.apply_model(renew_heads) for name in names]
        if stale and not self.told:
            self.told = True
            tell(
                f"vLLM's CPU build kept {stale[0]}, which is tied to the embeddings, as it was before the update; it is"
                " renewed after each"
            )
        engine = self.llm.llm_engine
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        assert engine.reset_prefix_cache(), "no request is under way"


def weights_as_saved(vlm: VLM) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights by the names that its files have, tied ones once, adapters added to what they adapt.

    Nothing is written into the policy: merging and taking apart again would leave other weights behind.
    """
    core = vlm.core
    saved = core.state_dict().keys()
    tensors: dict[str, Tensor] = {}
    adapted: dict[int, Any] = {}
    named = dict(core.named_parameters()) | {name: buffer for name, buffer in core.named_buffers() if name in saved}
    for name, tensor in named.items():
        if ".lora_" in name:
            continue
        owner, _, last = name.rpartition(".")
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            if last == "weight":
                adapted[id(tensor)] = core.get_submodule(owner)
        tensors[f"{owner}.{last}" if owner else last] = tensor
    for name, tensor in revert_weight_conversion(core, tensors).items():
        layer = adapted.pop(id(tensor), None)
        with torch.no_grad():
            yield name, tensor.detach() if layer is None else tensor + layer.get_delta_weight("default")
    assert not adapted, "a weight that is saved in another form than it has carries no adapter"


def renew_heads(model: nn.Module) -> list[str]:
    """Lay out anew what vLLM's CPU build keeps of an output head beside its weight; the names of those that were stale.

    It packs a head when the engine starts. One that is tied to the embeddings gets no weight of its own when weights
    are handed over, so that it is not packed again and goes on computing with the first ones (0.32).
    """
    stale = []
    for name, module in model.named_modules():
        packed: Any = module
        if not (hasattr(module, "cpu_linear") and packed.weight.numel()):  # of other layers only what is packed is kept
            continue
        probe = packed.weight[:1]
        before = packed.quant_method.apply(packed, probe)
        packed.quant_method.process_weights_after_loading(packed)
        if not torch.equal(before, packed.quant_method.apply(packed, probe)):
            stale.append(name)
    return stale


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    """What an engine changes for its whole process is afterwards as it was: random states, `torch.set_num_threads`."""
    states, threads = (random.getstate(), np.random.get_state()), torch.set_num_threads
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = threads
