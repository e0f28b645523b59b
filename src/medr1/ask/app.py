"""A page in the browser over `ask`: drop an image, ask, watch the model write, see how far to trust it.

It listens on this machine alone unless told otherwise, fetches nothing from elsewhere (the browser is forbidden to,
too), keeps uploads in a temporary folder that goes when it ends, and asks the model one question at a time.

    medr1 app --model runs/ct/model --compare Qwen/Qwen2-VL-2B-Instruct
"""

import html
import os
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from medr1 import NOTICE
from medr1.ask.ask import Case, Respondent, ask, load_respondent, question_about
from medr1.ask.case import case_cards, case_page, picture
from medr1.data.images import file_of, read_image
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import MODES
from medr1.data.records import MODALITIES
from medr1.errors import MedR1Error

LOOPBACK = ("127.0.0.1", "localhost")
KEEP_SECONDS = 1800
"""How long an upload and an answer are kept for a page that is left open."""
MAX_QUEUE, MAX_SESSIONS = 64, 64
NOT_STATED = "not stated"
SHOWN_DECISIONS = ("frame", "slice", "axis", "window", "level", "polarity", "redacted")
"""What of `images.Reading.decisions` stands under an image."""

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
        models: one or several (see `models.load_vlm`), shown side by side.
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

    def look(files: list[str] | None, selector: str) -> str:
        return "".join(_look(*item) for item in enumerate(_references(files, selector), start=1))

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
                files = gr.File(label="Image files (also DICOM)", file_count="multiple", height=130, elem_id="files")
                move = files.async_move_resource_to_block_cache
                files.async_move_resource_to_block_cache = _local_only(move)  # type: ignore[method-assign]
                pictures = gr.HTML(elem_id="pictures")
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
                modality = gr.Dropdown([NOT_STATED, *MODALITIES], value=NOT_STATED, label="Modality of the image")
                with gr.Accordion("Settings", open=False):
                    selector = gr.Textbox(
                        "", label="Frame, slice or window of the files", info="such as slice=40 or window=lung"
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
        gr.on([files.change, selector.submit, selector.blur], look, [files, selector], pictures, **quiet)
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
    """The uploads, or what the selector picks in each."""
    selected = f"#{selector.strip().lstrip('#')}" if selector.strip() else ""
    return [Path(f"{file}{selected}") for file in files or []]


def _look(number: int, reference: Path) -> str:
    """The uploaded image and how it was read, or in one sentence why it cannot be used."""
    try:
        reading = read_image(reference)
    except MedR1Error as error:
        return _fault(_without_folders(error, [str(file_of(reference))]))
    said = [f"{name} {value}" for name, value in reading.decisions.items() if name in SHOWN_DECISIONS]
    caption = f"<figcaption>{html.escape(', '.join(said))}</figcaption>"
    return f"<figure>{picture(reading.image, f'Image {number}')}{caption}</figure>"


def _without_folders(error: MedR1Error, files: Sequence[str] | None) -> str:
    """The error with names of files as the user knows them."""
    sentence = str(error)
    for file in files or []:
        sentence = sentence.replace(file, Path(file).name)
    return sentence


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
    return gradio.themes.Default(primary_hue="blue", neutral_hue="slate", font=system, font_mono=fixed)


def _style() -> str:
    folder = Path(__file__).parent / "templates"
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("app.css", "card.css"))
