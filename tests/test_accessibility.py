"""Every kind of page by axe-core and on a telephone: wide and narrow, light and dark, nothing serious is found."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_report import LOG, make_data, weighed
from test_several import page_of, rows_of, write
from test_study_report import planted

from medr1.ask.ask import Case, load_respondent, question_about
from medr1.ask.ask import ask as run
from medr1.ask.case import write_case
from medr1.data.datasets import load_records
from medr1.data.phantoms import write_phantoms
from medr1.policy.vlm import load_vlm
from medr1.report.checks import check_data, write_check
from medr1.report.heatmaps import write_heatmaps_page
from medr1.report.plots import LOOKED
from medr1.report.run import write_report
from medr1.report.show import write_samples
from medr1.study.report import write_study_report
from medr1.trust.fidelity import measure_heatmaps

axe_playwright_python = pytest.importorskip("axe_playwright_python", reason="needs axe-core: pip install 'medr1[test]'")
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
LOOKS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
LONG = "<think>" + "The lesion has an irregular border and several colours. " * 60 + "</think><answer>A</answer>"
"""A reply that does not fit its box."""


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, num_images=4, seed=1)
    return folder


def run_page(folder: Path, phantoms: Path) -> Path:
    base, trained = weighed(16, 0.9), weighed(32, 0.9)
    trained[0]["reply"] = LONG
    looking = ({"image": base, "shuffled": base}, {"image": trained, "shuffled": base, "blank": base})
    line = {f"{name}{end}": 0.4 for name in ("looking_reliance", *LOOKED) for end in ("", "_low", "_high")}
    log = [*LOG, *({"step": step, **line} for step in (0, 10, 20))]
    write_report(make_data(folder, base=base, trained=trained, log=log, looking=looking), folder / "report.html")
    return folder / "report.html"


def several_page(folder: Path, phantoms: Path) -> Path:
    for name in ("strong", "worse"):
        others = rows_of("weak", condition="shuffled", model=f"models/{name}", weights=(name * 16)[:16])
        write(folder / f"{name}.looking", "shuffled", others)
    page_of(folder, "weak", "strong", "worse")
    return folder / "page.html"


def study_page(folder: Path, phantoms: Path) -> Path:
    write_study_report(planted(folder / "study", num_images=6))
    return folder / "study" / "report.html"


def check_page(folder: Path, phantoms: Path) -> Path:
    rows = [
        {
            "image": f"{number % 6}.png",
            "question": "Which  organ?",
            "options": ["Heart", "heart", "Lung"],
            "answer": "A",
        }
        for number in range(30)
    ]
    for number in range(6):
        Image.linear_gradient("L").rotate(90 * (number % 2)).save(folder / f"{number}.png")
    (folder / "mine.json").write_text(json.dumps(rows))
    write_check(check_data(folder / "mine.json"), folder)
    return folder / "check.html"


def explain_page(folder: Path, phantoms: Path) -> Path:
    rows, numbers = measure_heatmaps(load_vlm("tiny"), load_records(phantoms)[:4], out=folder)
    write_heatmaps_page(rows, numbers, folder)
    return folder / "explain.html"


def show_page(folder: Path, phantoms: Path) -> Path:
    write_samples(load_records(phantoms), folder / "show.html", name="phantoms", num=6)
    return folder / "show.html"


def case_page(folder: Path, phantoms: Path) -> Path:
    record = load_records(phantoms)[0]
    asked = question_about(record.images, record.question, record.options)
    respondent = load_respondent("tiny")
    cases: list[Case] = [
        run(respondent, asked, mode=mode, max_new_tokens=48, num_samples=2, heatmap=True)
        for mode in ("think", "no-think")
    ]
    write_case(cases, folder / "case.html")
    return folder / "case.html"


PAGES: tuple[Callable[[Path, Path], Path], ...] = (
    run_page,
    several_page,
    study_page,
    check_page,
    explain_page,
    show_page,
    case_page,
)


def faults(page: Any) -> list[str]:
    """What axe-core calls serious or critical, and what scrolls sideways that should not."""
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    told = [
        f"{fault['id']}: {node['html'][:200]} {node['failureSummary']}"
        for fault in found
        if fault["impact"] in ("serious", "critical") or fault["id"] == "heading-order"
        for node in fault["nodes"]
    ]
    if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        told.append("the page scrolls sideways")
    return told


def settle(page: Any) -> None:
    """Wait until all is drawn and nothing that has an end moves any more."""
    page.evaluate("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    moving = "each => each.playState === 'running' && each.effect.getComputedTiming().endTime < Infinity"
    page.wait_for_function(f"!document.getAnimations().some({moving})")


def looks(page: Any) -> Iterator[str]:
    for width, scheme in LOOKS:
        page.set_viewport_size({"width": width, "height": 844})
        page.emulate_media(color_scheme=scheme)
        settle(page)
        yield f"{width} {scheme}"


@pytest.mark.parametrize("make", PAGES, ids=lambda make: make.__name__)
def test_nothing_serious_is_found_on_a_page(browser: Any, tmp_path: Path, phantoms: Path, make: Any) -> None:
    path = make(tmp_path, phantoms)
    page = browser.new_page()
    page.set_default_timeout(120_000)  # a busy machine is no fault of the page
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    if make in (run_page, several_page, study_page):
        page.wait_for_selector("#samples > *")
    page.evaluate(AXE)
    page.evaluate("document.querySelectorAll('details:not(.zoom)').forEach(each => { each.open = true; })")
    assert [f"{look}: {fault}" for look in looks(page) for fault in faults(page)] == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert page.locator("main").count() == page.locator("h1").count() == 1
    assert page.locator("footer time").count() == 1

    for svg in page.locator("svg.plot:visible").all():  # on a telephone, where the last look was
        scale = svg.evaluate("each => each.getBoundingClientRect().width / each.viewBox.baseVal.width")
        sizes = svg.evaluate(
            "each => [...each.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize))"
        )
        assert min(sizes) * scale >= 10.5, svg.get_attribute("aria-label")
    page.close()


def test_nothing_serious_is_found_in_the_app(browser: Any, tmp_path: Path) -> None:
    """Empty and answered; a series of DICOM files has one picture, a slider, windows, its modality, and is enlarged."""
    pytest.importorskip("gradio", reason="needs the extra medr1[app]")
    from test_series import DIRECTIONS, write_slice

    from medr1.ask.app import running

    for number in range(5):
        write_slice(tmp_path / f"{number}.dcm", 20 + 10 * number, ImageOrientationPatient=DIRECTIONS,
                    ImagePositionPatient=[0, 0, -number])  # fmt: skip
    with running(["tiny"], max_new_tokens=24, requests_per_minute=10_000) as url:
        page = browser.new_page(reduced_motion="reduce")  # while colours change nothing can be said of them
        page.set_default_timeout(120_000)
        page.goto(url)
        page.wait_for_selector("#ask")
        page.evaluate(AXE)
        assert [f"empty, {look}: {fault}" for look in looks(page) for fault in faults(page)] == []

        page.set_input_files("#files input[type=file]", sorted(tmp_path.glob("*.dcm")))
        told = page.locator("#pictures figcaption")
        told.filter(has_text="slice 3 of 5").wait_for()
        modality = page.locator("#modality input")
        assert modality.input_value() == "CT" and "from the DICOM header" in page.locator("#modality").inner_text()
        page.locator("#slices input[type=number]").fill("1")
        page.keyboard.press("Enter")
        told.filter(has_text="slice 1 of 5").wait_for()
        page.locator("#window input").click()
        page.get_by_role("option", name="brain").click()
        told.filter(has_text="slice 1 of 5; brain window").wait_for()

        modality.click()
        page.get_by_role("option", name="MRI").wait_for()
        page.keyboard.press("Tab")
        page.get_by_role("option", name="MRI").wait_for(state="detached")  # no list is left open

        page.locator("#pictures summary").focus()
        page.keyboard.press("Enter")
        box = page.locator("#pictures img").bounding_box()
        assert box["width"] >= 389 and abs(box["width"] - box["height"]) < 1  # 390 px wide, and as square as the slice
        page.keyboard.press("Enter")

        page.get_by_label("Question").fill("Which?")
        page.get_by_label("Options, one a line; none to ask openly").fill("Yes\nNo")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.wait_for_function("document.querySelector('#said').innerText.startsWith('Answered')")
        page.get_by_role("button", name="Settings").click()
        page.locator("#selector").wait_for()
        settle(page)  # it opens slowly, and half seen nothing has contrast
        assert [f"answered, {look}: {fault}" for look in looks(page) for fault in faults(page)] == []
        page.close()
