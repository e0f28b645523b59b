"""Evaluation of a model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a paid service).

Prompts, conditions, extractor, rows and resume are those of `medr1.evaluation.run`; only the reply comes from
elsewhere, through OpenAI's own client, which retries and times out. Every image and question is sent to that server.

    vllm serve Qwen/Qwen2-VL-72B-Instruct --tensor-parallel-size 4
    medr1 eval --model openai:Qwen/Qwen2-VL-72B-Instruct@http://localhost:8000/v1 --data OmniMedVQA --out 72b.jsonl
"""

import asyncio
import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import HttpUrl, ValidationError

from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.evaluation.rows import Row
from medr1.evaluation.run import Evaluation, open_evaluation
from medr1.policy.client import (
    TIMEOUT,
    Completion,
    NoCompletion,
    api_key,
    api_messages,
    at_once,
    is_filter,
    openai,
    quoted,
    read_completion,
    reason_of,
    run_async,
)
from medr1.processes import tell

MAX_RETRIES = 4
"""Further attempts at a request that met no server, 408, 409, 429 or 5xx; the client waits longer each time."""
EMPTY = "empty"
"""What a row says under "finish" where the server gave no reply at any attempt."""

REFUSED = "raise the server's limits, send smaller images (model.max_pixels), or leave the record out of the data"


def evaluate_remote(
    name: str,
    records: Sequence[Record],
    *,
    mode: str,
    out: Path,
    max_new_tokens: int = 256,
    condition: str = "image",
    seed: int = 0,
    donors: Sequence[Record] | None = None,
    max_pixels: int = 0,
    concurrency: int = 8,
) -> list[Row]:
    """As `medr1.evaluation.run.evaluate`, with the replies of a server at temperature 0, where it takes one.

    A row's key has the server's name of the model in place of weights: neither the URL, which may change between
    two sessions, nor what lies behind the name, which we cannot see. OPENAI_API_KEY is sent where it is set, and
    is never logged or written. Not to be called inside a running event loop, such as a notebook's.

    Args:
        name: "openai:MODEL@URL", MODEL as the server calls it, URL up to and with /v1.
        max_pixels: a larger image is scaled down to them before it is sent; 0: every image as it is.
        concurrency: requests under way at a time. Rows are written as replies arrive.

    Returns:
        The rows of `evaluate`. "model" is MODEL; "finish" is the server's finish_reason; "tokens" and
        "prompt_tokens" (images included) are the server's count, None where it states none; "served_model" is
        what the server says that it ran; "seconds" is one request's own time, retries included. Where the server's
        filter took the reply "finish" is "content_filter" and the outcome a refusal, where it had none to give
        "empty": both without a reply, and with the server's words as "server_said". "sampled" is True where it takes
        no temperature and replies by its own.

    Raises:
        MedR1Error: as `evaluate`; a malformed name; or the server cannot be reached, knows no such model or key,
            refuses a record, fails or stays silent. No record is left out. Rows written until then are whole and
            used again.
    """
    model, url = parse_name(name)
    key = api_key()
    with open_evaluation(
        records,
        name=model,
        model=["openai", model, *([max_pixels] if max_pixels else [])],
        mode=mode,
        out=out,
        max_new_tokens=max_new_tokens,
        condition=condition,
        seed=seed,
        donors=donors,
    ) as evaluation:
        server = Server(model, url, key, max_new_tokens, max_pixels=max_pixels)
        run_async(server.answer(evaluation, concurrency))
    _tell_doubts(evaluation.result, max_new_tokens)
    return evaluation.result


def _tell_doubts(rows: Sequence[Row], max_new_tokens: int) -> None:
    """Say what rows alone show of a server that was not one model, or cut replies where it was not asked to."""
    if len(models := Counter(row["served_model"] for row in rows if row.get("served_model"))) > 1:
        told = ", ".join(f"{model} ({count})" for model, count in models.most_common())
        tell(f"{rows[0]['model']}: its replies are of several models by the server's word: {told}", "yellow")
    if num_sampled := sum(row.get("sampled", False) for row in rows):
        tell(
            f"{rows[0]['model']}: takes no temperature, so that {num_sampled} of {len(rows)} replies were sampled by"
            " its own; asked again it may answer otherwise",
            "yellow",
        )
    if spent := sum(row["finish"] == "length" and not row["reply"].strip() for row in rows):
        tell(
            f"{rows[0]['model']}: {spent} of {len(rows)} replies are empty and were cut: a service counts reasoning"
            f" that it does not show in --max-new-tokens = {max_new_tokens}; raise it, and evaluate anew",
            "yellow",
        )
    ended = [row for row in rows if row["finish"] == "length" and isinstance(row["tokens"], int)]
    if cut := [row for row in ended if row["tokens"] < max_new_tokens]:
        tell(
            f"{rows[0]['model']}: {len(cut)} of {len(rows)} replies were cut before --max-new-tokens = {max_new_tokens}"
            f" by the server's count, such as record {cut[0]['id']}'s after {cut[0]['tokens']}; where it has no more"
            " room (vLLM's --max-model-len), raise that and evaluate anew",
            "yellow",
        )


def token_totals(rows: Sequence[Row]) -> dict[str, int | None]:
    """Tokens of all rows by the server's count: prompt_tokens (images included) and completion_tokens.

    None where the server did not state them for every row. Attempts that failed are not in it.
    """
    counts = {
        "prompt_tokens": [row["prompt_tokens"] for row in rows],
        "completion_tokens": [row["tokens"] for row in rows],
    }
    return {
        name: sum(tokens) if all(isinstance(count, int) for count in tokens) else None
        for name, tokens in counts.items()
    }


@dataclass
class Server:
    """A model behind a server, asked many questions at a time."""

    model: str
    url: str
    key: str
    max_new_tokens: int
    max_pixels: int = 0
    """Of an image that is sent; 0: any."""
    limit: str = "max_tokens"
    """What the server calls max_new_tokens, by its own word."""
    greedy: bool = True
    """Whether it takes a temperature, which is 0 then."""

    async def answer(self, evaluation: Evaluation, concurrency: int) -> None:
        """Ask what is pending and add each row as its reply arrives; the first failure ends it all.

        A record to which the server gives no choice, time and again, gets a row without a reply, but only from a
        server that answers others: at each third such record, and at the end, it is asked once more for a record that
        it has answered.
        """
        questions = iter(evaluation.pending)
        silent: list[tuple[str, Record, NoCompletion]] = []

        async with self.client() as client:

            async def ask(record: Record) -> Row:
                messages = await asyncio.to_thread(self._messages, evaluation, record)
                started = time.perf_counter()
                reply = await self.reply(client, messages, record)
                return reply | {"seconds": round(time.perf_counter() - started, 4)}

            async def check_answers() -> None:
                answered = (key for key, row in reversed(evaluation.rows.items()) if row["finish"] != EMPTY)
                if key := next(answered, None):
                    with contextlib.suppress(NoCompletion):
                        await ask(evaluation.records[key])
                        return
                _, record, error = silent[0]
                raise self._silence(record, error)

            async def work() -> None:
                for key, record in questions:
                    try:
                        reply = await ask(record)
                    except NoCompletion as error:
                        silent.append((key, record, error))
                        if len(silent) % 3 == 0:
                            await check_answers()
                    else:
                        evaluation.add([(key, reply)])

            await at_once(work, concurrency)
            if silent:
                await check_answers()
        evaluation.add((key, _row(Completion("", EMPTY, None, None, None, str(error)))) for key, _, error in silent)

    def check_answers(self, silent: Sequence[tuple[Record, NoCompletion]], asked: int) -> None:
        """See that a server answers others, where it gave no choice to these of the records that it was asked about.

        Raises:
            MedR1Error: it was asked about three or more, and answered none.
        """
        if len(silent) == asked > 2:
            raise self._silence(*silent[0])

    def _silence(self, record: Record, error: NoCompletion) -> MedR1Error:
        return self._error(f"answers nothing at record {record.id} ({error})", "look into the server's log")

    def client(self) -> openai.AsyncOpenAI:
        """The client of this server, to be used in `async with`."""
        timeout = openai.Timeout(TIMEOUT, connect=10.0)
        return openai.AsyncOpenAI(api_key=self.key, base_url=self.url, timeout=timeout, max_retries=MAX_RETRIES)

    async def reply(self, client: openai.AsyncOpenAI, messages: Any, record: Record) -> Row:
        """What a row says of the reply.

        Raises:
            MedR1Error: the server refuses, fails, or speaks another language.
            NoCompletion: it has no choice to give, at any attempt.
        """
        attempt = 0
        while True:
            settings = self._settings()
            try:
                response = await client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **settings
                )
                sampled = {} if "temperature" in settings else {"sampled": True}
                return _row(read_completion(response.http_response.text)) | sampled
            except NoCompletion as error:
                if error.passing and attempt < MAX_RETRIES:
                    await asyncio.sleep(min(8, 0.5 * 2**attempt))
                    attempt += 1
                elif error.empty:
                    raise
                elif not self._heed(str(error), settings):
                    raise self._misfit(error, record) from error
            except openai.NotFoundError as error:
                raise self._error(f"no model {self.model} there ({reason_of(error)})", await _offer(client)) from None
            except openai.APIError as error:
                if is_filter(error.body):
                    return _row(Completion("", "content_filter", None, None, None, reason_of(error)))
                refused = isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError)
                if not (refused and self._heed(reason_of(error), settings)):
                    raise self._failure(error, record) from None  # may repeat the key, and a run writes causes down

    def _messages(self, evaluation: Evaluation, record: Record) -> list[dict[str, Any]]:
        images = evaluation.images(record)
        for image in images:
            share = math.sqrt(self.max_pixels / (image.width * image.height))
            if 0 < share < 1:
                image.thumbnail((image.width * share, image.height * share), reducing_gap=None)
        return api_messages(build_messages(record, evaluation.stated["mode"]), images)

    def _settings(self) -> dict[str, Any]:
        return {self.limit: self.max_new_tokens} | ({"temperature": 0} if self.greedy else {})

    def _heed(self, refusal: str, asked: dict[str, Any]) -> bool:
        """Ask from now on as a refusal says: services that reason take another name of the limit, or no temperature.

        Returns:
            Whether that is otherwise than was asked, if by the refusal of another request meanwhile.
        """
        if "max_completion_tokens" in refusal:
            self.limit = "max_completion_tokens"
        elif re.search(r"\btemperature\b", refusal):
            self.greedy = False
        return self._settings() != asked

    def _misfit(self, error: NoCompletion, record: Record) -> MedR1Error:
        said = str(error)
        if "no chat completion" in said:
            return self._error(said, "mend the URL, most end in /v1")
        if "streams" in said:
            return self._error(said, "turn streaming off in the server or the proxy before it")
        if error.passing:
            return self._error(f"fails at record {record.id} ({said})", "look into the server's log")
        return self._error(f"refuses record {record.id} ({said})", REFUSED)

    def _failure(self, error: openai.APIError, record: Record) -> MedR1Error:
        reason = reason_of(error)
        match error:
            case openai.APITimeoutError():
                attempts = f"no reply within {TIMEOUT:g} seconds, {MAX_RETRIES + 1} times"
                return self._error(attempts, "see whether the server works, or lower --concurrency")
            case openai.APIConnectionError():
                return self._error(f"cannot be reached ({reason})", "start the server or mend the URL")
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return self._error(f"refuses the key ({reason})", "set OPENAI_API_KEY")
            case openai.RateLimitError():
                return self._error(f"takes no more requests ({reason})", "lower --concurrency or wait")
            case openai.InternalServerError():
                return self._error(f"fails at record {record.id} ({reason})", "look into the server's log")
        return self._error(f"refuses record {record.id} ({reason})", REFUSED)

    def _error(self, problem: str, remedy: str) -> MedR1Error:
        return MedR1Error(f"{self.url}: {problem}; {remedy}; the same command goes on from the rows that are written")


def _row(completion: Completion) -> Row:
    return {
        "reply": _writable(completion.text),
        "finish": completion.finish and _writable(completion.finish),
        "tokens": completion.completion_tokens,
        "prompt_tokens": completion.prompt_tokens,
        "served_model": completion.model and _writable(completion.model),
        **({"server_said": _writable(completion.said)} if completion.said else {}),
        "seconds": 0.0,
    }


def _writable(text: str) -> str:
    return text.encode(errors="replace").decode()  # half a surrogate pair has no UTF-8


def parse_name(name: str, option: str = "--model") -> tuple[str, str]:
    """Model and URL of openai:MODEL@URL.

    Raises:
        MedR1Error: it is something else, or the URL holds a password or a query.
    """
    match = re.fullmatch(r"openai:(.+?)@(https?://\S+)", name)
    try:
        url = HttpUrl(match[2]) if match else None
    except ValidationError:
        url = None
    if match is None or url is None:
        example = "openai:Qwen/Qwen2-VL-72B-Instruct@http://localhost:8000/v1"
        raise MedR1Error(f"{option} {name}: is not openai:MODEL@URL; write it like {example}")
    if url.username or url.password or url.query or url.fragment:
        raise MedR1Error(f"{option} openai:{match[1]}@…: name the URL without password or query; set OPENAI_API_KEY")
    return match[1], match[2]


async def _offer(client: openai.AsyncOpenAI) -> str:
    """The remedy for an unknown model: those that the server has, or another URL."""
    try:
        names = [model.id async for model in client.models.list()]
    except (openai.APIError, AttributeError, TypeError, ValueError):
        names = []
    return f"it offers {quoted(', '.join(names))}" if names else "mend the URL, most end in /v1"
