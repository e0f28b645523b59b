"""Evaluation through a real HTTP server on this machine that answers by looking into the request, fails and dies."""

import asyncio
import base64
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import own_port
from PIL import Image

import medr1.evaluation.remote as module
from medr1.cli import main
from medr1.data.images import load_image
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import build_messages
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.metrics import summarise
from medr1.evaluation.remote import evaluate_remote, token_totals
from medr1.evaluation.scoring import score
from medr1.policy.client import NoCompletion, at_once, read_completion, run_async
from medr1.processes import Interrupts, heed_interrupts

MODEL = "org/big@72b"
Fault = tuple[int, Any, dict[str, str]]
"""Status, JSON (or a plain string) and headers that a request gets instead of its answer."""


class Server(ThreadingHTTPServer):
    """Answers B where the image's red value is an odd multiple of 40 and A otherwise, as a chat completion."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.fault: Callable[[int], Fault | None] = lambda number: None
        """Called with the request's number, from 1; may also wait, or stop the server."""
        self.change: dict[str, Any] = {}
        """Replaces parts of a completion: "choice", "message", "usage"."""
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def name(self) -> str:
        return f"openai:{MODEL}@{self.url}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing to print: the connection closes, and whoever asked sees it."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        pictures = images_of(body)
        letter = "AB"[pictures[0].getpixel((0, 0))[0] // 40 % 2] if pictures else "A"
        message = {"role": "assistant", "content": f"<answer>{letter}</answer>"} | self.change.get("message", {})
        choice = {"index": 0, "message": message, "finish_reason": "stop"} | self.change.get("choice", {})
        usage = {"prompt_tokens": len(text_of(body)), "completion_tokens": 3, "total_tokens": 0}
        completion = {"id": "1", "object": "chat.completion", "created": 1, "model": f"{MODEL}-2026"}
        return {**completion, "choices": [choice], "usage": self.change.get("usage", usage)}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        models = [{"id": name, "object": "model", "created": 1, "owned_by": "me"} for name in ("small", "smaller")]
        self.send(200, {"object": "list", "data": models}, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            number = len(self.server.asked)
        self.send(*(self.server.fault(number) or (200, self.server.answer(body), {})))

    def send(self, status: int, payload: Any, headers: dict[str, str]) -> None:
        content = payload if isinstance(payload, str) else json.dumps(payload)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content.encode())), **headers}
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *arguments: object) -> None:
        pass


def text_of(body: dict[str, Any]) -> str:
    (turn,) = body["messages"]
    (text,) = (part["text"] for part in turn["content"] if part["type"] == "text")
    return text


def images_of(body: dict[str, Any]) -> list[Image.Image]:
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))) for url in urls]


@pytest.fixture(autouse=True)
def environment(local_servers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RETRIES", 0)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Eight questions; the right option is always the first. The fourth has two images."""
    (tmp_path / "data").mkdir()
    records = []
    for number in range(8):
        path = tmp_path / "data" / f"{number}.png"
        image = Image.new("RGB", (6, 5), (40 * (number % 6), 0, 90))
        image.putpixel((5, 4), (255, number, 0))
        image.save(path)
        records.append(
            Record(
                id=f"r{number}",
                images=(path, records[0].images[0]) if number == 3 else (path,),
                question="Which finding" + " really" * number + "?",
                options=("Cyst", "Tumour"),
                answer="A",
                modality=("CT", "OCT")[number % 2],
                question_type="Disease Diagnosis",
                source="made",
                group=f"g{number}",
            )
        )
    return records


def run(server: Server, records: list[Record], out: Path, **settings: Any) -> list[dict[str, Any]]:
    return evaluate_remote(server.name, records, mode="no-think", out=out, **settings)


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def by_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(without_time(rows), key=lambda row: row["id"])


def fails(server: Server, records: list[Record], out: Path, **settings: Any) -> str:
    """The one line that a failed evaluation ends with."""
    with pytest.raises(MedR1Error) as error:
        run(server, records, out, **settings)
    line = str(error.value)
    assert line.startswith(f"{server.url}: ") and "\n" not in line
    assert line.endswith("; the same command goes on from the rows that are written")
    return line


def test_the_model_is_asked_as_our_own_and_the_row_is_ours(server: Server, records: list[Record], tmp_path: Path):
    rows = run(server, records, tmp_path / "run.jsonl", max_new_tokens=77)
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert by_id(read_jsonl(tmp_path / "run.jsonl")) == by_id(rows)
    assert without_time(rows)[1] == {
        "key": rows[1]["key"],
        "id": "r1",
        "modality": "OCT",
        "question_type": "Disease Diagnosis",
        "source": "made",
        "group": "g1",
        "images": ["data/1.png"],
        "question": "Which finding really?",
        "options": ["Cyst", "Tumour"],
        "gold": "A",
        "chance": 0.5,
        "model": MODEL,
        "condition": "image",
        "mode": "no-think",
        "max_new_tokens": 77,
        "reply": "<answer>B</answer>",
        "finish": "stop",
        "tokens": 3,
        "prompt_tokens": len("Which finding really?\nA) Cyst\nB) Tumour\n\nWrite one option inside <answer></answer>."),
        "served_model": f"{MODEL}-2026",
        "outcome": "letter",
        "letter": "B",
        "correct": False,
        "format_ok": True,
        "extractor_version": rows[1]["extractor_version"],
    }
    asked = {text_of(body): body for body in server.asked}
    for record in records:
        content = build_messages(record, "no-think")[0]["content"]
        body = asked[content[-1]["text"]]
        assert {name: value for name, value in body.items() if name != "messages"} == {
            "model": MODEL,
            "temperature": 0,
            "max_tokens": 77,
        }
        (turn,) = body["messages"]
        assert turn["role"] == "user"
        assert [part["type"] for part in turn["content"]] == ["image_url"] * len(record.images) + ["text"]
        for sent, path in zip(images_of(body), record.images, strict=True):
            assert sent.mode == "RGB" and sent.tobytes() == load_image(path).tobytes()
        assert "png" not in text_of(body) and record.id not in json.dumps(turn["content"][-1])
    assert server.keys == {"Bearer EMPTY"}
    assert summarise(rows)["accuracy"] == 0.5


def test_controls_change_what_is_sent(server: Server, records: list[Record], tmp_path: Path):
    def sent(condition: str) -> list[dict[str, Any]]:
        server.asked = []
        run(server, records, tmp_path / f"{condition}.jsonl", condition=condition)
        return sorted(server.asked, key=lambda body: text_of(body).count("really"))

    plain = sent("image")
    assert all(len(image.getcolors()) == 1 for body in sent("blank") for image in images_of(body))
    assert all(not images_of(body) for body in sent("no_image"))
    permuted = sent("permuted")
    assert all("A) Tumour\nB) Cyst" in text_of(body) for body in permuted)
    assert [images_of(body)[0].tobytes() for body in permuted] == [images_of(body)[0].tobytes() for body in plain]
    rows = read_jsonl(tmp_path / "permuted.jsonl")
    assert {(row["gold"], row["condition"]) for row in rows} == {("B", "permuted")}


def test_images_are_sent_within_the_recipes_limit(server: Server, records: list[Record], tmp_path: Path):
    """Services refuse large ones. What was sent otherwise is another answer, and small images are left as they are."""
    large = tmp_path / "data" / "large.png"
    Image.new("RGB", (400, 100), (90, 0, 0)).save(large)
    records = [records[0], records[1].model_copy(update={"images": (large, *records[1].images)})]
    whole = run(server, records, tmp_path / "whole.jsonl")
    assert sorted(image.size for body in server.asked for image in images_of(body)) == [(6, 5), (6, 5), (400, 100)]
    server.asked = []
    rows = run(server, records, tmp_path / "run.jsonl", max_pixels=10_000)
    assert sorted(image.size for body in server.asked for image in images_of(body)) == [(6, 5), (6, 5), (200, 50)]
    assert not {row["key"] for row in rows} & {row["key"] for row in whole}


def test_many_at_a_time_give_the_rows_of_one_at_a_time(server: Server, records: list[Record], tmp_path: Path):
    alone = run(server, records, tmp_path / "alone.jsonl", concurrency=1)
    assert without_time(read_jsonl(tmp_path / "alone.jsonl")) == without_time(alone)
    together = threading.Barrier(4)  # passes when four requests are there at once
    under_way, most = 0, 0

    def fault(number: int) -> None:
        nonlocal under_way, most
        with server.lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(timeout=120)
        with server.lock:
            under_way -= 1

    server.fault = fault
    assert without_time(run(server, records, tmp_path / "four.jsonl", concurrency=4)) == without_time(alone)
    assert most == 4
    assert by_id(read_jsonl(tmp_path / "four.jsonl")) == by_id(alone)


def test_a_passing_failure_is_tried_again(
    server: Server, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MAX_RETRIES", 2)
    soon = {"retry-after-ms": "1"}
    faults = {2: (500, {"error": {"message": "CUDA"}}, soon), 3: (503, "busy", soon), 5: (429, {}, soon)}
    server.fault = faults.get
    rows = run(server, records, tmp_path / "run.jsonl", concurrency=1)
    assert len(server.asked) == 8 + 3
    assert len(rows) == len(read_jsonl(tmp_path / "run.jsonl")) == 8


def test_a_server_that_dies_and_comes_back(server: Server, records: list[Record], tmp_path: Path):
    whole = run(server, records, tmp_path / "whole.jsonl")
    dying = Server(port=own_port())

    def die(number: int) -> None:
        if number == 4:
            dying.stop()
            raise ConnectionAbortedError  # the connection closes without a reply

    dying.fault = die
    out = tmp_path / "run.jsonl"
    line = fails(dying, records, out, concurrency=1)
    assert "cannot be reached" in line and "start the server or mend the URL" in line
    assert by_id(read_jsonl(out)) == by_id(whole)[:3]
    assert "cannot be reached" in fails(dying, records, out)  # still down
    back = Server(port=dying.server_port)
    assert without_time(run(back, records, out, concurrency=1)) == without_time(whole)
    assert len(back.asked) == 5
    assert without_time(run(back, records, out)) == without_time(whole)  # complete: the server is not asked
    assert len(back.asked) == 5
    back.stop()


SECRET = "sk-secret-1"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ((401, {"error": {"message": f"no such key:\n{SECRET}"}}, {}), "refuses the key (Error code: 401 - no such"),
        ((403, {"error": {"message": "not in your country"}}, {}), "refuses the key (Error code: 403"),
        ((404, {"error": {"message": "unknown"}}, {}), f"no model {MODEL} there (Error code: 404 - unknown); it off"),
        ((400, {"error": {"message": "image too large"}}, {}), "refuses record r2 (Error code: 400 - image too large)"),
        ((400, {"object": "error", "message": "too long"}, {}), "refuses record r2 (Error code: 400 - too long)"),
        ((413, "<html>\nToo Large</html>", {"Content-Type": "text/html"}), "r2 (Error code: 413 - <html> Too Large"),
        ((422, {"detail": [{"loc": ["max_tokens"]}]}, {}), "refuses record r2 (Error code: 422 - {'detail': [{'loc"),
        ((429, {"error": {"message": "quota"}}, {}), "takes no more requests (Error code: 429 - quota); lower --conc"),
        ((500, {"error": {"message": "CUDA"}}, {}), "fails at record r2 (Error code: 500 - CUDA); look into the serv"),
        ((200, "<html>It works!</html>", {"Content-Type": "text/html"}), "but <html>It works!</html>; mend"),
        ((200, '{"choices": [', {}), "its reply is no chat completion"),
        ((200, {"error": "no provider"}, {}), "refuses record r2 (no provider)"),
        ((200, {"error": {"message": "length exceeded", "code": 400}}, {}), "refuses record r2 (length exceeded)"),
        ((200, {"error": {"message": "overloaded", "code": 503}}, {}), "fails at record r2 (overloaded); look into"),
        ((200, {"choices": [{"error": {"message": "no GPU"}, "finish_reason": "error"}]}, {}), "record r2 (no GPU)"),
        ((200, "data: {}\n\ndata: [DONE]", {"Content-Type": "text/event-stream"}), "it streams its replies, though"),
        ((200, {"choices": [{}]}, {}), "its reply is no chat completion"),
        ((200, [], {}), "its reply is no chat completion"),
    ],
)  # fmt: skip
def test_what_a_server_refuses(
    server: Server,
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    expected: str,
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.fault = {3: fault}.get
    out = tmp_path / "run.jsonl"
    line = fails(server, records, out, concurrency=1)
    assert expected in line and SECRET not in line
    assert [row["id"] for row in read_jsonl(out)] == ["r0", "r1"]
    server.fault = lambda number: None
    assert len(run(server, records, out)) == 8


NEW_NAME = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


@pytest.mark.parametrize(
    "said",
    [
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
        "litellm.UnsupportedParamsError: these models don't support temperature=0. Only temperature=1 is supported.",
        "`temperature` is deprecated for this model.",
        "invalid temperature: only 1 is allowed for this model",
        "`temperature` must be strictly positive",
        "Unsupported parameter: 'temperature' is not supported with this model.",
        "`temperature` may only be set to 1 when thinking is enabled or in adaptive mode. Please consult our docs",
    ],
)
@pytest.mark.parametrize(("status", "concurrency"), [(400, 1), (400, 4), (200, 4)])
def test_services_that_name_the_limit_otherwise_and_sample_by_their_own(
    server: Server,
    records: list[Record],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    said: str,
    status: int,
    concurrency: int,
):
    """Each refusal is heeded once, whatever is under way beside it, and what is sampled is told."""

    def fault(number: int) -> Fault | None:
        body = server.asked[number - 1]
        wrong = NEW_NAME if "max_tokens" in body else said if "temperature" in body else ""
        return (status, {"error": {"message": wrong}}, {}) if wrong else None

    server.fault = fault
    rows = run(server, records, tmp_path / "run.jsonl", concurrency=concurrency, max_new_tokens=77)
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert all(row["sampled"] for row in rows)
    assert 8 + 2 <= len(server.asked) <= 8 + 2 * concurrency
    assert server.asked[-1].keys() - {"messages"} == {"model", "max_completion_tokens"}
    assert "takes no temperature, so that 8 of 8 replies were sampled" in " ".join(capfd.readouterr().err.split())


def test_an_unknown_model_where_the_server_lists_none(
    server: Server, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server.fault = lambda number: (404, {"detail": "Not Found"}, {})
    assert "it offers small, smaller;" in fails(server, records, tmp_path / "run.jsonl")
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.send(404, {"detail": "Not Found"}, {}))
    assert "mend the URL, most end in /v1;" in fails(server, records, tmp_path / "run.jsonl")


def test_a_silent_server(server: Server, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    over = threading.Event()
    server.fault = lambda number: over.wait(120) and None
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    line = fails(server, records[:2], tmp_path / "run.jsonl")
    over.set()
    assert "no reply within 0.2 seconds, 1 times; see whether the server works, or lower --concurrency" in line


def test_the_key_is_sent_and_nowhere_else(
    server: Server,
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")  # as `$(cat key)` in quotes may leave it
    run(server, records, tmp_path / "run.jsonl")
    assert server.keys == {f"Bearer {SECRET}"}
    assert SECRET not in (tmp_path / "run.jsonl").read_text()
    assert caplog.records and SECRET not in caplog.text
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(MedR1Error, match="OPENAI_API_KEY: holds a character") as error:
        run(server, records, tmp_path / "other.jsonl")
    assert "secret" not in str(error.value)


def test_a_key_that_a_server_repeats_is_in_no_row_and_no_line(
    server: Server, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    taken = {"message": f"not for {SECRET}", "code": "content_filter"}
    faults = {
        1: (400, {"error": taken}, {}),
        2: (200, {"error": taken}, {}),
        3: (200, {"choices": [], "to": SECRET}, {}),
    }
    server.fault = faults.get
    rows = run(server, records, tmp_path / "run.jsonl", concurrency=1)
    assert [row["id"] for row in rows if "server_said" in row] == ["r0", "r1", "r2"]
    assert SECRET not in (tmp_path / "run.jsonl").read_text()
    for length in (272, 276):  # a line that is cut off within the key
        server.fault = lambda number, words="x" * length + SECRET: (400, {"error": {"message": words}}, {})
        assert SECRET[:4] not in fails(server, records[:1], tmp_path / "cut.jsonl")


def test_a_server_of_several_models_or_of_little_room_is_told(
    server: Server, records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """vLLM fits a reply into what an image leaves of its --max-model-len, and says only that it was cut."""
    run(server, records[:4], tmp_path / "run.jsonl", max_new_tokens=3)
    server.change = {"choice": {"finish_reason": "length"}}
    run(server, records[:4], tmp_path / "cut.jsonl", max_new_tokens=3)
    assert "of several models" not in (said := capsys.readouterr().err) and "were cut" not in said
    run(server, records[:6], tmp_path / "room.jsonl", max_new_tokens=4)
    assert "6 of 6 replies were cut before --max-new-tokens = 4" in (said := capsys.readouterr().err)
    assert "record r0's after 3" in said
    answer = server.answer
    server.answer = lambda body: answer(body) | {"model": "another"}  # type: ignore[method-assign]
    run(server, records, tmp_path / "run.jsonl", max_new_tokens=3)
    assert f"of several models by the server's word: {MODEL}-2026 (4), another (4)" in capsys.readouterr().err


def test_replies_as_servers_give_them(
    server: Server, records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def reply(**change: Any) -> dict[str, Any]:
        server.change = change
        out = tmp_path / "run.jsonl"
        out.unlink(missing_ok=True)
        (row,) = run(server, records[:1], out)
        assert without_time(read_jsonl(out)) == without_time([row])
        return row

    cut = reply(choice={"finish_reason": "length"}, message={"content": "<think>The ring"})
    assert (cut["finish"], cut["outcome"], summarise([cut])["truncated"]) == ("length", "truncated", 1)
    assert token_totals([cut, cut]) == {"prompt_tokens": 2 * cut["prompt_tokens"], "completion_tokens": 6}
    uncounted = reply(usage=None)
    assert (uncounted["tokens"], uncounted["prompt_tokens"]) == (None, None)
    assert token_totals([cut, uncounted]) == {"prompt_tokens": None, "completion_tokens": None}
    refused = reply(message={"content": None, "refusal": "I'm sorry, but I can't help with that."})
    assert (refused["outcome"], refused["correct"]) == ("refusal", False)
    filtered = reply(choice={"finish_reason": "content_filter"}, message={"content": None})
    assert (filtered["reply"], filtered["finish"], filtered["correct"]) == ("", "content_filter", False)
    assert filtered["outcome"] == "refusal"
    spent = reply(choice={"finish_reason": "length"}, message={"content": None})  # on reasoning that is not shown
    assert (spent["reply"], spent["outcome"], spent["correct"]) == ("", "truncated", False)
    assert "1 of 1 replies are empty and were cut" in " ".join(capsys.readouterr().err.split())
    assert reply(message={"content": "A half \ud83d"}, choice={"finish_reason": "\ud83d"})["reply"] == "A half ?"
    assert reply(message={"content": None, "refusal": "No \ud83d"}, choice={"finish_reason": "content_filter"})


@pytest.mark.parametrize(
    ("message", "finish", "reply"),
    [
        ({"content": [{"type": "text", "text": "<answer>B"}, {"text": "</answer>"}]}, "stop", "<answer>B</answer>"),
        ({"content": ["<answer>B</answer>"]}, "stop", "<answer>B</answer>"),
        ({"content": [{"type": "output_text", "text": "B"}, {"type": "image"}, None, 3]}, "stop", "B"),
        ({"content": "B", "reasoning_content": "dark"}, "stop", "<think>dark</think>B"),
        ({"content": "B", "reasoning": "dark"}, "stop", "<think>dark</think>B"),
        ({"content": [{"thinking": [{"text": "dark"}]}, {"text": "B"}]}, "stop", "<think>dark</think>B"),
        ({"content": "<think>dark</think>B", "reasoning_content": "dark"}, "stop", "<think>dark</think>B"),
        ({"content": None, "reasoning_content": "dark and"}, "length", "<think>dark and"),
        ({"content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}, "tool_calls", ""),
        ({"content": {"type": "text", "text": "B"}}, "stop", "B"),
        ({"content": [{"type": "text", "text": {"value": "B"}}]}, "stop", "B"),
        ({"content": None}, "stop", ""),
        ({}, None, ""),
    ],
)  # fmt: skip
def test_a_reply_in_every_dialect(message: dict[str, Any], finish: str | None, reply: str):
    body = {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish}], "model": 7}
    completion = read_completion(json.dumps(body))
    assert (completion.text, completion.finish, completion.model) == (reply, finish, None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[" * 100_000, "no chat completion"),
        ("", "no chat completion but nothing"),
        ("[]", "no chat completion but []"),
        ("null", "no chat completion but null"),
        ("<html>sign in</html>", "sign in"),
        (": ping\n\ndata: {}", "streams"),
        ("event: x\ndata: {}", "streams"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"message": "model is loading"}', "model is loading"),
        ('{"choices": null, "base_resp": {"status_msg": "login fails"}}', "login fails"),
        ('{"choices": {"message": {}}}', "no chat completion"),
        ('{"choices": [{"message": {"content": {"answer": "B"}}}]}', '"answer": "B"'),
        ('{"choices": [{"message": {"content": 5}}]}', "no chat completion"),
        ('{"object": "error", "message": "context too long", "code": 400}', "context too long"),
    ],
)
def test_a_body_without_a_reply_is_quoted(body: str, words: str):
    with pytest.raises(NoCompletion, match=re.escape(words)) as raised:
        read_completion(body)
    assert not raised.value.passing


def test_what_a_server_says_beside_a_reply():
    def read(choice: dict[str, Any]) -> Any:
        return read_completion(json.dumps({"choices": [{"message": {"content": "B"}, **choice}]}))

    assert read({"finish_reason": {"type": "length", "length": 5}}).finish == "length"
    for finish in ("error", "abort"):
        for message in ({"content": None}, {"content": "B"}):
            with pytest.raises(NoCompletion, match=f"ended by {finish}") as raised:
                read({"finish_reason": finish, "message": message})
            assert raised.value.passing and raised.value.empty
    called = read({"message": {"content": None, "tool_calls": [{"function": {"name": "look"}}]}})
    assert "called a tool" in called.said and "look" in called.said
    for code in ("server_overloaded", 503, "429"):
        with pytest.raises(NoCompletion, match="busy") as raised:
            read_completion(json.dumps({"error": {"message": "busy", "code": code}}))
        assert raised.value.passing
    assert read_completion("\ufeff" + json.dumps({"choices": [{"message": {"content": "B"}}]})).text == "B"


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": "5", "completion_tokens": 3}, (5, 3)),
        ({"prompt_tokens": "five", "completion_tokens": -1}, (None, None)),
        ({"prompt_tokens": True, "completion_tokens": 1.5}, (None, None)),
        ({}, (None, None)),
        (None, (None, None)),
        ("none", (None, None)),
        ([], (None, None)),
    ],
)
def test_a_count_of_tokens_that_is_none(usage: Any, tokens: tuple[int | None, int | None]):
    completion = read_completion(json.dumps({"choices": [{"message": {"content": "B"}}], "usage": usage}))
    assert (completion.prompt_tokens, completion.completion_tokens) == tokens
    row = {"prompt_tokens": "5", "tokens": 3}  # as an earlier version wrote it
    assert token_totals([row, row]) == {"prompt_tokens": None, "completion_tokens": 6}


@pytest.mark.parametrize(
    ("said", "finish"),
    [("max_tokens", "length"), ("MAX_TOKENS", "length"), ("eos", "stop"), ("SAFETY", "content_filter"), ("odd", "odd")],
)
def test_words_for_an_end(said: str, finish: str):
    body = {"choices": [{"message": {"content": "B"}, "finish_reason": said}]}
    assert read_completion(json.dumps(body)).finish == finish


@pytest.mark.parametrize(
    "fault",
    [
        (200, {"choices": [{"message": None, "finish_reason": "content_filter"}]}, {}),
        (200, {"error": {"message": "harmful", "code": "content_filter"}}, {}),
        (400, {"error": {"message": "harmful", "code": "content_filter", "innererror": {}}}, {}),
        (403, {"error": {"message": "harmful", "metadata": {"reasons": ["x"], "flagged_input": "y"}}}, {}),
    ],
)
def test_a_filter_ends_a_record_and_not_the_run(server: Server, records: list[Record], tmp_path: Path, fault: Fault):
    server.fault = {3: fault}.get
    rows = run(server, records, tmp_path / "run.jsonl", concurrency=1)
    assert len(rows) == 8 and len(server.asked) == 8
    (taken,) = [row for row in rows if row["finish"] == "content_filter"]
    assert (taken["id"], taken["outcome"], taken["correct"], taken["reply"]) == ("r2", "refusal", False, "")
    assert fault[1].get("choices") or "harmful" in taken["server_said"]
    assert score(rows) == rows
    assert len(run(server, records, tmp_path / "run.jsonl")) == 8 and len(server.asked) == 8


def test_a_server_without_a_choice(server: Server, records: list[Record], tmp_path: Path):
    """One record of eight, also the first, gets a row; a server that never has one is told of, soon."""
    empty = (200, {"choices": [], "note": "busy elsewhere"}, {})
    for number in (1, 8):
        server.asked.clear()
        server.fault = {number: empty}.get
        rows = run(server, records, tmp_path / f"{number}.jsonl", concurrency=1)
        (silent,) = [row for row in rows if row["finish"] == "empty"]
        assert (silent["id"], silent["outcome"], silent["reply"]) == (f"r{number - 1}", "unparsed", "")
        assert "busy elsewhere" in silent["server_said"]
    server.asked.clear()
    server.fault = lambda number: empty
    line = fails(server, records, tmp_path / "never.jsonl", concurrency=1)
    assert "answers nothing at record r0 (no choice in its reply" in line and "busy elsewhere" in line
    assert len(server.asked) == 3


def test_a_server_that_falls_silent_leaves_no_rows_without_a_reply(
    server: Server, records: list[Record], tmp_path: Path
):
    """Whether it answered earlier in this session or in one before, it is asked again for what it has answered."""
    out, empty = tmp_path / "run.jsonl", (200, {"choices": []}, {})
    server.fault = lambda number: empty if number > 2 else None
    assert "answers nothing at record r2" in fails(server, records, out, concurrency=1)
    assert len(server.asked) == 2 + 3 + 1
    assert "answers nothing at record r2" in fails(server, records, out, concurrency=1)
    assert [row["finish"] for row in read_jsonl(out)] == ["stop"] * 2
    server.fault = lambda number: None
    assert {row["finish"] for row in run(server, records, out)} == {"stop"}


def test_a_passing_fault_in_a_reply_of_status_200(
    server: Server, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MAX_RETRIES", 2)
    faults = {1: (200, {"choices": []}, {}), 2: (200, {"error": {"message": "overloaded", "code": "503"}}, {})}
    server.fault = faults.get
    (row,) = run(server, records[:1], tmp_path / "run.jsonl")
    assert row["reply"].startswith("<answer>") and len(server.asked) == 3


def test_rows_follow_the_model_and_not_the_address(server: Server, records: list[Record], tmp_path: Path):
    out = tmp_path / "run.jsonl"
    rows = run(server, records[:4], out)
    moved = Server()
    assert without_time(run(moved, records, out))[:4] == without_time(rows)
    assert len(moved.asked) == 4
    moved.stop()
    for changed in ({"max_new_tokens": 9}, {"condition": "blank"}):
        with pytest.raises(MedR1Error, match="holds 8 rows of another model, setting or data"):
            run(server, records, out, **changed)
    with pytest.raises(MedR1Error, match="holds 8 rows"):
        evaluate_remote(f"openai:other@{server.url}", records, mode="no-think", out=out)
    assert len(read_jsonl(out)) == 8


def test_a_bad_image_stops_before_anything_is_sent(server: Server, records: list[Record], tmp_path: Path):
    records[2].images[0].write_bytes(b"no picture")
    with pytest.raises(MedR1Error, match=r"record r2: .*2\.png"):
        run(server, records, tmp_path / "run.jsonl")
    assert not server.asked


@pytest.mark.parametrize(
    "name",
    [
        "openai:big",
        "openai:big@localhost:8000",
        "openai:@http://h/v1",
        "openai:big@http://",
        "openai:big@http://h:99999",
    ],
)
def test_a_malformed_name(records: list[Record], tmp_path: Path, name: str):
    with pytest.raises(MedR1Error, match="is not openai:MODEL@URL; write it like openai:Qwen") as error:
        evaluate_remote(name, records, mode="think", out=tmp_path / "run.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", [f"http://me:{SECRET}@h/v1", f"https://h/v1?key={SECRET}"])
def test_a_secret_in_the_url_is_refused_unsaid(records: list[Record], tmp_path: Path, url: str):
    with pytest.raises(MedR1Error, match="set OPENAI_API_KEY") as error:
        evaluate_remote(f"openai:big@{url}", records, mode="think", out=tmp_path / "run.jsonl")
    assert SECRET not in str(error.value)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    for name in ("medr1.policy.client", "medr1.evaluation.remote"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MedR1Error, match=r"pip install 'medr1\[remote\]'"):
        __import__("medr1.evaluation.remote")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=40, seed=2)


def test_the_command(
    server: Server,
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def command(*arguments: str) -> int:
        fixed = ["medr1", "eval", "--data", str(phantoms), "--part", "all", "--out", str(tmp_path / "run.jsonl")]
        monkeypatch.setattr(sys, "argv", [*fixed, *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    assert command("--model", server.name, "--mode", "no-think", "--limit", "5", "--concurrency", "2", "--json") == 0
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert (summary["n"], summary["completion_tokens"], summary["mean_tokens"]) == (5, 15, 3.0)
    assert summary["prompt_tokens"] == sum(len(text_of(body)) for body in server.asked)
    assert f"prompt tokens: {summary['prompt_tokens']}, completion tokens: 15" in said.err
    assert command("--model", "openai:big") == 1
    assert "medr1: --model openai:big: is not openai:MODEL@URL" in capsys.readouterr().err


def test_ctrl_c_cancels_what_waits_and_is_raised_after_it(monkeypatch: pytest.MonkeyPatch):
    """Not inside the task at work, from where the event loop's end shows tracebacks of the others. That it was pressed
    is known to the command line, which thus knows what an error is that a library makes of it, and a second one.
    """
    monkeypatch.setattr(Interrupts, "pressed", False)
    saw: list[str] = []

    async def work() -> None:
        try:
            if len(saw) == 1:  # the first waits, as for a reply
                os.kill(os.getpid(), signal.SIGINT)
                saw.append("at work")
            saw.append("waits")
            await asyncio.sleep(120)
        except BaseException as error:
            saw.append(type(error).__name__)
            raise

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        heed_interrupts()
        ours = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run_async(at_once(work, 2))
        assert signal.getsignal(signal.SIGINT) is ours and Interrupts.pressed
    finally:
        signal.signal(signal.SIGINT, before)
    assert saw == ["waits", "at work", "waits", "CancelledError", "CancelledError"]


def test_ctrl_c_leaves_whole_rows_and_the_same_command_goes_on(
    server: Server, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A real process, interrupted while requests are under way."""
    out = tmp_path / "run.jsonl"
    command = [
        sys.executable, "-m", "medr1", "eval", "--model", server.name, "--data", str(phantoms), "--part", "all",
        "--mode", "no-think", "--limit", "6", "--concurrency", "2", "--out", str(out),
    ]  # fmt: skip
    source = Path(__file__).parents[1] / "src"
    stuck, over = threading.Barrier(3), threading.Event()

    def fault(number: int) -> None:
        if number > 3:
            stuck.wait(timeout=120)
            over.wait(timeout=120)

    server.fault = fault
    process = subprocess.Popen(
        command,
        cwd=source,
        env=os.environ,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a job in the background ignores it
    )
    stuck.wait(timeout=120)  # both requests are under way, three are answered
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    over.set()
    assert process.returncode == 130, said
    assert "Traceback" not in said and "stopped; the same command goes on" in said
    assert len(read_jsonl(out)) == 3 and out.read_bytes().endswith(b"\n")
    server.fault = lambda number: None
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and len(read_jsonl(out)) == 6
    assert len(server.asked) == 3 + 2 + 3
