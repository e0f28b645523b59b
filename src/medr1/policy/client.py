"""The client of OpenAI-compatible servers: key, messages with their images, and a failure in one line."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from medr1.errors import MedR1Error, first_alone
from medr1.processes import Interrupts

try:
    import openai
except ImportError as error:
    raise MedR1Error("a model behind a server needs the openai client; pip install 'medr1[remote]'") from error

TIMEOUT = 600.0
"""Seconds that one request may take, the server's own queue included."""


NO_KEY = "EMPTY"
"""What is sent as the key where OPENAI_API_KEY is not set; local servers take any."""


async def at_once(work: Callable[[], Coroutine[Any, Any, None]], workers: int) -> None:
    """Let several workers go through what they share at the same time; the first failure ends all, and is raised."""
    with first_alone():
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(work())


def run_async(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, in which Ctrl-C cancels what is under way and is raised as KeyboardInterrupt when that has ended.

    asyncio does so only where Python's own handler is in place. From `heed_interrupts`' KeyboardInterrupt would come up
    inside whatever task is at work, and closing the event loop then shows the other tasks' tracebacks. It
    learns of the first Ctrl-C all the same, and the second is its own.
    """
    ours = signal.getsignal(signal.SIGINT)
    if not callable(ours) or threading.current_thread() is not threading.main_thread():  # ignored, or not ours to set
        return asyncio.run(work)

    async def heeded() -> None:
        cancel = signal.getsignal(signal.SIGINT)
        assert callable(cancel)  # asyncio's

        def on_interrupt(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, ours)
            Interrupts.pressed = True
            cancel(number, frame)

        signal.signal(signal.SIGINT, on_interrupt)
        await work

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asyncio.run(heeded())
    finally:
        signal.signal(signal.SIGINT, ours)


def api_key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise MedR1Error("OPENAI_API_KEY: holds a character that no key has; set it anew")
    return key


def api_messages(messages: Sequence[dict[str, Any]], images: Iterable[Image.Image]) -> list[dict[str, Any]]:
    """`build_messages` in the API's form: each image slot holds its image, as a PNG in a data URI."""
    rest = iter(images)
    return [
        {
            "role": turn["role"],
            "content": [part if part["type"] == "text" else _image_part(next(rest)) for part in turn["content"]],
        }
        for turn in messages
    ]


def _image_part(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


@dataclass(frozen=True)
class Completion:
    """What a server replied, whatever dialect it speaks."""

    text: str
    """The reply as the model wrote it: reasoning that the server parted from it stands before it in <think></think>."""
    finish: str | None
    """ "stop", "length", "content_filter", or another word of the server's."""
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str | None
    said: str
    """Why the server gave no reply, in its own words; "" where it gave one or no reason."""


class NoCompletion(Exception):
    """A reply of status 200 that holds none; the message quotes it.

    Attributes:
        passing: whether it may be gone at the next attempt.
        empty: whether it is well formed and has no choice.
    """

    def __init__(self, message: str, *, passing: bool = False, empty: bool = False) -> None:
        super().__init__(message)
        self.passing, self.empty = passing, empty


_FINISHES = {
    "length": ("max_tokens", "model_length", "max_length"),
    "stop": ("eos", "eos_token", "end_turn", "stop_sequence"),
    "content_filter": ("safety", "content-filter", "refusal", "sensitive", "prohibited_content"),
}
_FILTERS = (
    "content_filter",
    "content_policy",
    "data_inspection_failed",
    "moderation",
    "flagged_input",
    "responsibleai",
)
"""Parts of the codes by which services say that their filter and not the model's limits refused a request."""


def read_completion(body: str) -> Completion:
    """The first choice in the body of a reply of status 200.

    Raises:
        NoCompletion: there is none.
    """
    try:
        reply = json.loads(body.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        if re.match(r"\s*(data|event|id|retry)?:", body):  # a comment has no name before the colon
            raise NoCompletion("it streams its replies, though asked not to") from None
        raise NoCompletion(f"its reply is no chat completion but {quoted(body) or 'nothing'}") from None
    if not isinstance(reply, dict):
        raise NoCompletion(f"its reply is no chat completion but {quoted(reply)}")
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if error := reply.get("error") or choice.get("error") or (reply if reply.get("object") == "error" else None):
        code = str(error.get("code")) if isinstance(error, dict) else ""
        passing = bool(re.fullmatch(r"408|409|429|5\d\d", code)) or _is_passing(error)
        words = error.get("message") if isinstance(error, dict) else error
        if is_filter(error):
            return Completion("", "content_filter", None, None, None, quoted(words or error))
        raise NoCompletion(quoted(words or error), passing=passing)
    if choices == []:
        raise NoCompletion(f"no choice in its reply, {quoted(reply)}", passing=True, empty=True)
    message = choice.get("message") or {}
    if not isinstance(message, dict) or not ("message" in choice or "text" in choice):
        raise NoCompletion(f"its reply is no chat completion but {quoted(reply)}")
    content = message.get("content")
    if not (content is None or isinstance(content, str | list) or (isinstance(content, dict) and "text" in content)):
        raise NoCompletion(f"its reply is no chat completion but {quoted(reply)}")
    finish = choice.get("finish_reason")
    finish = finish.get("type") if isinstance(finish, dict) else finish
    if finish in ("error", "abort"):
        raise NoCompletion(f"ended by {finish}, {quoted(reply)}", passing=True, empty=True)
    finish = str(finish).casefold() if finish is not None else None
    finish = next((name for name, others in _FINISHES.items() if finish in others), finish)
    usage = reply.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    model = reply.get("model")
    reasoning, text = _parts(content)
    reasoning = reasoning or "".join(_parts(message.get("reasoning_content") or message.get("reasoning")))
    text = text or _parts(message.get("refusal"))[1] or _parts(choice.get("text"))[1]
    if reasoning and "<think>" not in text:
        text = f"<think>{reasoning}" + (f"</think>{text}" if text or finish != "length" else "")
    said = quoted(choice.get("content_filter_results") or "") if finish == "content_filter" else ""
    if not text and (calls := message.get("tool_calls") or message.get("function_call")):
        said = f"called a tool, {quoted(calls)}"
    return Completion(
        text=text,
        finish=finish,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
        model=model if isinstance(model, str) else None,
        said=said,
    )


def _is_passing(error: object) -> bool:
    """Whether an error without a number says that it may be gone at the next attempt."""
    named = " ".join(str(error.get(name)) for name in ("code", "type")) if isinstance(error, dict) else ""
    return bool(re.search(r"overload|rate_?limit|time_?out|unavailable|server_?error", named, re.IGNORECASE))


def is_filter(error: object) -> bool:
    """Whether an error's body says that a filter of the service took offence at this one request."""
    if not isinstance(error, dict):
        return False
    named = " ".join(str(error.get(name)) for name in ("code", "type", "metadata", "innererror")).casefold()
    return any(part in named for part in _FILTERS)


def _parts(content: object) -> tuple[str, str]:
    """Reasoning and text of a message's content, which is a text, or a list of parts."""
    if isinstance(content, str):
        return "", content
    reasoning = text = ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            text += part
        elif isinstance(part, dict):
            thought = part.get("thinking") or part.get("reasoning")
            reasoning += "".join(_parts(thought)) if thought else ""
            said = part.get("text")
            text += said if isinstance(said, str) else _parts(said.get("value"))[1] if isinstance(said, dict) else ""
    return reasoning, text


def _count(value: object) -> int | None:
    """A number of tokens, which some servers give as a text; None for anything else."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def quoted(content: object) -> str:
    """Something of a server's in one line that is not too long, without the key, which some servers repeat."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    if (key := api_key()) != NO_KEY:
        text = text.replace(key, "…")
    return " ".join(text.split())[:300]


def reason_of(error: openai.APIError) -> str:
    """What the server or the network said, in one line."""
    text = str(error.__cause__ or error)
    if " - " not in text and error.body:  # the client shows a message of the usual form only
        text += f" - {error.body}"
    return quoted(text)
