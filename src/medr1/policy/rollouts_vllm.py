"""Sampling by vLLM servers: they are given the policy's weights before each step and return tokens and log-probs.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs
    medr1 train --model MODEL --set rollout.engine=vllm --set rollout.vllm_url=http://127.0.0.1:8000/v1 …

Stock servers are enough (tested: vLLM 0.32). They read the weights from the run's folder, which they must see under the
same path. With LoRA only the adapter is read, and a server needs `--enable-lora --max-lora-rank RANK` and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. Their development endpoints obey anyone: keep servers off public networks.

What is sampled is what `rollouts.sample` samples: a server must have read the same prompt tokens, vision tokens are
never drawn, nothing is cut off the distribution. Seeds come from ours and belong to prompts, whoever answers them, but
a server's arithmetic depends on what else is in a batch, so that a resumed run need not repeat its completions.
"""

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from medr1.data.images import load_image
from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.policy.client import TIMEOUT, api_key, api_messages, openai, reason_of
from medr1.policy.encoding import PromptBatch
from medr1.policy.mismatch import TOP, Greedy, Watch, check_prompt
from medr1.policy.pixels import as_scaled
from medr1.policy.rollouts import Completion, Rollout, rollout_of, seeds_of
from medr1.policy.vlm import VLM
from medr1.processes import tell

WAIT = 600.0
"""Seconds that lost servers may take until one comes back."""
POLL = 2.0
"""Seconds between two looks whether one is back."""
LOOK = 30.0
"""Seconds within which a server that is there says what models it has."""
MAX_FAULTS = 3
"""Replies of status 5xx in a row after which servers that answer are given up."""
AWAY = (502, 503, 504)
"""Those of a gateway before a server that is not there; it is waited for as one without a gateway."""
MAX_REQUESTS = 64
"""Prompts under way at a time with each server."""

SENDING = threading.Lock()
"""Held while weights go from GPU to GPU."""
T = TypeVar("T")
Reply = tuple[str, Completion]
"""Who drew it, by URL, and what."""


class _Unready(Exception):
    """The server answers, but not by the weights that it was given: it was started anew, or is not done with others."""


class VLLMServer(Watch):
    """One vLLM server, or several that share out the prompts, sampling for one training run.

    One that is lost is left out and named, its prompts are asked of the others, and each `push` tries it again. With
    all of them lost, they are waited for.

    Args:
        vlm: the policy: what its prompts are, which tokens are banned and which end a completion.
        urls: of the servers, up to and with /v1. OPENAI_API_KEY is sent where it is set.
        weights: the folder that `push` has the servers read: a model, or with `lora` an adapter.
        mode: one of prompts.MODES.
        nccl: send the weights from GPU to GPU in this type, and read none from `weights` (see `transfer`).
    """

    def __init__(
        self,
        vlm: VLM,
        urls: str | Sequence[str],
        weights: Path,
        *,
        mode: str,
        lora: bool,
        nccl: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vlm, self.mode = vlm, mode
        run = hashlib.sha256(str(weights.resolve()).encode()).hexdigest()[:12]
        self.prefix = f"medr1-{run}-"
        """Of the names that the run's weights have on a server; the step follows."""
        self.version = ""
        """Name of the weights that the servers should have."""
        self.loads = True
        """Whether this process gave them these weights, and so knows who is there."""
        self.servers = [
            Server(url, vlm.stop_token_ids[0], weights=weights.resolve(), prefix=self.prefix, lora=lora)
            for url in ([urls] if isinstance(urls, str) else urls)
        ]
        if nccl:
            from medr1.policy.transfer import connect

            for server in self.servers:
                server.connect = partial(connect, vlm, nccl)

    def push(self, step: int, *, load: bool = True) -> None:
        """Have the servers read `weights` and forget all that they computed with others; waits where all are lost.

        Args:
            load: false where another process of the run does it, and this one need only know.

        Raises:
            MedR1Error: none came back, or one is no vLLM that takes weights, or cannot read them.
        """
        self.version, self.loads = f"{self.prefix}{step}", load
        if load:
            self._each(self.servers, self._load)
            next(self._rounds())

    def close(self) -> None:
        """Servers go on without us."""

    def sample(self, records: Sequence[Record], prompts: PromptBatch, **settings: Any) -> Rollout:
        """What is drawn by `ask`, with its settings, as `rollouts.sample` gives it."""
        return self.rollout(prompts, self.ask(records, prompts, **settings))

    def ask(
        self,
        records: Sequence[Record],
        prompts: PromptBatch,
        *,
        num_completions: int,
        max_new_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
        part: tuple[int, int] = (0, 1),
    ) -> list[Reply]:
        """As `rollouts.sample`, by the servers and with the weights of the last `push`; waits where all are lost.

        Leaves the tokenizer alone, so that a thread may ask while another reads other prompts.

        Args:
            records: what `prompts` were made of.
            seed: from which seeds are drawn, or those of each prompt.
            part: number of this process and of all; each draws seeds for its own part of the step's prompts.

        Returns:
            Completions in prompt-major order.

        Raises:
            MedR1Error: as `push`; or a server reads a prompt otherwise than we do, refuses it, or was given other
                weights by somebody else.
        """
        seeds = seeds_of(seed, len(records), part)
        settings = _settings(self.vlm, self.mode, max_new_tokens)

        def ask(place: int, server: Server) -> list[Completion] | None:
            """None of a server that is lost, or now is."""
            if server.lost:
                return None
            return server.attempt(
                lambda: server.answer(
                    records[place],
                    ours[place],
                    model=server.model(self.version),
                    messages=asked[place],
                    seed=seeds[place],
                    n=num_completions,
                    temperature=temperature,
                    **settings,
                )
            )

        ours, replies = prompts.tokens, dict[int, tuple[str, list[Completion]]]()
        # Unlike an executor's, these threads let the process end while a server does not answer.
        with ThreadPool(min(len(records), MAX_REQUESTS * len(self.servers))) as pool:
            asked = pool.map(lambda record: _messages(self.vlm, record, self.mode), records, chunksize=1)
            self._each(self._there if self.loads else self.servers, self._prove)
            for there in self._rounds():
                missing = [place for place in range(len(records)) if place not in replies]
                first = part[0] * len(records)  # processes with a prompt each begin with different servers
                turns = [(place, there[(first + number) % len(there)]) for number, place in enumerate(missing)]
                given = pool.starmap(ask, turns, chunksize=1)
                # Whoever is lost on the way had the weights until then; whoever is there must have them still.
                there = self._there
                self._each(there, self._prove)
                changed = [server for server in there if isinstance(server.lost, _Unready)]
                for (place, server), rows in zip(turns, given, strict=True):
                    if rows is not None and server not in changed:
                        replies[place] = server.url, rows
                if len(replies) == len(records):
                    break
        completions = [(url, row) for _, (url, rows) in sorted(replies.items()) for row in rows]
        assert len(completions) == len(records) * num_completions
        return completions

    def rollout(self, prompts: PromptBatch, replies: Sequence[Reply]) -> Rollout:
        """What was asked about these prompts; its log-probs are the servers' (see `objective.rollout_weights`)."""
        return rollout_of(self.vlm, prompts, [row for _, row in replies], [url for url, _ in replies])

    @property
    def _there(self) -> "list[Server]":
        return [server for server in self.servers if not server.lost]

    def _load(self, server: "Server") -> None:
        if server.connect and not self.loads:  # a group has one process that sends
            server.prove(self.version)
        else:
            server.load(self.version)

    def _prove(self, server: "Server") -> None:
        server.prove(self.version)

    def _rounds(self) -> "Iterator[list[Server]]":
        """The servers that are there, again and again. Where none is they are waited for and given the weights anew."""
        since, faults = None, 0
        while True:
            if there := self._there:
                yield there
                continue
            # What one of them says of itself is worth more than that another is not there.
            lost = max(
                self.servers,
                key=lambda server: (_fails(server), not isinstance(server.lost, openai.APIConnectionError)),
            )
            faults = faults + 1 if _fails(lost) else 0
            if since is None:
                since = time.monotonic()
            if faults == MAX_FAULTS:
                raise MedR1Error(
                    f"{lost.url}: fails ({lost.reason}); look into the server's log, and see that it finds"
                    f" {lost.weights}"
                ) from lost.lost
            if time.monotonic() - since > WAIT:
                raise MedR1Error(
                    f"{lost.url}: no vLLM for {WAIT:g} seconds ({lost.reason}); start it and run the same command,"
                    " which goes on from the last checkpoint"
                ) from lost.lost
            time.sleep(POLL)
            self._each(self.servers, self._load)

    def _each(self, servers: "list[Server]", work: "Callable[[Server], None]") -> None:
        """Do this with all of them at once: where it goes well the server is there, else lost. Says what changed."""

        def attempt(server: Server) -> None:
            server.lost = None
            server.attempt(lambda: work(server))

        with ThreadPool(max(1, len(servers))) as pool:
            pool.map(attempt, servers)
        for server in self.servers:
            if bool(server.lost) != server.told_lost:
                server.told_lost = bool(server.lost)
                state = "left out until it is back" if self._there else "waiting for the server"
                tell(f"{server.url}: {f'{server.reason}; {state}' if server.lost else 'is back'}")


class Server:
    """One of the servers.

    Args:
        certain: a token that a completion may begin with.
        weights: what it reads, where it is given weights; their names begin with `prefix`.
    """

    def __init__(self, url: str, certain: int, *, weights: Path = Path(), prefix: str = "", lora: bool = False) -> None:
        self.url, self.weights, self.prefix = url.rstrip("/"), weights, prefix
        self.certain, self.lora = certain, lora
        if "@" in self.url:  # which would be told, and written into recipes
            raise MedR1Error("the URL of a vLLM server holds a password; name it without, and set OPENAI_API_KEY")
        if not re.fullmatch(r"https?://[^\s?#]+/v1", self.url):
            raise MedR1Error(f"{url}: is no URL that ends in /v1; write it like http://127.0.0.1:8000/v1")
        timeout = openai.Timeout(TIMEOUT, connect=10.0)
        self.client = openai.OpenAI(api_key=api_key(), base_url=self.url, timeout=timeout, max_retries=0)
        self.known = False
        """Whether the server that answers was seen to give the log-probs of what it draws from."""
        self.base = ""
        """What it calls the model that it was started with, once it was asked."""
        self.connect: Callable[[Server, int], Any] | None = None
        """Makes what sends weights without files, given the number of the server's processes."""
        self.link: Any = None
        """What it made."""
        self.lost: Exception | None = None
        """Why it is left out, where it is."""
        self.told_lost = False

    @property
    def reason(self) -> str:
        return reason_of(self.lost).rstrip(".") if isinstance(self.lost, openai.APIError) else str(self.lost)

    def model(self, version: str) -> str:
        """What it calls the policy."""
        return version if self.lora else self.base

    def attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where the server is lost.

        Raises:
            MedR1Error: the server is there and refuses.
        """
        try:
            return work()
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError, _Unready) as error:
            self.lost, self.known = self.lost or error, False
            if self.link:
                self.link = self.link.shutdown()
            return None
        except openai.APIStatusError as refusal:
            raise MedR1Error(f"{self.url}: refuses ({reason_of(refusal)}); {self._remedy(refusal)}") from refusal

    def load(self, version: str) -> None:
        """Give it the weights by this name."""
        there = self.models()
        if self.lora:
            for name in there:
                if name.startswith(self.prefix):  # of an earlier step, or an attempt that ended halfway
                    with contextlib.suppress(openai.NotFoundError):
                        self.post("v1/unload_lora_adapter", {"lora_name": name})
            self.post("v1/load_lora_adapter", {"lora_name": version, "lora_path": str(self.weights)})
            with contextlib.suppress(openai.NotFoundError):  # a run begun again in the same folder uses its names again
                self.post("reset_prefix_cache?reset_running_requests=true")
        else:
            if self.connect:
                self._send(self.connect)
            else:
                self.post("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights)}})
            self.post("reset_mm_cache")
            self.post("reset_encoder_cache")
            if self.post("reset_prefix_cache?reset_running_requests=true") != {"success": True}:
                raise _Unready("it cannot forget what it computed with other weights")
            self.post("update_weight_version", {"new_version": version})
        self.prove_processed(self.model(version))

    def _send(self, connect: "Callable[[Server, int], Any]") -> None:
        """Send the weights from GPU to GPU, to one server at a time."""
        with SENDING:
            if self.link is None:
                self.post("shutdown_weight_transfer_engine")  # the group of a trainer before
                with self.reading():
                    found: Any = self.client.get(f"{self._root}/get_world_size", cast_to=object)
                    processes = int(found["world_size"])
                self.link = connect(self, processes)
            try:
                self.link.send_weights()
            except RuntimeError as error:
                raise MedR1Error(f"{self.url}: NCCL fails ({error}); set rollout.vllm_transfer to files") from error

    # What vLLM's engine asks of a server while it makes a group with it and sends.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("finish_weight_update", {"weight_version": weight_version})

    def prove(self, version: str) -> None:
        """See that it has the weights of this name and no others."""
        there = self.models()
        if self.lora:
            if version not in there:
                raise _Unready("it was started anew")
        else:
            found = self.client.get(f"{self._root}/weight_info", cast_to=object)
            held = found.get("weight_version") if isinstance(found, dict) else None
            if held == "default":
                raise _Unready("it was started anew")
            if isinstance(held, str) and held != version and held.startswith(self.prefix):
                raise _Unready("it has older weights")
            if held != version:
                raise MedR1Error(
                    f"{self.url}: holds the weights {held}, not {version}; give each run a server of its own"
                )
        self.prove_processed(self.model(version))

    def answer(self, record: Record, ours: list[int], **request: Any) -> list[Completion]:
        """Completions of one record.

        Args:
            ours: tokens of its prompt, images included.

        Raises:
            MedR1Error: the server has read another prompt, or its completions are not as many, as whole or as long as
                was asked for.
        """
        with self.reading():
            reply = self.complete(record, **request)
            check_prompt(self.url, record, reply.model_extra.get("prompt_token_ids"), ours)
            choices = sorted(reply.choices, key=lambda choice: choice.index)
            if [choice.index for choice in choices] != list(range(request["n"])):
                raise MedR1Error(
                    f"{self.url}: gives {len(choices)} completions of record {record.id} by other numbers than the"
                    f" {request['n']} that were asked for; look into the server's log, or a proxy's before it"
                )
            return [self._completion(record, choice, request["max_tokens"]) for choice in choices]

    def _completion(self, record: Record, choice: Any, max_tokens: int) -> Completion:
        if choice.finish_reason == "abort":
            raise _Unready("it was made to abort what it is asked")
        ids, finished = choice.model_extra["token_ids"], choice.finish_reason == "stop"
        pairs = [(token, float(told.logprob)) for token, told in zip(ids, choice.logprobs.content, strict=True)]
        if not pairs or (len(pairs) < max_tokens and not finished):
            raise MedR1Error(
                f"{self.url}: ends a completion of record {record.id} after {len(pairs)} of {max_tokens} tokens"
                f" ({choice.finish_reason}); raise its --max-model-len, or lower rollout.max_new_tokens"
            )
        return [token for token, _ in pairs], [logp for _, logp in pairs], finished

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Within this block a reply that has not the form of vLLM's is one line."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise MedR1Error(
                f"{self.url}: its reply is none of vLLM's ({reason}); mend the URL, or start vLLM 0.32 or newer there"
            ) from error

    def complete(self, record: Record, **request: Any) -> Any:
        """The client's completion of a request about this record."""
        try:
            return self.client.chat.completions.create(**request)
        except openai.NotFoundError as error:
            raise _Unready(reason_of(error)) from error
        except openai.BadRequestError as error:
            raise MedR1Error(
                f"{self.url}: refuses record {record.id} ({reason_of(error)}); raise the server's limits, such as"
                " --max-model-len, or leave the record out"
            ) from error

    def post(self, path: str, body: object = None) -> object:
        return self.client.post(f"{self._root}/{path}", cast_to=object, body=body)

    def models(self) -> list[str]:
        """What it serves; a server that hangs is soon found to."""
        with self.reading():
            models = list(self.client.with_options(timeout=openai.Timeout(LOOK, connect=10.0)).models.list())
            self.base, *_ = (model.id for model in models if not (model.model_extra or {}).get("parent"))
            return [model.id for model in models]

    def prove_processed(self, model: str) -> None:
        """A token that a bias makes certain has log-prob 0, unless log-probs are of the distribution before biases."""
        if self.known:
            return
        with self.reading():
            reply: Any = self.client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "?"}],
                max_tokens=1,
                logprobs=True,
                logit_bias={str(self.certain): 100},
            )
            logp = float(reply.choices[0].logprobs.content[0].logprob)
        if not logp >= -0.1:
            raise MedR1Error(
                f"{self.url}: gives log-probs before temperature and bans; start vLLM with --logprobs-mode"
                " processed_logprobs"
            )
        self.known = True

    @property
    def _root(self) -> str:
        return self.url.removesuffix("/v1")

    def _remedy(self, refusal: openai.APIStatusError) -> str:
        if isinstance(refusal, openai.AuthenticationError | openai.PermissionDeniedError):
            return "set OPENAI_API_KEY"
        if self.lora:
            return "start vLLM with --enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        more = """ and --weight-transfer-config '{"backend": "nccl"}'""" if self.connect else ""
        return f"start vLLM 0.32 or newer with VLLM_SERVER_DEV_MODE=1{more}"


def greedy(
    vlm: VLM, url: str, records: Sequence[Record], *, mode: str, max_new_tokens: int, served: str = ""
) -> list[Greedy]:
    """What a server makes of these records with the weights that it has.

    Args:
        served: its name of the model; empty: the one that it was started with.

    Raises:
        MedR1Error: it cannot be reached, fails or refuses, or is no vLLM.
    """
    server = Server(url, vlm.stop_token_ids[0])
    settings = _settings(vlm, mode, max_new_tokens)
    settings["extra_body"]["return_tokens_as_token_ids"] = True

    def ask(record: Record) -> Greedy:
        messages = _messages(vlm, record, mode)
        with server.reading():
            reply = server.complete(
                record,
                model=served or server.base,
                messages=messages,
                temperature=0,
                top_logprobs=TOP,
                **settings,
            )
            (choice,) = reply.choices
            if None in (choice.model_extra.get("token_ids"), reply.model_extra.get("prompt_token_ids")):
                raise MedR1Error(f"{url}: tells no token ids; it is no vLLM, or one older than 0.11")
            pairs = list(zip(choice.model_extra["token_ids"], choice.logprobs.content, strict=True))
            return Greedy(
                prompt_ids=reply.model_extra["prompt_token_ids"],
                tokens=[token for token, _ in pairs],
                logps=[float(told.logprob) for _, told in pairs],
                tops=[
                    {int(top.token.removeprefix("token_id:")): top.logprob for top in told.top_logprobs}
                    for _, told in pairs
                ],
            )

    def ask_all() -> list[Greedy]:
        server.models()
        server.prove_processed(served or server.base)
        with ThreadPool(min(len(records), MAX_REQUESTS)) as pool:
            return pool.map(ask, records, chunksize=1)

    if (replies := server.attempt(ask_all)) is None:
        raise MedR1Error(f"{url}: {server.reason}; start the server or mend the URL") from server.lost
    return replies


def _settings(vlm: VLM, mode: str, max_new_tokens: int) -> dict[str, Any]:
    """Of a request: the policy's own distribution."""
    size = vlm.core.config.get_text_config().vocab_size
    return {
        "max_tokens": max_new_tokens,
        "top_p": 1.0,
        "logprobs": True,
        "logit_bias": {str(token): -100 for token in vlm.banned_token_ids if token < size},
        # Fields of vLLM's own; unset ones would come from the model's generation_config.
        "extra_body": {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": vlm.stop_token_ids,
            "return_token_ids": True,
            "chat_template_kwargs": {"enable_thinking": mode == "think"},
        },
    }


def _fails(server: Server) -> bool:
    """Whether it is there and fails, unlike one that a gateway does not find."""
    return isinstance(server.lost, openai.InternalServerError) and server.lost.status_code not in AWAY


def _messages(vlm: VLM, record: Record, mode: str) -> Any:
    # Scaled here, so that the recipe's limits hold whatever those of the server are.
    images = (as_scaled(vlm.processor, load_image(path)) for path in record.images)
    return api_messages(build_messages(record, mode), images)
