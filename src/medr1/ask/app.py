"""A page in the browser over `ask`: drop an image, ask, watch the model write, see how far to trust it.

It listens on this machine alone unless told otherwise, fetches nothing from elsewhere (the browser is forbidden to,
too), keeps uploads in a temporary folder that goes when it ends, and asks the model one question at a time.

    medr1 app --model runs/ct/model --compare Qwen/Qwen2-VL-2B-Instruct
"""

import hashlib
import html
import os
import re
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from medr1 import NOTICE
from medr1.ask.ask import Case, Respondent, ask, caption, load_respondent, modality_of, question_about
from medr1.ask.case import case_cards, case_page, picture
from medr1.data.images import Reading, file_of, read_image
from medr1.data.images.display import CT_WINDOWS
from medr1.data.images.series import in_series
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import MODES
from medr1.data.records import MODALITIES
from medr1.errors import MedR1Error

MODALITY = "Modality of the image"
LOOPBACK = ("127.0.0.1", "localhost")
KEEP_SECONDS = 1800
"""How long an upload and an answer are kept for a page that is left open."""
MAX_QUEUE, MAX_SESSIONS = 64, 64
NOT_STATED = "not stated"
AS_IN_FILE = "as the file says"
"""Of the choice of windows: none is asked for."""

CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"
)
"""What a page may load: nothing of another host, whatever Gradio or its themes would."""

SAVE = """(page) => {
  const link = Object.assign(document.createElement("a"), {
    href: URL.createObjectURL(new Blob([page], {type: "text/html"})), download: "case.html"});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
"""Hands the page of a case to the browser as a download, so that it is never a file here."""


MEND = """() => {
  const mend = () => {
    for (const outer of document.querySelectorAll("#files button:has(button)")) {
      outer.ariaLabel = outer.title = "Add files";
      const inner = outer.querySelector("button"), input = inner.querySelector("input");
      inner.disabled = true;
      inner.style.pointerEvents = "none";
      outer.onclick = event => { if (event.target !== input) input.click(); };
    }
  };
  new MutationObserver(mend).observe(document.body, {subtree: true, childList: true});
  mend();
  document.addEventListener("keydown", event => {
    if (event.key !== "Tab" || event.target.getAttribute("role") !== "combobox") return;
    event.stopPropagation();  // Gradio would open the list at any key
    event.target.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
  }, true);
}"""
"""What Gradio leaves undone: a button within a button, both without words, and a list of choices that stays open when
Tab leaves it.
"""


SHOW_ANSWER = """() => matchMedia("(max-width: 760px)").matches
  && document.getElementById("said").scrollIntoView()"""
"""On a narrow screen the answer is below the question."""


@contextmanager
def running(
    models: Sequence[str],
    *,
    calibration: Path | None = None,
    host: str = LOOPBACK[0],
    port: int | None = None,
    max_new_tokens: int = 256,
    max_upload_mb: int = 64,
    requests_per_minute: int = 60,
) -> Iterator[str]:
    """The app, listening while the block runs; its address.

    Args:
        models: one or several (see `policy.vlm.load_vlm`), shown side by side.
        calibration: of the first model (see `ask.load_respondent`).
        port: None takes the first free one from 7860.
        max_upload_mb: size limit of a request, in millions of bytes.
        requests_per_minute: limit of requests that upload, ask or save, a client address.

    Raises:
        MedR1Error: Gradio is not installed, a model cannot be loaded, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="medr1-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio puts uploads; read when it is imported and later
        try:
            import gradio
        except ImportError as error:
            raise MedR1Error("the app needs Gradio; run: pip install 'medr1[app]'") from error
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        examples = Path(folder) / "examples"
        write_phantoms(examples, num_images=len(MODALITIES), seed=0)
        respondents = [load_respondent(models[0], calibration), *map(load_respondent, models[1:])]
        page = build(respondents, examples, max_new_tokens=max_new_tokens)
        guards = [Middleware(Gate, max_bytes=max_upload_mb * 10**6, per_minute=requests_per_minute)]
        if host in LOOPBACK:  # another site's name that was pointed here is no way in
            guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK]))
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=True,
                max_file_size=max_upload_mb * 10**6,
                state_session_capacity=MAX_SESSIONS,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                pwa=False,
                mcp_server=False,
                ssr_mode=False,
                app_kwargs={"middleware": guards, "docs_url": None, "redoc_url": None, "openapi_url": None},
                theme=_theme(gradio),
                js=MEND,
                css=_style(),
            )
        except OSError as error:
            raise MedR1Error(f"port {port} on {host} cannot be listened on ({error}); choose another --port") from error
        try:
            yield url
        finally:
            page.close(verbose=False)


def build(respondents: Sequence[Respondent], examples: Path, *, max_new_tokens: int) -> Any:
    """The page as Gradio blocks.

    Args:
        examples: an OmniMedVQA folder whose first question of each image is offered.
    """
    import gradio as gr

    from medr1.data.datasets import load_records

    one_at_a_time = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def look(files: list[str] | None, selector: str) -> dict[Any, Any]:
        """The pictures, and the controls that go with them: slices, windows of a CT."""
        return show([_look(*item) for item in enumerate(_references(files, selector), start=1)], selector)

    def show(views: Sequence[View], selector: str) -> dict[Any, Any]:
        _, place, total = _place(views)
        windows = any(view.reading and _takes_windows(view.reading) for view in views)
        chosen = _selected(selector).get("window")
        return {
            pictures: "".join(view.html for view in views),
            slices: gr.update(visible=total > 1, maximum=max(total, 2), value=place),
            window: gr.update(visible=windows, value=chosen if chosen in CT_WINDOWS else AS_IN_FILE),
        }

    def arrive(files: list[str] | None, stated: str) -> dict[Any, Any]:
        """Of new files the middle, and their modality where the headers say it; what was selected was of the old."""
        views = [_look(*item) for item in enumerate(_references(files, ""), start=1)]
        found = modality_of([view.reading for view in views if view.reading])
        update = gr.update(value=found or stated, label=f"{MODALITY}{', from the DICOM header' if found else ''}")
        return show(views, "") | {modality: update, selector: ""}

    def choose(files: list[str] | None, selector: str, place: float, windowing: str) -> str:
        """The selector with the slice and the window that the controls say."""
        key, _, total = _place([_look(1, each) for each in _references(files, selector)])
        wanted = _selected(selector)
        if total > 1:
            wanted[key] = str(int(place))
        wanted.pop("window", None)
        if windowing != AS_IN_FILE:
            wanted["window"] = windowing
        return _joined(wanted)

    def answer(
        files: list[str] | None,
        question: str,
        options: str,
        modality: str,
        selector: str,
        mode: str,
        num_samples: float,
        heatmap: bool,
    ) -> Iterator[dict[Any, Any]]:
        cases: dict[int, Case] = {}
        changed, gone = threading.Event(), threading.Event()

        def work() -> None:
            record = question_about(
                _references(files, selector),
                question,
                [line.strip() for line in options.splitlines() if line.strip()],
                None if modality == NOT_STATED else modality,
            )
            for index, respondent in enumerate(respondents):

                def update(case: Case, index: int = index) -> None:
                    if gone.is_set():
                        raise InterruptedError("nobody waits for this answer any more")
                    cases[index] = case
                    changed.set()

                ask(
                    respondent,
                    record,
                    mode=mode,
                    max_new_tokens=max_new_tokens,
                    num_samples=int(num_samples),
                    heatmap=heatmap,
                    on_update=update,
                )

        began = perf_counter()
        yield {answers: "", said: _said("Reading the image …"), finished: [], save: gr.update(interactive=False)}
        future = one_at_a_time.submit(work)
        future.add_done_callback(lambda _: changed.set())
        try:
            while not future.done():
                changed.wait()
                changed.clear()
                if cases:
                    yield {answers: case_cards([*cases.values()]), said: _said("The model is writing …")}
            future.result()
        except MedR1Error as error:
            yield {answers: _fault(_without_folders(error, files)), said: _said("")}
            return
        except Exception:  # a fault of ours: Gradio logs it, and the page must not go on saying that it works
            yield {said: _said("This failed; the terminal that runs the app says why.")}
            raise
        finally:
            gone.set()
        done = [*cases.values()]
        seconds = perf_counter() - began
        yield {
            answers: case_cards(done),
            said: _said(f"Answered in {seconds:.1f} seconds."),
            finished: done,
            save: gr.update(interactive=True),
        }

    with gr.Blocks(title="Med-R1", analytics_enabled=False, delete_cache=(60, KEEP_SECONDS)) as page:
        gr.HTML(f'<p role="note">{NOTICE}</p>', elem_id="notice")
        names = " and ".join(f"<b>{html.escape(each.vlm.name)}</b>" for each in respondents)
        gr.HTML(f"<h1>Med-R1</h1><p>Ask {names} about an image.</p>", elem_id="title")
        with gr.Row(elem_id="columns"):
            with gr.Column(min_width=320, elem_id="asking"):
                files = gr.File(
                    label="Image files (also DICOM, a whole series)", file_count="multiple", height=130, elem_id="files"
                )
                move = files.async_move_resource_to_block_cache
                files.async_move_resource_to_block_cache = _local_only(move)  # type: ignore[method-assign]
                pictures = gr.HTML(elem_id="pictures")
                slices = gr.Slider(1, 2, value=1, step=1, label="Slice", visible=False, elem_id="slices")
                window = gr.Dropdown(
                    [AS_IN_FILE, *CT_WINDOWS], value=AS_IN_FILE, label="Window of a CT", visible=False, elem_id="window"
                )
                gr.HTML("<p>Or try a drawn phantom:</p>", elem_classes="hint")
                with gr.Row(elem_id="examples"):
                    buttons = [
                        (gr.Button(record.modality, icon=str(record.images[0]), size="sm"), record)
                        for record in _examples(load_records(examples))
                    ]
                question = gr.Textbox("", label="Question", lines=1, max_lines=4, elem_id="question")
                options = gr.Textbox(
                    "", label="Options, one a line; none to ask openly", lines=4, max_lines=10, elem_id="options"
                )
                modality = gr.Dropdown([NOT_STATED, *MODALITIES], value=NOT_STATED, label=MODALITY, elem_id="modality")
                with gr.Accordion("Settings", open=False):
                    selector = gr.Textbox(
                        "",
                        label="Part of the files",
                        info="such as slice=40, axis=coronal, window=40,80 or redact=top:40",
                        elem_id="selector",
                    )
                    mode = gr.Radio(list(MODES), value=MODES[0], label="Prompt")
                    num_samples = gr.Slider(0, 16, value=8, step=1, label="Samples to see how many agree")
                    heatmap = gr.Checkbox(value=True, label="Heatmap: what in the image speaks for the answer")
                with gr.Row():
                    start = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(min_width=320, scale=2, elem_id="answering"):
                said = gr.HTML(_said("The answer will stand here."), elem_id="said")
                answers = gr.HTML(elem_id="answers")
                save = gr.Button("Save this case as a page", interactive=False, elem_id="save")
        finished = gr.State([], time_to_live=KEEP_SECONDS)
        saved = gr.Textbox(visible="hidden")

        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        shown = [pictures, slices, window]
        files.change(arrive, [files, modality], [*shown, modality, selector], **quiet)
        gr.on([selector.submit, selector.blur], look, [files, selector], shown, **quiet)
        gr.on(
            [slices.input, window.input],
            choose,
            [files, selector, slices, window],
            selector,
            trigger_mode="always_last",
            **quiet,
        ).then(look, [files, selector], shown, **quiet)
        for button, record in buttons:
            button.click(
                lambda record=record: (
                    [str(path) for path in record.images],
                    record.question,
                    "\n".join(record.options),
                    record.modality,
                ),
                None,
                [files, question, options, modality],
                **quiet,
            )
        asked = gr.on(
            [start.click, question.submit],
            answer,
            [files, question, options, modality, selector, mode, num_samples, heatmap],
            [answers, said, finished, save],
            api_name="ask",
            concurrency_limit=1,
            show_progress="hidden",
        )
        start.click(None, js=SHOW_ANSWER)
        stop.click(lambda: _said("Stopped."), None, said, cancels=[asked], **quiet)
        save.click(case_page, finished, saved, **quiet).then(None, saved, None, js=SAVE)
    page.queue(max_size=MAX_QUEUE, api_open=False)
    return page


class Gate:
    """What every request passes before Gradio sees it: limits of size and rate, and no fetching for others.

    Raises nothing; a refused request is answered with a status and one sentence.
    """

    def __init__(self, app: Any, *, max_bytes: int, per_minute: int) -> None:
        self.app, self.max_bytes, self.per_minute = app, max_bytes, per_minute
        self.times: dict[str, deque[float]] = defaultdict(deque)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (b"content-security-policy", CONTENT_POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        if refusal := self._refusal(scope):
            from starlette.responses import JSONResponse

            status, sentence = refusal
            await JSONResponse({"detail": sentence, "error": sentence}, status)(scope, receive, send_with_policy)
            return
        await self.app(scope, receive, send_with_policy)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        if "=http:" in scope["path"] or "=https:" in scope["path"]:
            return 403, "This app fetches nothing from other hosts."
        if scope["method"] != "POST":
            return None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or int(length) > self.max_bytes:
            return 413, f"An upload may have {self.max_bytes // 10**6} MB at most; shrink the image."
        now = monotonic()
        self.times = defaultdict(deque, {each: times for each, times in self.times.items() if times[-1] > now - 60})
        times = self.times[scope["client"][0]]
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= self.per_minute:
            wait = int(times[0] + 61 - now)
            return 429, f"More than {self.per_minute} requests in a minute; wait {wait} seconds."
        times.append(now)
        return None


def _local_only(move: Any) -> Any:
    """Gradio would fetch an address that a request names in place of an upload."""

    async def moved(path: str | Path | None) -> str | None:
        if path is not None and not Path(path).is_file():
            raise ValueError("only an uploaded file can be asked about")
        return await move(path)

    return moved


def _references(files: Sequence[str] | None, selector: str) -> list[Path]:
    """The uploads, or what the selector picks in each; several files of one DICOM series are one upload, its folder."""
    paths = [Path(file) for file in files or []]
    pairs = _joined(_selected(selector))
    return [Path(f"{path}#{pairs}" if pairs else path) for path in ([*_series(paths)] or paths)]


def _series(paths: Sequence[Path]) -> Iterator[Path]:
    """A folder of these uploads where they are one DICOM series."""
    if len(paths) < 2 or not all(path.is_file() and path.stat().st_size for path in paths):
        return
    try:
        found = in_series(paths).series
    except MedR1Error:
        return  # no pydicom: said when an image is read
    if [len(series.files) for series in found] == [len(paths)]:
        name = hashlib.sha256("".join(map(str, sorted(paths))).encode()).hexdigest()[:16]
        folder = Path(os.environ["GRADIO_TEMP_DIR"]) / f"series-{name}"
        folder.mkdir(exist_ok=True)
        for number, path in enumerate(paths):
            with suppress(FileExistsError):
                (folder / f"{number:05}-{path.name}").symlink_to(path)  # so the image goes when Gradio removes it
        yield folder


def _selected(selector: str) -> dict[str, str]:
    """A selector as its keys and values; a word without "=" has no value, which is told when an image is read."""
    pairs = (pair.partition("=") for pair in selector.strip().lstrip("#").split("&") if pair.strip())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _joined(selected: dict[str, str]) -> str:
    return "&".join(f"{key}={value}" for key, value in selected.items())


def _place(views: Sequence["View"]) -> tuple[str, int, int]:
    """Which key chooses among the slices or frames of the one upload, the one shown, and how many there are."""
    if len(views) == 1 and views[0].reading:
        for key in ("slice", "frame"):
            if found := re.search(r"(\d+) of (\d+)$", str(views[0].reading.decisions.get(key, ""))):
                return key, int(found[1]), int(found[2])
    return "", 1, 1


@dataclass(frozen=True)
class View:
    """An upload as it is shown, and how it was read; None where it cannot be."""

    html: str
    reading: Reading | None


def _look(number: int, reference: Path) -> View:
    """The uploaded image and what it shows of its file, or in one sentence why it cannot be used."""
    try:
        reading = read_image(reference)
    except MedR1Error as error:
        return View(_fault(_without_folders(error, [str(file_of(reference))])), None)
    said = f"<figcaption>{html.escape(caption(reading))}</figcaption>"
    return View(f"<figure>{picture(reading.image, f'Image {number}')}{said}</figure>", reading)


def _takes_windows(reading: Reading) -> bool:
    """Whether windows of CT make sense; a NIfTI file does not say."""
    return reading.decisions["kind"] == "NIfTI" or "Hounsfield" in str(reading.decisions.get("rescale"))


def _without_folders(error: MedR1Error, files: Sequence[str] | None) -> str:
    """The error with names of files as the user knows them."""
    sentence = str(error)
    for file in files or []:
        sentence = sentence.replace(file, Path(file).name)
    return re.sub(re.escape(os.environ["GRADIO_TEMP_DIR"]) + "[^:]*/(?:[0-9]{5}-)?", "", sentence)


def _fault(sentence: str) -> str:
    return f'<p class="fault" role="alert">{html.escape(sentence)}</p>'


def _said(sentence: str) -> str:
    return f'<p role="status">{sentence}</p>'


def _examples(records: Sequence[Any]) -> list[Any]:
    """One question of each of the first four modalities."""
    by_modality = {record.modality: record for record in reversed(records)}
    return [by_modality[modality] for modality in MODALITIES if modality in by_modality][:4]


def _theme(gradio: Any) -> Any:
    system = [gradio.themes.Font(name) for name in ("system-ui", "sans-serif")]
    fixed = [gradio.themes.Font(name) for name in ("ui-monospace", "monospace")]
    theme = gradio.themes.Default(primary_hue="blue", neutral_hue="slate", font=system, font_mono=fixed)
    return theme.set(  # of Gradio's own some have a contrast below 4.5
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        link_text_color_dark="*primary_300",
    )


def _style() -> str:
    folder = Path(__file__).parent / "templates"
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("app.css", "card.css"))
