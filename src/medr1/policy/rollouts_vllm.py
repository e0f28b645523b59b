"""Sampling by a vLLM server: it is given the policy's weights before each step and returns tokens and log-probs.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs
    medr1 train --model MODEL --set rollout.engine=vllm --set rollout.vllm_url=http://127.0.0.1:8000/v1 …

A stock server is enough (tested: vLLM 0.32). It reads the weights from the run's folder, which it must see under the
same path. With LoRA only the adapter is read, and the server needs `--enable-lora --max-lora-rank RANK` and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. Its development endpoints obey anyone: keep the server off public networks.

What is sampled is what `rollouts.sample` samples: the server must have read the same prompt tokens, vision tokens are
never drawn, nothing is cut off the distribution. Its seeds come from ours, but its arithmetic depends on what else is
in a batch, so that a resumed run need not repeat its completions.
"""

import contextlib
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medr1.data.images import load_image
from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.policy.client import TIMEOUT, api_key, api_messages, openai, reason_of
from medr1.policy.encoding import PromptBatch
from medr1.policy.pixels import as_scaled
from medr1.policy.rollouts import Rollout, reply_texts
from medr1.policy.vlm import VLM

WAIT = 600.0
"""Seconds that a lost server may take to come back."""
POLL = 2.0
"""Seconds between two looks whether it is back."""
MAX_FAULTS = 3
"""Replies of status 5xx in a row after which a server that answers is given up."""
MAX_REQUESTS = 64
"""Prompts under way at a time."""
MAX_MISMATCH = 0.5
"""Mean difference of log-probs (nats a token) above which the server cannot hold the policy; bfloat16 gives 0.01."""
USUAL_STEPS = 5
"""Steps whose median difference is what is usual for a run: server and policy are hardly apart then, stale or not."""
MAX_GROWTH = 4.0
"""Times the usual difference above which a server is taken to hold older weights. Users of another trainer reported a
server that had stopped reading them: 0.201 in place of 0.015, thirteen times."""
LEAST_MISMATCH = 0.02
"""Nats a token that are never taken for that, so that two float32 computations, 1e-6 apart, may come to differ."""

T = TypeVar("T")


class _Unready(Exception):
    """The server answers, but not by the weights that it was given: it was started anew, or is not done with others."""


class VLLMServer:
    """A vLLM server that samples for one training run.

    Args:
        vlm: the policy: what its prompts are, which tokens are banned and which end a completion.
        url: of the server, up to and with /v1. OPENAI_API_KEY is sent where it is set.
        weights: the folder that `push` has the server read: a model, or with `lora` an adapter.
        mode: one of prompts.MODES.
    """

    def __init__(self, vlm: VLM, url: str, weights: Path, *, mode: str, lora: bool) -> None:
        self.vlm, self.url, self.weights, self.mode, self.lora = vlm, url.rstrip("/"), weights.resolve(), mode, lora
        if not self.url.endswith("/v1"):
            raise MedR1Error(f"rollout.vllm_url = {url}: does not end in /v1; write it like http://127.0.0.1:8000/v1")
        timeout = openai.Timeout(TIMEOUT, connect=10.0)
        self.client = openai.OpenAI(api_key=api_key(), base_url=self.url, timeout=timeout, max_retries=0)
        self.run = hashlib.sha256(str(self.weights).encode()).hexdigest()[:12]
        self.version = ""
        """Name of the weights that the server should have: the run and the step."""
        self.known = False
        """Whether the server that answers was seen to give the log-probs of what it draws from."""
        self.usual: list[float] = []
        """`check`'s differences of the run's first steps."""

    def push(self, step: int, *, load: bool = True) -> None:
        """Have the server read `weights` and forget all that it computed with others; waits for a lost server.

        Args:
            load: false where another process of the run does it, and this one need only know.

        Raises:
            MedR1Error: it did not come back, is no vLLM that takes weights, or cannot read them.
        """
        before, self.version = self.version, f"medr1-{self.run}-{step}"
        if load:
            self._insist(lambda: self._unload(before) if self.lora and before else None, load=True)

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
        """As `rollouts.sample`, by the server and with the weights of the last `push`; waits for a lost server.

        Args:
            records: what `prompts` were made of.
            seed: from which seeds are drawn, or those of each prompt.
            part: number of this process and of all; each draws seeds for its own part of the step's prompts.

        Returns:
            A rollout whose log-probs are the server's (see `grpo.rollout_weights`).

        Raises:
            MedR1Error: as `push`; or the server reads a prompt otherwise than we do, refuses it, or was given other
                weights by somebody else.
        """
        if isinstance(seed, int):
            generator = torch.Generator().manual_seed(seed)
            seed = torch.randint(2**31, (part[1], len(records)), generator=generator)[part[0]].tolist()
        seeds = seed
        settings: dict[str, Any] = {
            "n": num_completions,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "logprobs": True,
            "logit_bias": {str(token): -100 for token in self.vlm.banned_token_ids},
            # Fields of vLLM's own; unset ones would come from the model's generation_config.
            "extra_body": {
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": self.vlm.stop_token_ids,
                "return_token_ids": True,
                "chat_template_kwargs": {"enable_thinking": self.mode == "think"},
            },
        }

        def messages(record: Record) -> Any:
            # Scaled here, so that the recipe's limits hold whatever those of the server are.
            images = (as_scaled(self.vlm.processor, load_image(path)) for path in record.images)
            return api_messages(build_messages(record, self.mode), images)

        def ask(place: int) -> list[tuple[list[int], list[float], bool]]:
            try:
                reply = self.client.chat.completions.create(
                    model=self._model, messages=asked[place], seed=seeds[place], **settings
                )
            except openai.NotFoundError as error:
                raise _Unready(reason_of(error)) from error
            except openai.BadRequestError as error:
                raise MedR1Error(
                    f"{self.url}: refuses record {records[place].id} ({reason_of(error)}); raise the server's limits,"
                    " such as --max-model-len, or leave the record out"
                ) from error
            ours = prompts.input_ids_BP[place][prompts.attention_mask_BP[place].bool()].tolist()
            return self._read(reply, records[place], ours)

        with ThreadPoolExecutor(min(len(records), MAX_REQUESTS)) as pool:
            asked = list(pool.map(messages, records))

            def ask_all() -> list[tuple[list[int], list[float], bool]]:
                completions = [row for rows in pool.map(ask, range(len(records))) for row in rows]
                self._prove_fresh()
                return completions

            completions = self._insist(ask_all)
        assert len(completions) == len(records) * num_completions
        return self._rollout(completions, prompts)

    def remember(self, mismatches: list[float]) -> None:
        """What `check` was given by the steps of a run before it was resumed, in order."""
        self.usual = mismatches[:USUAL_STEPS]

    def check(self, mismatch: float) -> None:
        """See that the server has the policy's weights; once a step.

        Args:
            mismatch: mean |log π - log μ| of the step's sampled tokens, in nats.

        Raises:
            MedR1Error: more than MAX_MISMATCH, or than MAX_GROWTH times the median of the run's first USUAL_STEPS.
        """
        if not mismatch <= MAX_MISMATCH:
            raise MedR1Error(
                f"{self.url}: its log-probs are {mismatch:.2g} nats a token off the policy's, with the weights pushed;"
                " serve the recipe's model, with --logprobs-mode processed_logprobs"
            )
        if len(self.usual) < USUAL_STEPS:
            self.usual.append(mismatch)
        elif mismatch > max(LEAST_MISMATCH, MAX_GROWTH * (usual := statistics.median(self.usual))):
            raise MedR1Error(
                f"{self.url}: its log-probs are {mismatch:.2g} nats a token off the policy's, and were {usual:.2g} in"
                " the first steps, as if it had older weights; start the server anew and run the same command, which"
                " goes on from the last checkpoint"
            )

    @property
    def _model(self) -> str:
        """What the server calls the policy."""
        return self.version if self.lora else self._base

    @cached_property
    def _base(self) -> str:
        """What the server calls the model that it was started with."""
        return next(model.id for model in self.client.models.list() if not (model.model_extra or {}).get("parent"))

    def _insist(self, work: Callable[[], T], *, load: bool = False) -> T:
        """What `work` returns. A lost server is waited for, given the weights again, and asked from the beginning."""
        since, faults = None, 0
        error: Exception
        while True:
            try:
                if load:
                    self._load()
                if not self.known:
                    self._prove_processed()
                return work()
            except (openai.APIConnectionError, openai.InternalServerError, _Unready) as lost:
                error = lost
            except openai.APIStatusError as refusal:
                raise MedR1Error(f"{self.url}: refuses ({reason_of(refusal)}); {self._remedy(refusal)}") from refusal
            reason = reason_of(error) if isinstance(error, openai.APIError) else str(error)
            faults = faults + 1 if isinstance(error, openai.InternalServerError) else 0
            now = time.monotonic()
            if since is None:
                since = now
                message = f"{self.url}: {reason}; waiting for the server"
                Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)
            if faults == MAX_FAULTS:
                raise MedR1Error(
                    f"{self.url}: fails ({reason}); look into the server's log, and see that it finds {self.weights}"
                ) from error
            if now - since > WAIT:
                raise MedR1Error(
                    f"{self.url}: no vLLM for {WAIT:g} seconds ({reason}); start it and run the same command, which"
                    " goes on from the last checkpoint"
                ) from error
            time.sleep(POLL)
            load, self.known = True, False

    def _load(self) -> None:
        if self.lora:
            self._unload(self.version)  # of an attempt that ended halfway
            self._post("v1/load_lora_adapter", {"lora_name": self.version, "lora_path": str(self.weights)})
            return
        self._post("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights)}})
        self._post("reset_mm_cache")
        self._post("reset_encoder_cache")
        if self._post("reset_prefix_cache?reset_running_requests=true") != {"success": True}:
            raise _Unready("it cannot forget what it computed with other weights")
        self._post("update_weight_version", {"new_version": self.version})

    def _unload(self, name: str) -> None:
        with contextlib.suppress(openai.NotFoundError):
            self._post("v1/unload_lora_adapter", {"lora_name": name})

    def _prove_processed(self) -> None:
        """A token that a bias makes certain has log-prob 0, unless log-probs are of the distribution before biases."""
        certain = {str(self.vlm.stop_token_ids[0]): 100}
        reply: Any = self.client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": "?"}],
            max_tokens=1,
            logprobs=True,
            logit_bias=certain,
        )
        if reply.choices[0].logprobs.content[0].logprob < -0.1:
            raise MedR1Error(
                f"{self.url}: gives log-probs before temperature and bans; start vLLM with --logprobs-mode"
                " processed_logprobs"
            )
        self.known = True

    def _prove_fresh(self) -> None:
        """An adapter's name is proof enough: a server without it knows no such model."""
        if self.lora:
            return
        found = self.client.get(f"{self._root}/weight_info", cast_to=object)
        version = found.get("weight_version") if isinstance(found, dict) else None
        if version == "default":
            raise _Unready("it was started anew")
        if version != self.version:
            raise MedR1Error(
                f"{self.url}: holds the weights {version}, not {self.version}; give each run a server of its own"
            )

    def _post(self, path: str, body: object = None) -> object:
        return self.client.post(f"{self._root}/{path}", cast_to=object, body=body)

    @property
    def _root(self) -> str:
        return self.url.removesuffix("/v1")

    def _remedy(self, refusal: openai.APIStatusError) -> str:
        if isinstance(refusal, openai.AuthenticationError | openai.PermissionDeniedError):
            return "set OPENAI_API_KEY"
        if self.lora:
            return "start vLLM with --enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        return "start vLLM 0.32 or newer with VLLM_SERVER_DEV_MODE=1"

    def _read(self, reply: Any, record: Record, ours: list[int]) -> list[tuple[list[int], list[float], bool]]:
        """Token ids, log-probs and whether it ended by itself, of each completion."""
        theirs = reply.model_extra.get("prompt_token_ids")
        if theirs != ours:
            count = "no ids" if theirs is None else f"{len(theirs)} tokens"
            raise MedR1Error(
                f"{self.url}: reads the prompt of record {record.id} otherwise than medr1 ({count} there, {len(ours)}"
                " here); serve the recipe's model with its own chat template and image sizes"
            )
        return [
            (
                choice.model_extra["token_ids"],
                [token.logprob for token in choice.logprobs.content],
                choice.finish_reason == "stop",
            )
            for choice in sorted(reply.choices, key=lambda choice: choice.index)
        ]

    def _rollout(self, completions: list[tuple[list[int], list[float], bool]], prompts: PromptBatch) -> Rollout:
        device = prompts.input_ids_BP.device
        rows = [torch.tensor(ids) for ids, _, _ in completions]
        ids_NT = pad_sequence(rows, batch_first=True, padding_value=self.vlm.pad_token_id)
        logp_NT = pad_sequence([torch.tensor(logp) for _, logp, _ in completions], batch_first=True)
        mask_NT = torch.arange(ids_NT.shape[1]) < torch.tensor([[len(row)] for row in rows])
        finished_N: Tensor = torch.tensor([finished for _, _, finished in completions])
        texts = reply_texts(self.vlm, prompts, [ids for ids, _, _ in completions])
        return Rollout(ids_NT.to(device), mask_NT.to(device), logp_NT.to(device), finished_N.to(device), texts)
