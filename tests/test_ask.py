"""One case: the reply of evaluation, what is measured about it, what warns of it, and the page that it becomes."""

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import medr1.ask.ask
from medr1 import NOTICE
from medr1.ask.ask import Case, Respondent, ask, image_faults, load_respondent, question_about
from medr1.ask.case import OUTCOMES, case_cards, case_page, write_case, write_heatmaps
from medr1.config import load_config, to_toml
from medr1.data.datasets import load_records
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.evaluation.calibration import Calibration, write_calibration
from medr1.evaluation.confidence import option_logprobs, reasoning_of
from medr1.evaluation.run import evaluate
from medr1.policy.encoding import encode_prompts
from medr1.policy.names import TINY
from medr1.policy.vlm import evaluating

OPTIONS = ("Cyst", "Abscess", "Tumour")
NASTY = "<script>alert(1)</script> & <b>"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, num_images=4, seed=1)
    return load_records(folder)


@pytest.fixture(scope="module")
def tiny() -> Respondent:
    return load_respondent("tiny")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "Jane_Doe_1950.jpg"
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"  # ImageDescription
    noise(300, 200).save(path, exif=exif)
    return path


def noise(width: int, height: int) -> Image.Image:
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def calibration(**fields: Any) -> Calibration:
    made: dict[str, Any] = {
        "model": "tiny", "mode": "think", "scoring": "options", "temperature": 2.0, "threshold": 0.5,
        "target": "coverage", "target_value": 0.8, "share": 0.5, "seed": 0, "n": 100, "coverage": 0.8,
        "accuracy": 0.7, "ci95": (0.6, 0.8),
    }  # fmt: skip
    return Calibration(**made | fields)


@pytest.mark.parametrize("mode", ["think", "no-think", "think-after"])
def test_the_reply_is_the_one_of_evaluation_and_is_shown_while_it_grows(
    tiny: Respondent, records: list[Record], tmp_path: Path, mode: str
) -> None:
    rows = evaluate(tiny.vlm, records[:4], mode=mode, out=tmp_path / "rows.jsonl", max_new_tokens=48)
    for record, row in zip(records[:4], rows, strict=True):
        seen: list[Case] = []
        asked = question_about(record.images, record.question, record.options)
        case = ask(tiny, asked, mode=mode, max_new_tokens=48, on_update=seen.append)
        assert (case.reply, case.outcome, case.letter) == (row["reply"], row["outcome"], row["letter"])
        assert case.cut == (row["finish"] == "length")
        growing = [each.reply for each in seen if each.outcome is None]
        assert len(growing) == row["tokens"] > 3
        assert all(after.startswith(before) for before, after in itertools.pairwise(growing))
        assert seen[-1] == case and case.warnings is not None


def test_probabilities_and_votes_are_those_of_the_model(tiny: Respondent, records: list[Record]) -> None:
    record = question_about(records[0].images, records[0].question, records[0].options)
    case = ask(tiny, record, max_new_tokens=48, num_samples=6, seed=3)
    prompts = encode_prompts(tiny.vlm, [build_messages(record, "think")], [list(case.pictures)])  # small: not shrunk
    with evaluating(tiny.vlm.model):
        [logp] = option_logprobs(tiny.vlm, prompts, [record], mode="think", reasoning=[reasoning_of(case.reply)])
    assert case.probabilities == pytest.approx(logp.exp().tolist())
    assert case.votes and sum(case.votes.values()) == 6
    assert ask(tiny, record, max_new_tokens=48, num_samples=6, seed=3) == case
    said = case.as_dict()
    assert said["answer"] == record.options[record.letters.index(said["letter"])]
    assert said["confidence"] == said["probabilities"][said["letter"]]
    assert "images" not in str(said)


class Scripted:
    """Stands for the model: replies in the order of the calls, and the probability of the first option."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replies: list[list[str]], first: list[float]) -> None:
        self.replies, self.first = iter(replies), iter(first)
        monkeypatch.setattr(medr1.ask.ask, "sample", self.sample)
        monkeypatch.setattr(medr1.ask.ask, "option_logprobs", self.option_logprobs)

    def sample(self, vlm: Any, prompts: Any, *, num_completions: int, **settings: Any) -> SimpleNamespace:
        texts = next(self.replies)
        assert len(texts) == len(prompts) * num_completions
        return SimpleNamespace(texts=texts, finished_N=torch.ones(len(texts), dtype=torch.bool))

    def option_logprobs(self, vlm: Any, prompts: Any, records: list[Record], **settings: Any) -> list[torch.Tensor]:
        assert len(prompts) == 1
        first, others = next(self.first), len(records[0].options) - 1
        return [torch.tensor([first, *[(1 - first) / others] * others]).log()]


@pytest.mark.parametrize(
    ("blank", "probability", "permuted", "found"),
    [
        ("A", 0.55, "Cyst", ["painted over in its mean colour, the answer stays A with 55 % (60 % with the image)"]),
        ("A", 0.49, "Cyst", []),  # the same option, but much less sure
        ("B", None, "Cyst", []),
        ("none", None, "Abscess", ["in another order the model says “Abscess” instead of “Cyst”"]),
        ("none", None, "I cannot tell.", ["in another order the model says no single option instead of “Cyst”"]),
    ],
)
def test_it_warns_of_an_image_or_an_order_that_decides_wrongly(
    tiny: Respondent, picture: Path, monkeypatch: pytest.MonkeyPatch, blank: str, probability: float | None,
    permuted: str, found: list[str],
) -> None:  # fmt: skip
    """The batch of the checks is the blanked image and then the other order; there texts tell, not letters."""
    replies = [["<answer>A</answer>"], [f"<answer>{text}</answer>" for text in (blank, permuted)]]
    Scripted(monkeypatch, replies, [0.6] + ([] if probability is None else [probability]))
    record = question_about([picture], "Which?", OPTIONS)
    first, *others = ask(tiny, record, mode="no-think").warnings or ()
    assert "phantoms only" in first
    assert len(others) == len(found) and all(text in other for text, other in zip(found, others, strict=True))


def test_it_warns_of_samples_that_disagree(tiny: Respondent, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = ["<answer>A</answer>", "<answer>A</answer>", "<answer>C</answer>", "no idea"]
    Scripted(monkeypatch, [["<answer>A</answer>"], drawn, ["?", "<answer>Cyst</answer>"]], [0.6])
    case = ask(tiny, question_about([picture], "Which?", OPTIONS), mode="no-think", num_samples=4)
    assert case.votes == {"A": 2, "C": 1, "none": 1}
    assert case.warnings and case.warnings[1:] == ("The model is not of one mind: 2 of 4 samples agree.",)
    page = case_page([case])
    assert "2 of 4 samples agree" in page and "no single option" in page


def test_an_open_question(tiny: Respondent, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [["<answer>Heart</answer>"], ["<answer>the heart.</answer>"]], [])
    case = ask(tiny, question_about([picture], "Which organ is it?", []), mode="no-think", num_samples=4, heatmap=True)
    assert (case.answer, case.letter, case.probabilities, case.votes, case.heatmaps) == ("Heart", *[None] * 4)
    assert case.warnings and case.warnings[1:] == (
        "The image may not matter: painted over in its mean colour, the answer stays “Heart”.",
    )
    assert "Heart" in case_page([case])


def test_a_calibration_tempers_and_abstains(
    tiny: Respondent, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """p = (0.64, 0.18, 0.18) at temperature 2 is proportional to (0.8, 0.4243, 0.4243): 0.8 / 1.6485 = 0.4853."""
    write_calibration(tmp_path / "calibration.json", calibration(mode="no-think", threshold=0.5))
    respondent = load_respondent("tiny", tmp_path / "calibration.json")
    record = question_about([picture], "Which?", OPTIONS)
    Scripted(monkeypatch, [["<answer>A</answer>"], ["<answer>B</answer>", "<answer>Cyst</answer>"]], [0.64])
    case = ask(respondent, record, mode="no-think")
    assert case.confidence == pytest.approx(0.4853, abs=1e-4)
    assert case.abstained and case.as_dict()["abstained"]
    assert "Abstains" in case_cards([case])
    with pytest.raises(MedR1Error, match=r"for mode no-think .* asked in mode think"):
        ask(respondent, record, mode="think")


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (noise(300, 200), None),
        (noise(63, 100), "is small: 63 x 100 pixels"),
        (noise(300, 70), "is a strip"),
        (Image.new("RGB", (200, 200), (90, 90, 92)), "is blank"),
        (noise(200, 200).filter(ImageFilter.GaussianBlur(4)), "looks blurred"),
    ],
)
def test_faults_of_a_picture(image: Image.Image, fault: str | None) -> None:
    found = image_faults(image)
    assert len(found) == (fault is not None) and all(each.startswith(str(fault)) for each in found)


def test_phantoms_have_no_faults(records: list[Record]) -> None:
    for path in {record.images for record in records}:
        assert image_faults(Image.open(path[0]).convert("RGB")) == []


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[Path]:
    """A run's folder with the tiny model in it."""
    shutil.copytree(TINY, tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


@pytest.mark.parametrize(
    ("modalities", "stated", "warning"),
    [
        (["CT"], "MRI", "trained on CT only; this image is MRI."),
        (["CT", "OCT"], None, "trained on CT, OCT only; which modality this image is was not stated."),
        (["CT"], "CT", None),
        ([], "MRI", None),
        (None, "MRI", "What this model was trained on is not recorded beside it."),
    ],
)
def test_it_warns_of_a_modality_that_it_was_not_trained_on(
    trained: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, modalities: list[str] | None, stated: str | None,
    warning: str | None,
) -> None:  # fmt: skip
    if modalities is not None:
        recipe = load_config(overrides={"data.path": "somewhere", "data.modalities": modalities})
        (trained.parent / "recipe.toml").write_text(to_toml(recipe))
    Scripted(monkeypatch, [["<answer>A</answer>"], ["<answer>B</answer>", "<answer>Cyst</answer>"]], [0.6])
    record = question_about([picture], "Which?", OPTIONS, stated)
    found = ask(load_respondent(str(trained)), record, mode="no-think").warnings
    assert found is not None and len(found) == (warning is not None)
    assert all(each.endswith(str(warning)) for each in found)


@pytest.mark.parametrize(
    ("images", "question", "options", "modality", "remedy"),
    [
        (["picture.png"], " ", OPTIONS, None, "the question is empty"),
        (["picture.png"], "What?", ["one"], None, "two options or more or none"),
        (["picture.png"], "What?", OPTIONS, "PET", "unknown modality"),
        (["picture.png"], "What?", OPTIONS, None, "no such image file"),
    ],
)
def test_mistakes_are_one_line(
    tiny: Respondent, images: list[str], question: str, options: list[str], modality: str | None, remedy: str
) -> None:
    with pytest.raises(MedR1Error, match=remedy) as error:
        ask(tiny, question_about([Path(each) for each in images], question, options, modality))
    assert "\n" not in str(error.value)


def test_a_page_stands_alone_names_nobody_and_shows_text_as_text(
    tiny: Respondent, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Scripted(monkeypatch, [[f"{NASTY}<answer>A</answer>"], ["?", "<answer>Cyst</answer>"]] * 2, [0.6] * 2)
    record = question_about([picture], NASTY, ("Cyst", NASTY))
    cases = [ask(tiny, record, mode="no-think") for _ in range(2)]
    write_case(cases, tmp_path / "case.html")
    page = (tmp_path / "case.html").read_text()
    assert NOTICE in page and tiny.fingerprint in page and "data:image/webp;base64," in page
    assert page.count('class="case"') == 2
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    for identity in ("Jane", "Doe", "1950", str(tmp_path)):
        assert identity not in page
    with pytest.raises(MedR1Error, match="no heatmap"):
        write_heatmaps(cases, tmp_path / "heatmap.png")


def size(page: str, css: str) -> float:
    """Size in px that card.css gives a class of a card."""
    return float(re.search(rf"\.case {re.escape(css)} {{[^}}]*?font-size: ([\d.]+)px", page)[1])  # type: ignore[index]


def test_an_answer_that_means_nothing_is_shown_as_that(
    tiny: Respondent, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sure of itself, with votes for an option that has no probability, and blind: the warnings stand above, larger."""
    drawn = [f"<answer>{letter}</answer>" for letter in "AABBBBBB"]
    Scripted(monkeypatch, [["<answer>B</answer>"], drawn, ["<answer>B</answer>", "<answer>No</answer>"]], [1e-9] * 2)
    case = ask(tiny, question_about([picture], "Which?", ("Yes", "No")), mode="no-think", num_samples=8)
    assert [warning.split(" ")[0] for warning in case.voided] == ["This", "The"] and case.ignores_image
    assert case.as_dict()["means_nothing"] is True
    page = case_page([case])
    body = page.split('<article class="case"')[1]
    assert body.index("means nothing for a patient") < body.index("phantoms only") < body.index("barely matters")
    assert body.index("barely matters") < body.index("The model’s words: ") < body.index("Probability 100.0 %")
    assert size(page, ".void .headline") > size(page, ".void") > size(page, ".answer.unsure")
    assert 'class="answer unsure"' in body
    assert "each vote is a whole new reply" in body and "part here for A and B: the model’s answer hangs" in body


def test_an_answer_without_warnings_is_shown_large(
    trained: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained.parent / "recipe.toml").write_text(to_toml(load_config(overrides={"data.path": "somewhere"})))
    Scripted(monkeypatch, [["<answer>A</answer>"], ["<answer>B</answer>", "<answer>Cyst</answer>"]], [0.6])
    case = ask(load_respondent(str(trained)), question_about([picture], "Which?", OPTIONS), mode="no-think")
    assert (case.warnings, case.voided) == ((), ())
    page = case_page([case]).split("<article")[1]
    assert '<p class="answer">' in page and "means nothing" not in page


def test_only_checks_that_were_made_are_named(trained: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained.parent / "recipe.toml").write_text(to_toml(load_config(overrides={"data.path": "somewhere"})))
    respondent, no_answer = load_respondent(str(trained)), "Checked with a look at the picture itself: nothing"
    Scripted(monkeypatch, [["<think>A ring, and"], ["<answer>A</answer>"] * 2], [0.6])
    case = ask(respondent, question_about([picture], "Which?", OPTIONS))
    assert case.letter is None and no_answer in case_page([case])
    Scripted(monkeypatch, [["<answer>A</answer>"], ["<answer>Cyst</answer>"]], [0.6])
    case = ask(respondent, question_about([], "Which?", OPTIONS), mode="no-think")
    assert "Checked with another order of the options: nothing" in case_page([case])


def test_a_sign_makes_another_answer(tiny: Respondent, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [["<answer>A</answer>"], ["<answer>B</answer>", "<answer>> 5 mm</answer>"]], [0.6])
    case = ask(tiny, question_about([picture], "How large?", ("< 5 mm", "> 5 mm")), mode="no-think")
    assert not case.ignores_image and "says “> 5 mm” instead of “< 5 mm”" in " ".join(case.warnings or ())


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    for other in ({"model": "runs/a"}, {"weights": "0" * 16}):
        write_calibration(path, calibration(**other))
        with pytest.raises(MedR1Error, match=r"calibration\.json: is of model .*, and this is model tiny \(weights "):
            load_respondent("tiny", path)


def test_the_command_of_a_page_asks_the_same(tiny: Respondent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_series import write_slice

    write_slice(tmp_path / "Jane.dcm", 30)
    write_calibration(tmp_path / "calibration.json", calibration(mode="no-think"))
    Scripted(monkeypatch, [["<answer>A</answer>"], ["<answer>B</answer>", "<answer>Cyst</answer>"]], [0.6])
    record = question_about([Path(f"{tmp_path}/Jane.dcm#window=lung")], "Which?", OPTIONS, "CT")
    case = ask(load_respondent("tiny", tmp_path / "calibration.json"), record, mode="no-think")
    page = case_page([case])
    shutil.copy(tmp_path / "Jane.dcm", tmp_path / "scan#Jane=Doe.dcm")  # a sign in a file's name selects nothing
    Scripted(monkeypatch, [["<answer>A</answer>"], ["<answer>B</answer>", "<answer>Cyst</answer>"]], [0.6])
    named = question_about([tmp_path / "scan#Jane=Doe.dcm"], "Which?", OPTIONS)
    assert "Jane" not in case_page([ask(load_respondent("tiny"), named, mode="no-think")])
    assert "IMAGE#window=lung" in page and "--modality CT --calibration CALIBRATION" in page and "Jane" not in page


def test_the_header_states_the_modality(tiny: Respondent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_series import write_slice

    write_slice(tmp_path / "a.dcm", 30)
    for stated, warned in ((None, False), ("CT", False), ("MRI", True)):
        Scripted(monkeypatch, [["<answer>A</answer>"], ["<answer>B</answer>", "<answer>Cyst</answer>"]], [0.6])
        record = question_about([tmp_path / "a.dcm"], "Which?", OPTIONS, stated)
        case = ask(tiny, record, mode="no-think")
        said = (case.modality, case.modality_from)
        assert said == ((stated, "stated") if stated else ("CT", "DICOM header"))
        assert ("You stated MRI; the header of the file says CT." in (case.warnings or ())) == warned
        assert ("Modality: CT, from the DICOM header." in case_page([case])) == (stated is None)


def test_pages_and_heatmaps_have_their_own_endings(tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match=r"case\.pdf: pages are HTML; name it case\.html"):
        write_case([], tmp_path / "case.pdf")
    with pytest.raises(MedR1Error, match=r"map\.jpg: heatmaps are PNG; name it map\.png"):
        write_heatmaps([], tmp_path / "map.jpg")


def test_every_outcome_without_an_answer_has_words() -> None:
    from typing import get_args

    from medr1.data.answers import Outcome

    assert set(OUTCOMES) == set(get_args(Outcome)) - {"letter", "text"}
