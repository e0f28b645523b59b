"""The app in a real browser and over its API: ask, stream, compare, save; what is refused; what never happens."""

import contextlib
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import medr1.ask.app
from medr1 import NOTICE

pytest.importorskip("gradio", reason="needs the extra medr1[app]")

from medr1.ask.app import Gate, running

ANSWERED = "document.querySelector('#said').innerText.startsWith('Answered')"
WATCH = """() => {
  window.texts = [];
  new MutationObserver(() => {
    const reply = document.querySelector("#answers .said")?.textContent;
    if (reply && reply !== texts.at(-1)) texts.push(reply);
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(["tiny", "tiny"], max_new_tokens=40, max_upload_mb=1, requests_per_minute=10_000) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir()
        yield address
    assert not folder.exists()  # uploads went with it


@pytest.fixture
def page(browser: Any, url: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The app, opened; any request to another host, any error on the page, fails the test."""
    page = browser.new_page(viewport={"width": getattr(request, "param", 1280), "height": 844})
    page.set_default_timeout(120_000)
    outside: list[str] = []
    faults: list[str] = []
    page.on(
        "request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else outside.append(asked.url)
    )
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#ask")
    yield page
    page.close()
    assert outside == [] and faults == []


def picture(path: Path, size: tuple[int, int] = (120, 90)) -> Path:
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_upload_ask_stream_compare_heatmap_save(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, ask = threading.Event(), medr1.ask.app.ask

    def slow(*asked: Any, on_update: Any, **settings: Any) -> None:
        """Writes on once its first words are on the page."""

        def update(case: Any) -> None:
            on_update(case)
            assert not case.reply or seen.wait(120)

        ask(*asked, on_update=update, **settings)

    monkeypatch.setattr(medr1.ask.app, "ask", slow)
    width = page.viewport_size["width"]
    page.set_input_files("#files input[type=file]", picture(tmp_path / "Jane Doe.png"))
    page.wait_for_selector("#pictures img")
    page.get_by_label("Question").fill("Which modality made this image?")
    page.get_by_label(re.compile("Options, one a line")).fill("CT\nMRI\n\n<b>X</b>-Ray")
    page.evaluate(WATCH)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function("texts.length")
    seen.set()
    page.wait_for_function(ANSWERED)
    texts = page.evaluate("texts")
    assert len(texts) > 1 and texts[1].startswith(texts[0])  # it was seen to grow

    cards = page.locator("#answers article")
    assert cards.count() == 2
    assert cards.first.inner_text() == cards.last.inner_text()  # one model twice: all of it is deterministic
    assert "<b>X</b>-Ray" in cards.first.inner_text()
    assert "phantoms only" in cards.first.locator("div.void").inner_text()
    percents = re.findall(r"([\d.]+) %", cards.first.locator(".bars").inner_text())
    assert len(percents) == 3 and sum(map(float, percents)) == pytest.approx(100, abs=0.2)
    votes = cards.first.locator(".bars tbody td:last-child").all_inner_texts()
    assert sum(map(int, votes)) == 8
    assert cards.first.locator("figure img").count() == cards.first.locator(".answer:not(.none)").count()

    notice = page.locator("#notice")
    page.mouse.wheel(0, 4000)
    page.wait_for_timeout(200)
    assert NOTICE in notice.inner_text() and notice.bounding_box()["y"] == 0  # in view wherever one scrolls
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    with page.expect_download() as download:
        page.get_by_role("button", name="Save this case as a page").click()
    saved = Path(download.value.path()).read_text()
    assert saved.count('class="case"') == 2 and "Jane" not in saved and NOTICE in saved


def test_everything_can_be_reached_and_is_named(page: Any) -> None:
    """By keyboard alone an example is chosen and asked; all controls have names; texts have contrast."""
    page.locator("#examples button").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#pictures img")
    assert page.get_by_label("Question").input_value()
    page.get_by_label("Question").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(ANSWERED)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Heatmap: what in the image speaks for the answer").wait_for()
    unnamed = page.evaluate("""() => [...document.querySelectorAll("input, textarea, button, select")]
        .filter(each => each.offsetParent && !each.ariaLabel && !each.labels?.length && !each.innerText.trim()
                && !each.title).map(each => each.outerHTML)""")
    assert unnamed == []
    assert (
        page.evaluate("[...document.images].filter(each => each.offsetParent && !each.hasAttribute('alt')).length") == 0
    )
    colours = page.evaluate("""() => ["#notice p", "#title p", "#said p", ".case h2", ".case .muted",
        ".case .void li",
        ".case .answer", ".case .bars thead th", ".case .said"].map(query => {
          const element = document.querySelector(query);
          let behind = element;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)" && behind.parentElement)
            behind = behind.parentElement;
          return [query, getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        })""")
    for query, ink, paper in colours:
        assert contrast(ink, paper) >= 4.5, (query, ink, paper)  # WCAG 2.2, 1.4.3


def contrast(ink: str, paper: str) -> float:
    """Ratio of two CSS colours by WCAG 2.2; a transparent paper is white."""

    def luminance(colour: str) -> float:
        numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
        if len(numbers) == 4 and numbers[3] == 0:
            numbers = [255, 255, 255]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (n / 255 for n in numbers[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


def bomb(path: Path) -> Path:
    """A PNG of a few kilobytes that says it has four billion pixels."""
    whole = picture(path, (8, 8)).read_bytes()
    header = (60_000).to_bytes(4) + (70_000).to_bytes(4) + whole[24:29]
    path.write_bytes(whole[:16] + header + zlib.crc32(b"IHDR" + header).to_bytes(4) + whole[33:])
    return path


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.png", b"", "is empty"),
        ("text.png", b"no picture at all", "cannot be decoded"),
        ("bomb.png", None, "limit of"),
        ("cut.dcm", bytes(128) + b"DICM" + bytes(range(40)), "cut.dcm"),
    ],
)
def test_bad_uploads_get_a_sentence(page: Any, tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    file = tmp_path / name
    bomb(file) if content is None else file.write_bytes(content)
    page.set_input_files("#files input[type=file]", file)
    alert = page.locator("#pictures [role=alert]")
    alert.wait_for()
    assert sentence in alert.inner_text() and alert.inner_text().startswith(name)
    page.get_by_label("Question").fill("What?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#answers [role=alert]").wait_for()
    shown = page.locator("#answers").inner_text()
    assert sentence in shown and "Traceback" not in shown and "/" not in shown.replace(" / ", "")


def test_stop_ends_the_model_too(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def endless(respondent: Any, record: Any, *, on_update: Any, **settings: Any) -> None:
        case = medr1.ask.ask.Case("endless", "", record, "think", 1, 0, 0, (), reply="word ")
        try:
            for _ in range(12_000):
                on_update(case)
                time.sleep(0.05)
        finally:
            ended.set()

    monkeypatch.setattr(medr1.ask.app, "ask", endless)
    page.get_by_label("Question").fill("What?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector("#answers article")
    stop = """() => {  // again where a click falls between two drawings of the page
        document.querySelector('#stop').click()
        return document.querySelector('#said').innerText.startsWith('Stopped')
    }"""
    page.wait_for_function(stop, polling=1000)
    assert ended.wait(60)


def status(url: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../../../etc/passwd",
        "%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "{folder}/../{beside}",
        "{here}",
        "http://127.0.0.1:1/",
        "https://example.org/",
    ],
)
def test_no_other_file_is_served(url: str, tmp_path: Path, path: str) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    secret = folder.parent / f"{folder.name}-beside.txt"
    secret.write_text("secret")
    try:
        code, text = status(f"{url}gradio_api/file={path.format(folder=folder, beside=secret.name, here=__file__)}")
    finally:
        secret.unlink()
    assert code in (403, 404) and "secret" not in text and "root:" not in text


def test_no_path_or_address_is_taken_for_an_upload(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may name only what was uploaded: not a file of this machine, and nothing to be fetched."""
    from gradio import blocks

    fetched: list[Any] = []

    async def fetch(*args: Any, **kwargs: Any) -> None:
        fetched.append(args)

    monkeypatch.setattr(blocks.processing_utils, "async_ssrf_protected_download", fetch)
    monkeypatch.setattr(blocks.processing_utils, "save_url_to_cache", lambda *args, **kwargs: fetched.append(args))
    for path in ("/etc/passwd", __file__, "http://example.org/a.png"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        data = {"data": [[file], "What?", "CT\nMRI", "not stated", "", "no-think", 0, False]}
        _, event = status(f"{url}gradio_api/call/ask", json.dumps(data).encode())
        _, said = status(f"{url}gradio_api/call/ask/{json.loads(event)['event_id']}")
        assert "event: error" in said and "decoded" not in said
    assert fetched == []


def test_another_sites_name_is_no_way_in(url: str) -> None:
    assert status(url)[0] == 200
    assert status(url, Host="evil.example")[0] == 400


def test_fifty_requests_at_once_wait_their_turn(url: str, tmp_path: Path) -> None:
    """None is lost, all get the same answer, and memory stays where it was after the first ones."""
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False, httpx_kwargs={"timeout": 600})  # a busy machine is no fault of the app
    file = [handle_file(picture(tmp_path / "a.png"))]

    def ask(number: int) -> Any:
        return client.submit(
            file, "Which modality made this image?", "CT\nMRI", "not stated", "", "no-think", 0, False, api_name="/ask"
        )

    def answers(number: int) -> list[str]:
        jobs = [ask(index) for index in range(number)]
        return [job.result(600)[0] for job in jobs]

    first = answers(4)
    before = psutil.Process().memory_info().rss
    said = answers(50)
    assert len(said) == 50 and set(said) == set(first) and len(set(first)) == 1
    assert "article" in said[0]
    assert psutil.Process().memory_info().rss - before < 150e6


def through(gate: Gate, method: str, path: str, client: str = "1.2.3.4", length: int | None = 10) -> Any:
    """Status, headers and body that a request gets; nothing in it waits, so no event loop is needed."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": method, "path": path, "client": (client, 1), "headers": headers}
    with pytest.raises(StopIteration):
        gate(scope, None, send).send(None)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(each.get("body", b"") for each in sent).decode()


def test_the_gate_counts_each_clients_requests_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"through"})

    now = 1000.0
    monkeypatch.setattr(medr1.ask.app, "monotonic", lambda: now)
    gate = Gate(behind, max_bytes=2_000_000, per_minute=3)
    for _ in range(3):
        code, headers, body = through(gate, "POST", "/gradio_api/queue/join")
        assert (code, body) == (200, "through")
        assert b"default-src 'self'" in headers[b"content-security-policy"]
        now += 10
    code, headers, body = through(gate, "POST", "/gradio_api/queue/join")  # at 30 s; the first is forgotten at 60 s
    assert code == 429 and json.loads(body)["detail"] == "More than 3 requests in a minute; wait 31 seconds."
    assert through(gate, "GET", "/gradio_api/queue/data")[0] == 200
    assert through(gate, "POST", "/gradio_api/upload", client="5.6.7.8")[0] == 200
    now += 31
    assert through(gate, "POST", "/gradio_api/queue/join")[0] == 200
    now += 120
    through(gate, "POST", "/gradio_api/queue/join", client="5.6.7.8")
    assert set(gate.times) == {"5.6.7.8"}  # nobody is remembered for longer

    for length in (2_000_001, None):
        code, _, body = through(gate, "POST", "/gradio_api/upload", client="9.9.9.9", length=length)
        assert code == 413 and "2 MB at most" in body
    assert through(gate, "GET", "/gradio_api/file=https://example.org/a.png")[0] == 403


def test_the_command_warns_of_an_open_door(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from medr1.cli import app

    asked: dict[str, Any] = {}

    @contextlib.contextmanager
    def fake(models: list[str], **settings: Any) -> Iterator[str]:
        asked.update(settings, models=models)
        yield "http://127.0.0.1:7860/"

    class Interrupted:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(medr1.ask.app, "running", fake)
    monkeypatch.setattr("medr1.cli.ask.threading.Event", Interrupted)
    said = CliRunner().invoke(app, ["app", "--compare", "tiny", "--host", "0.0.0.0"])
    assert asked["models"] == ["tiny", "tiny"] and asked["host"] == "0.0.0.0"
    assert "no login" in said.output
    said = CliRunner().invoke(app, ["app"])
    assert asked["host"] == "127.0.0.1" and "no login" not in said.output
