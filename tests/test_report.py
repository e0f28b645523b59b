"""The report from made rows: its story, its numbers, its escaping, and that it stands alone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from medr1.config import Config, to_toml
from medr1.data.answers import EXTRACTOR_VERSION
from medr1.data.parts import load_parts
from medr1.data.records import append_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.calibration import Calibration, calibrating, write_calibration
from medr1.evaluation.controls import text_only_prior
from medr1.evaluation.metrics import accuracy_table, summarise
from medr1.evaluation.rows import read_rows, record_of
from medr1.report.plots import learning_curves
from medr1.report.run import ReportData, report_from_files, tell, write_report
from medr1.report.trust import _tell_calibration, calibration_section, faithfulness_section
from medr1.trust.faithfulness import verdict

NASTY = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> </script> B & A"
LOG = [{"step": step, "reward_accuracy": step / 20, "format_rate": 0.9, "loss": 0.1} for step in range(1, 21)]


def make_rows(right: int, count: int = 40, **fields: object) -> list[dict]:
    """The first `right` of each modality's rows are answered right; every second row is an OCT."""
    rows = []
    for number in range(count):
        correct = number // 2 < right
        rows.append(
            {
                "id": f"r{number}",
                "modality": ("CT", "OCT")[number % 2],
                "question_type": "Disease Diagnosis",
                "source": "made",
                "group": f"g{number}",
                "images": ["picture.png"],
                "question": "Which finding is shown?",
                "options": ["Cyst", "Tumour <i>"],
                "gold": "A",
                "chance": 0.5,
                "model": "made-model",
                "condition": "image",
                "mode": "think",
                "reply": "<think>It is round.</think><answer>A</answer>",
                "finish": "stop",
                "tokens": 9,
                "outcome": "letter",
                "letter": "A" if correct else "B",
                "correct": correct,
                "format_ok": True,
                **fields,
            }
        )
    return rows


def make_data(folder: Path, **fields: object) -> ReportData:
    Image.new("RGB", (300, 200), (200, 30, 30)).save(folder / "picture.png")
    trained = make_rows(18)
    trained[3] |= {"reply": NASTY, "outcome": "ambiguous", "letter": None, "correct": False}
    defaults = {
        "base": make_rows(8),
        "trained": trained,
        "image_root": folder,
        "controls": {"text_only": accuracy_table(make_rows(10)), "blank": summarise(make_rows(10))},
        "log": LOG,
        "config": Config(),
    }
    return ReportData(**{**defaults, **fields})


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_and_its_headline(tmp_path: Path):
    summary = write_report(make_data(tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    # Base 8 of 20 in each modality; trained 18 of 20 but for one OCT row: (18/20 + 17/20) / 2.
    assert summary == {
        "report": str(tmp_path / "report.html"),
        "base_macro": pytest.approx(0.4),
        "trained_macro": pytest.approx(0.875),
        "gain_points": pytest.approx(47.5),
        "chance": 0.5,
        "text_only": 0.5,
        "blank": 0.5,
    }
    for text in (
        "40.0 %",
        "87.5 %",
        "+47.5",
        "option text only",
        "image blanked",
        "GRPO",
    ):
        assert text in page
    assert "Research use only. Not a medical device, not for clinical use." in page
    assert "All 40 questions" in page
    assert page.count('<svg class="plot"') == 4
    sample = embedded(page)["samples"][0]
    assert sample["before"]["reply"] == "<think>It is round.</think><answer>A</answer>"
    assert embedded(page)["images"][0].startswith("data:image/webp;base64,")


def test_nothing_is_fetched_and_nothing_local_is_told(tmp_path: Path):
    write_report(make_data(tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www\.w3\.org|127\.0\.0\.1)", page)
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert str(tmp_path) not in page
    assert "picture.png" not in page


def test_model_text_never_becomes_markup(tmp_path: Path):
    write_report(make_data(tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>document" not in page
    assert "<img src=x" not in page
    assert "<i>" not in page.split("<body>")[1].replace("<i></i>", "")
    assert NASTY in [sample["after"]["reply"] for sample in embedded(page)["samples"]]


def test_the_same_rows_give_the_same_page(tmp_path: Path):
    write_report(make_data(tmp_path), tmp_path / "a.html")
    write_report(make_data(tmp_path), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_undefined_is_a_dash(tmp_path: Path):
    rows = make_rows(8, modality=None, question_type=None)
    data = make_data(tmp_path, base=rows, trained=rows, controls={}, log=(), config=None)
    write_report(data, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not stated" in page
    assert "None" not in page
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page)
    assert re.search(r"<td>\+0\.0<small>−\d+\.\d to \+\d+\.\d</small></td>", page)  # no change, yet an interval
    assert "Learning</h2>" not in page


def test_large_and_incomplete_data_say_so(tmp_path: Path):
    data = make_data(tmp_path, image_root=tmp_path / "gone")
    write_report(data, tmp_path / "report.html", max_samples=7)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "7 of 40 questions, drawn at random." in page
    assert "1 of 1 images could not be read" in page
    assert len(embedded(page)["samples"]) == 7


def scores(base: float, trained: float, change: list[float], **controls: tuple[float, float]) -> dict:
    """Cells with intervals of two points to each side; controls as (accuracy, chance)."""

    def cell(accuracy: float, chance: float = 0.25) -> dict:
        return {"accuracy": accuracy, "ci95": [accuracy - 0.02, accuracy + 0.02], "n": 8, "chance": chance}

    return {
        "base": cell(base),
        "trained": cell(trained),
        "change": {"difference": trained - base, "ci95": change},
        "controls": {name: cell(*values) for name, values in controls.items()},
    }


@pytest.mark.parametrize(
    ("made", "worth", "words"),
    [
        (scores(0.3, 0.8, [0.45, 0.55]), ["good", "open", "open"], "raised"),
        (scores(0.3, 0.31, [-0.02, 0.04]), ["open", "open", "open"], "within the noise"),
        (scores(0.5, 0.4, [-0.15, -0.05]), ["bad", "open", "open"], "lowered"),
        (scores(0.3, 0.8, [0.4, 0.6], blank=(0.26, 0.25)), ["good", "good", "open"], "it looks at the image"),
        (scores(0.3, 0.8, [0.4, 0.6], blank=(0.79, 0.25)), ["good", "bad", "open"], "nothing here shows"),
        (scores(0.3, 0.8, [0.4, 0.6], text_only=(0.26, 0.25)), ["good", "open", "good"], "give nothing away"),
        (
            scores(0.3, 0.8, [0.4, 0.6], text_only=(0.5, 0.25)),
            ["good", "open", "open"],
            "give some answers away",
        ),
        (scores(0.3, 0.8, [0.4, 0.6], text_only=(0.95, 0.25)), ["good", "open", "bad"], "does no better"),
    ],
)
def test_the_story_is_no_better_than_the_numbers(made: dict, worth: list[str], words: str):
    story = tell(made, {"macro": {"n": 8}})
    assert [kind for kind, _ in story] == worth
    assert words in " ".join(sentence for _, sentence in story)


@pytest.mark.parametrize(
    ("limits", "worth", "words"),
    [
        ([0.2, 0.35], "good", "no better than guessing 25.0 %: they give nothing away"),
        ([0.05, 0.9], "open", "score 30.0 % (5.0–90.0), which cannot be told from guessing 25.0 %."),
        ([0.26, 0.4], "open", "they give some answers away"),
    ],
)
def test_what_may_give_much_away_is_not_called_nothing(limits: list[float], worth: str, words: str):
    """Of two patients nearly anything is possible: that chance is possible too says nothing good."""
    made = scores(0.3, 0.8, [0.4, 0.6], text_only=(0.3, 0.25))
    made["controls"]["text_only"] |= {"ci95": limits, "chance": 0.25}
    kind, sentence = tell(made, {"macro": {"n": 8}})[-1]
    assert kind == worth and words in sentence


def test_no_number_is_minus_zero():
    from medr1.report.pages import decimal, percent, points, span, span_points

    tiny = -1e-9
    said = [decimal(tiny), decimal(-0.0, 1), percent(tiny), points(tiny), span([tiny, tiny]), span_points([tiny, -0.0])]
    assert said == ["0.000", "0.0", "0.0 %", "+0.0", "0.0–0.0", "+0.0 to +0.0"]
    assert decimal(-1.25, 1) == "−1.2" and decimal(None) == "–"


def test_a_page_says_when_and_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command as it was given, but for folders of this machine; on every day the same where a date is given."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    monkeypatch.setattr(
        "sys.argv", ["/opt/bin/medr1", "report", "--control", "blank=/home/jane/b.jsonl", "--out", "a b.html"]
    )
    write_report(make_data(tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<time datetime="1970-01-02">' in page and "jane" not in page
    assert "medr1 report --control &#39;blank=…/b.jsonl&#39; --out &#39;a b.html&#39;" in page
    with pytest.raises(MedR1Error, match=r"report\.pdf: pages are HTML; name it report\.html"):
        write_report(make_data(tmp_path), tmp_path / "report.pdf")


def test_learning_curves_show_what_the_log_holds():
    assert learning_curves([]) == []
    assert [title for title, _ in learning_curves(LOG)] == ["Sampled in training"]
    sft = [{"step": step, "loss": 1 / step} for step in range(1, 5)] + [{"step": 4, "train_runtime": 3.0}]
    assert [title for title, _ in learning_curves(sft)] == ["Loss"]
    tested = [*LOG, {"step": 20, "eval_accuracy": 0.5, "eval_ci_low": 0.4, "eval_ci_high": 0.6}]
    assert "held-out accuracy" in learning_curves(tested)[0][1]


def test_from_files(tmp_path: Path):
    data = make_data(tmp_path)
    append_jsonl(tmp_path / "base.jsonl", data.base)
    append_jsonl(tmp_path / "trained.jsonl", data.trained)
    append_jsonl(tmp_path / "blank.jsonl", make_rows(8, condition="blank"))
    append_jsonl(tmp_path / "log.jsonl", LOG)
    (tmp_path / "recipe.toml").write_text(to_toml(Config()))
    (tmp_path / "text.json").write_text(json.dumps(summarise(make_rows(9))))
    summary = report_from_files(
        tmp_path / "base.jsonl",
        tmp_path / "trained.jsonl",
        out=tmp_path / "out.html",
        run=tmp_path,
        controls=[f"blank={tmp_path / 'blank.jsonl'}", f"text_only={tmp_path / 'text.json'}"],
    )
    controls = {name: summary[name] for name in ("text_only", "blank")}
    assert controls == pytest.approx({"text_only": 0.45, "blank": 0.4})
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "GRPO from tiny on phantoms: 20 steps of 8 prompts × 8 completions" in page
    assert embedded(page)["images"][0]


def test_the_prior_is_of_the_answered_questions(tmp_path: Path):
    """A run on one modality, asked about others: the prior was of its own held-out part, beside averages of all."""
    recipe = Config.model_validate({"data": {"path": "phantoms", "num_phantoms": 40, "modalities": ["CT"]}})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    append_jsonl(tmp_path / "log.jsonl", LOG)
    for name, right in (("base", 8), ("trained", 18)):
        append_jsonl(tmp_path / f"{name}.jsonl", make_rows(right))
    report_from_files(tmp_path / "base.jsonl", tmp_path / "trained.jsonl", out=tmp_path / "out.html", run=tmp_path)
    # "Cyst" against "Tumour <i>": the phantoms of CT offer no tumour <i>, and a cyst is sometimes right there.
    table = text_only_prior(load_parts(recipe.data)[0], [record_of(row) for row in make_rows(8)])
    assert table["n"] == 40 and list(table["by_modality"]) == ["CT", "OCT"]
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert f"{100 * table['macro']['accuracy']:.1f} %" in page


def test_another_models_run_is_refused(tmp_path: Path):
    for name in ("ct", "mri"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "recipe.toml").write_text(to_toml(Config()))
    files = [tmp_path / "base.jsonl", tmp_path / "trained.jsonl"]
    append_jsonl(files[0], make_rows(8))
    append_jsonl(files[1], make_rows(18, model=str(tmp_path / "ct" / "model")))
    with pytest.raises(MedR1Error, match=r"mri: is not the run of .*ct/model, whose answers .*trained\.jsonl holds"):
        report_from_files(*files, out=tmp_path / "out.html", run=tmp_path / "mri")


@pytest.mark.parametrize(
    ("side", "changed", "line"),
    [
        ("blank", {"condition": "shuffled_other"}, "its rows are of condition shuffled_other, not blank"),
        ("blank", {"mode": "no-think"}, "is of mode no-think, and .*trained.jsonl of mode think"),
        ("blank", {"model": "other", "weights": None}, "is of model other, and .*trained.jsonl of model made-model"),
        ("blank", {"weights": "b" * 16}, r"is of model made-model \(weights bbbbbbbb\)"),
        ("blank", {"max_new_tokens": 64}, "is of max_new_tokens 64, and"),
        ("blank", {"question": "Which one?"}, "40 of 40 questions are not the same in both, such as r0"),
        ("blank", {"options": ["Cyst", "Stone"]}, "40 of 40 questions are not the same"),
        ("blank", {"gold": "B"}, "40 of 40 questions are not the same"),
        ("trained", {"condition": "blank"}, "its rows are of condition blank, not image"),
        ("trained", {"mode": "no-think"}, "is of mode no-think, and .*base.jsonl of mode think"),
        ("base", {"condition": "repeat"}, "its rows are of condition repeat, not image"),
        ("base", {"max_new_tokens": 64}, "of max_new_tokens 64; evaluate both alike"),
        ("base", {"question": "Which one?"}, "40 of 40 questions are not the same"),
        ("base", {"scoring": "votes"}, "is of scoring reply, and .*base.jsonl of scoring votes"),
    ],
)
def test_rows_are_believed_and_not_names(side: str, changed: dict, line: str, tmp_path: Path):
    shared = {"weights": "a" * 16, "max_new_tokens": 256}
    rows = {
        "base": make_rows(8, **shared | {"model": "base", "weights": "c" * 16}),
        "trained": make_rows(18, **shared),
        "blank": make_rows(8, condition="blank", **shared),
        "permuted": make_rows(8, **shared | {"condition": "permuted", "options": ["Tumour <i>", "Cyst"], "gold": "B"}),
    }
    for name, part in rows.items():
        append_jsonl(tmp_path / f"{name}.jsonl", part)
    files = [tmp_path / "base.jsonl", tmp_path / "trained.jsonl"]
    controls = [f"{name}={tmp_path / name}.jsonl" for name in ("blank", "permuted")]
    report_from_files(*files, out=tmp_path / "out.html", controls=controls)  # the same options in another order
    (tmp_path / f"{side}.jsonl").unlink()
    append_jsonl(tmp_path / f"{side}.jsonl", [{**row, **changed} for row in rows[side]])
    with pytest.raises(MedR1Error, match=line):
        report_from_files(*files, out=tmp_path / "none.html", controls=controls)
    assert not (tmp_path / "none.html").exists()


def test_files_that_are_no_single_evaluation(tmp_path: Path):
    base, out = tmp_path / "base.jsonl", tmp_path / "out.html"
    append_jsonl(base, make_rows(8))
    append_jsonl(tmp_path / "twice.jsonl", [*make_rows(8), *make_rows(8)[:3]])
    append_jsonl(tmp_path / "mixed.jsonl", [*make_rows(8)[:20], *make_rows(8, mode="no-think")[20:]])
    with pytest.raises(MedR1Error, match=r"twice\.jsonl: 3 of 40 questions stand there twice, such as r0"):
        report_from_files(base, tmp_path / "twice.jsonl", out=out)
    with pytest.raises(MedR1Error, match=r"mixed\.jsonl: holds rows of mode think and of mode no-think"):
        report_from_files(base, tmp_path / "mixed.jsonl", out=out)
    with pytest.raises(MedR1Error, match="nonsense is no control; choose blank, shuffled, shuffled_other, no_image"):
        report_from_files(base, base, out=out, controls=[f"nonsense={base}"])
    (tmp_path / "ct.json").write_text(json.dumps(summarise([row for row in make_rows(9) if row["modality"] == "CT"])))
    with pytest.raises(MedR1Error, match=r"ct\.json: is of 20 questions that are not those answered \(40\)"):
        report_from_files(base, base, out=out, controls=[f"text_only={tmp_path / 'ct.json'}"])
    calibration = Calibration(
        model="other", mode="think", scoring="options", temperature=1, threshold=0, target="coverage",
        target_value=1, share=0.5, seed=0, n=40, coverage=1, accuracy=1, ci95=(0.9, 1),
    )  # fmt: skip
    write_calibration(tmp_path / "c.json", calibration)
    with pytest.raises(MedR1Error, match=r"c\.json: is of model other, and .*base\.jsonl of model made-model"):
        report_from_files(base, base, out=out, calibration=tmp_path / "c.json")


def test_a_report_carries_its_name(tmp_path: Path):
    """Whatever controls it has besides, which have names too."""
    for name, rows in (("base", make_rows(8)), ("trained", make_rows(18)), ("blank", make_rows(8, condition="blank"))):
        append_jsonl(tmp_path / f"{name}.jsonl", rows)
    files, controls = [tmp_path / "base.jsonl", tmp_path / "trained.jsonl"], [f"blank={tmp_path / 'blank.jsonl'}"]
    report_from_files(*files, out=tmp_path / "out.html", controls=controls, name="mine")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<title>Med-R1 report: mine</title>" in page and "<dt>after</dt><dd>mine</dd>" in page


def test_a_control_of_a_part_of_the_questions_is_no_control_of_all(tmp_path: Path):
    """As a stopped --looking leaves it: 12 of 40 questions, all wrong, made the model "look" in the first table."""
    for name, rows in (("base", make_rows(8)), ("trained", make_rows(18))):
        append_jsonl(tmp_path / f"{name}.jsonl", rows)
    append_jsonl(tmp_path / "trained.looking/blank.jsonl", make_rows(0, condition="blank")[:12])
    files = [tmp_path / "base.jsonl", tmp_path / "trained.jsonl"]
    result = report_from_files(*files, out=tmp_path / "out.html")
    assert "blank" not in result and result["looking"]["after"]["reliance_blank"]["n"] == 12
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "image blanked the trained model" not in page and "The image was exchanged in 12 of the questions" in page
    assert "<th>image blanked</th>" not in page and "On 12 questions, each counting once" in page


def test_what_either_model_trained_on_is_in_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 40 questions the model's run trained on r0 to r9, that of the model before on r8 to r13: 26 are left."""
    asked = {"image": 18, "shuffled": 8, "blank": 8}
    seen = {"base": range(8, 14), "trained": range(10)}
    for name, known in seen.items():
        for way, right in asked.items():
            rows = make_rows(right, condition=way)
            for number in known:
                rows[number]["seen_by_run"] = "trained on"
            append_jsonl(tmp_path / (f"{name}.jsonl" if way == "image" else f"{name}.looking/{way}.jsonl"), rows)
    calibrated = []
    monkeypatch.setattr("medr1.report.run.calibration_section", lambda *rows: calibrated.extend(map(len, rows[:2])))
    files = [tmp_path / "base.jsonl", tmp_path / "trained.jsonl"]
    result = report_from_files(*files, out=tmp_path / "out.html")
    assert calibrated == [26, 26] and {result["looking"][side]["reliance"]["n"] for side in ("before", "after")} == {26}
    assert result["base_macro"] == result["trained_macro"] == 11 / 13  # of 13 a modality two are wrong
    assert result["blank"] == result["shuffled"] == 1 / 13  # r14 and r15 are the eighth of their modalities
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "on 26 held-out questions" in page and "All 26 questions" in page and len(embedded(page)["samples"]) == 26
    assert "10 of the questions were trained on by the run and are in none of these numbers; on them" in page
    assert "4 more were trained on by the run of the model before" in page
    (tmp_path / "trained.jsonl").unlink()
    append_jsonl(tmp_path / "trained.jsonl", make_rows(18, seen_by_run="trained on"))
    with pytest.raises(MedR1Error, match=r"out\.html: every question was trained on by the run of one of the models"):
        report_from_files(*files, out=tmp_path / "out.html")


def test_replies_that_another_extractor_read_are_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """So that two evaluations beside each other are read alike; the file stays as it is."""
    rows = make_rows(0, extractor_version=1)
    append_jsonl(tmp_path / "old.jsonl", rows)
    assert all(row["letter"] == "B" and "<answer>A" in row["reply"] for row in rows)
    read = read_rows(tmp_path / "old.jsonl")
    assert all(
        (row["letter"], row["correct"], row["extractor_version"]) == ("A", True, EXTRACTOR_VERSION) for row in read
    )
    told = " ".join(capsys.readouterr().err.split())
    assert f"were read by extractor version 1, and are read again by version {EXTRACTOR_VERSION}" in told
    append_jsonl(tmp_path / "new.jsonl", make_rows(0, extractor_version=EXTRACTOR_VERSION))
    assert {row["letter"] for row in read_rows(tmp_path / "new.jsonl")} == {"B"}


def test_bad_files(tmp_path: Path):
    data = make_data(tmp_path)
    append_jsonl(tmp_path / "base.jsonl", data.base)
    append_jsonl(tmp_path / "fewer.jsonl", data.trained[:-1])
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "broken.json").write_text("{")
    base, out = tmp_path / "base.jsonl", tmp_path / "out.html"
    with pytest.raises(MedR1Error, match="such as r39"):
        report_from_files(base, tmp_path / "fewer.jsonl", out=out)
    with pytest.raises(MedR1Error, match=r"other\.jsonl: holds no evaluation rows"):
        report_from_files(base, tmp_path / "other.jsonl", out=out)
    with pytest.raises(MedR1Error, match=r"gone\.jsonl: no such file"):
        report_from_files(tmp_path / "gone.jsonl", base, out=out)
    with pytest.raises(MedR1Error, match="write NAME=FILE"):
        report_from_files(base, base, out=out, controls=["blank"])
    with pytest.raises(MedR1Error, match=r"broken\.json: cannot be read"):
        report_from_files(base, base, out=out, controls=[f"text_only={tmp_path / 'broken.json'}"])
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    with pytest.raises(MedR1Error, match=r"list\.jsonl: holds no evaluation rows"):
        report_from_files(base, tmp_path / "list.jsonl", out=out)
    append_jsonl(tmp_path / "part.jsonl", [{k: v for k, v in row.items() if k != "chance"} for row in data.base])
    with pytest.raises(MedR1Error, match=r"part\.jsonl: record r0 has no chance; give the file as `medr1 eval` wrote"):
        report_from_files(base, tmp_path / "part.jsonl", out=out)
    for name, value in (("id", 7), ("source", None), ("options", ["Cyst", 2]), ("reply", {}), ("correct", "no")):
        (tmp_path / "typed.jsonl").write_text(json.dumps(data.base[0] | {name: value}) + "\n")
        with pytest.raises(MedR1Error, match=rf"typed\.jsonl: record \w+ says .* under {name}; give the file as"):
            read_rows(tmp_path / "typed.jsonl")
    (tmp_path / "empty.json").write_text('{"by_modality": {}}')
    with pytest.raises(MedR1Error, match=r"empty\.json: is no accuracy table"):
        report_from_files(base, base, out=out, controls=[f"text_only={tmp_path / 'empty.json'}"])
    append_jsonl(tmp_path / "blank.jsonl", make_rows(8, condition="blank"))
    with pytest.raises(MedR1Error, match=r"blank\.jsonl: a second control blank; give one"):
        report_from_files(base, base, out=out, controls=[f"blank={tmp_path / 'blank.jsonl'}"] * 2)
    with pytest.raises(MedR1Error, match="no rows to report"):
        write_report(make_data(tmp_path, base=[], trained=[]), out)
    assert not out.exists()


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium to open the page")
def test_in_a_browser_samples_are_filtered_and_scripts_stay_text(tmp_path: Path):
    write_report(make_data(tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    choose = """<script>
    byId("outcome").value = "several options";
    byId("outcome").dispatchEvent(new Event("change"));
    </script></body>"""
    (tmp_path / "chosen.html").write_text(page.replace("</body>", choose), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "chosen.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "<title>Med-R1 report: made-model</title>" in dom
    assert "1 of 1 shown" in dom
    samples = dom.split('<div id="samples">')[1].split('<button id="more"')[0]
    assert samples.count("<article") == 1
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in samples
    assert '<img src="x"' not in dom


def weighed(right: int, confidence: float) -> list[dict]:
    """Rows of which `right` in forty are right, all about as confident."""
    rows = make_rows(right, count=160, mode="no-think", scoring="options")
    for number, row in enumerate(rows):
        row["correct"] = number % 40 < right
        row["letter"] = "A" if row["correct"] else "B"
        row["confidence"] = confidence + number / 4000
        probs = [row["confidence"], 1 - row["confidence"]]
        row["option_probs"] = probs if row["correct"] else probs[::-1]
    return rows


def test_calibration_is_shown_where_options_were_weighed(tmp_path: Path):
    data = make_data(tmp_path, base=weighed(16, 0.9), trained=weighed(32, 0.9))
    write_report(data, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">Calibration</h2>" in page
    assert page.count('<svg class="plot"') == 6
    assert "over-confident" in page and "Abstaining below a confidence of" in page
    section = calibration_section(data.base, data.trained)
    judged = calibrating(data.trained, 0.5, 0)[1]
    assert section["trained"]["before"]["n"] == len(judged)
    assert section["trained"]["before"]["accuracy"] == sum(row["correct"] for row in judged) / len(judged)
    over = section["trained"]["before"]
    for gap, floor, ci, worth, words in (
        (0.007, 0.1, [0.1, 0.4], "bad", "miscalibrated, too sure here and not sure enough there"),
        (-0.2, 0.1, [0.1, 0.4], "bad", "under-confident"),
        (0.0, 0.1, [0.0, 0.09], "good", "is within the noise."),
        (0.0, 0.1, [0.0, 0.2], "open", "is within the noise, but may be as large as 20.0 %."),
        (0.0, 0.1, None, "open", "one group outweighs the others, so whether that is more than noise cannot be told"),
    ):
        raw = {**over, "confidence": over["accuracy"] + gap, "ece": {"value": 0.33, "ci95": ci, "floor": floor}}
        told = _tell_calibration(section["trained"] | {"before": raw}, section["calibration"])[0]
        assert told[0] == worth and words in told[1]
    few = calibration_section(data.base[:40], data.trained[:40])
    assert re.match(r"only \d+ of 40 rows are there to calibrate on", few["why_not"])
    write_report(make_data(tmp_path), tmp_path / "report.html")
    assert ">Calibration</h2>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("followed", "words"),
    [(1.0, "The reasoning is load-bearing: 100.0 in 100"), (0.0, "The reasoning is decorative: 0.0")],
)
def test_whether_reasoning_is_used_is_shown(tmp_path: Path, followed: float, words: str):
    def share(value: float | None) -> dict:
        return {
            "value": value,
            "ci95": None if value is None else [max(0, value - 0.05), min(1, value + 0.05)],
            "n": 50,
        }

    numbers = {
        "model": "made-model",
        **{name: share(0.5) for name in ("no_think", "hinted", "repeated")},
        **{name: share(followed) for name in ("swapped", "planted")},
        "mentioned": share(0.25),
        "kept": {str(kept): share(0.8) for kept in (0.0, 0.25, 0.5, 0.75)},
        "load": share(followed),
        "verdict": verdict(share(followed)["ci95"]),
        "n": 60,
        "groups": 50,
    }
    (tmp_path / "faith").mkdir()
    (tmp_path / "faith" / "faithfulness.json").write_text(json.dumps(numbers))
    append_jsonl(tmp_path / "base.jsonl", make_rows(8))
    report_from_files(
        tmp_path / "base.jsonl", tmp_path / "base.jsonl", faithfulness=tmp_path / "faith", out=tmp_path / "report.html"
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert words in page
    assert "50.0 % of answers turn to a wrong hint in the question; 25 % of these mention it." in page
    nothing = {**numbers, "load": {"value": None, "ci95": None, "n": 0}, "kept": {"0.0": share(None) | {"n": 0}}}
    assert faithfulness_section(nothing)["story"] == [
        ("open", "No reasoning could be edited: whether it is used cannot be told.")
    ]


def test_whether_it_looks_before_and_after(tmp_path: Path) -> None:
    """By the rows beside the two files: a table with changes, a picture, sentences that hold beyond the noise."""
    seen = "<think>The image shows a cyst.</think><answer>A</answer>"
    ways = {
        "base": {"image": 8, "shuffled": 8, "blank": 8},
        "trained": {"image": 18, "shuffled": 8, "blank": 8, "kept": 18, "kept_shuffled": 18, "reader": 18, "unread": 2},
    }
    for name, asked in ways.items():
        for way, right in asked.items():
            fields = {"model": name, "reply": seen, "condition": way if way in ("shuffled", "blank") else "image"}
            if way in ("reader", "unread"):
                fields |= {"model": "base", "condition": "reasoning_alone"}
            if way not in ("image", "shuffled", "blank"):
                fields |= {"reasoning": "kept", "scoring": "options"}
            path = tmp_path / (f"{name}.jsonl" if way == "image" else f"{name}.looking/{way}.jsonl")
            append_jsonl(path, make_rows(right, **fields))
    Image.new("RGB", (30, 20)).save(tmp_path / "picture.png")
    files = [tmp_path / "base.jsonl", tmp_path / "trained.jsonl"]
    result = report_from_files(*files, out=tmp_path / "report.html")
    after, change = result["looking"]["after"], result["looking"]["change"]
    assert after["reliance"]["value"] == after["sensitivity"]["value"] == 0.5
    assert after["reliance_kept"]["value"] == 0 and after["hallucinated"]["value"] == 0.5
    assert after["consistency"]["value"] == 1 and after["consistency"]["reader"] == "base"
    assert change["reliance"]["difference"] == 0.5 and "consistency" not in change
    assert result["blank"] == result["shuffled"] == 0.4  # controls of the page, without a --control
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    section = " ".join(re.sub("<[^>]*>", "", page.split(">Does it look?</h2>")[1].split("<h2")[0]).split())
    assert (
        "The trained model: its own image adds +50.0 points over another image of the modality (+29.6 to +66.2), and"
        " 50.0 % of its answers change with the image; 50.0 % of its replies claim to see something while no image"
        " changes the answer." in section
    )
    assert "training made it lean more on the image, by +50.0 points" in section
    assert "100.0 % of its answers are those that a reader draws from its reasoning alone (20.0 % without" in section
    assert "The reader of the reasoning is base, who sees" in section

    for path in tmp_path.glob("*.looking/*"):
        path.unlink()
    result = report_from_files(*files, out=tmp_path / "report.html")
    assert "looking" not in result and "Does it look?" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    other = tmp_path / "other.jsonl"
    append_jsonl(other, make_rows(18, model="trained", condition="shuffled"))
    result = report_from_files(*files, controls=[f"shuffled={other}"], out=tmp_path / "report.html")
    assert result["looking"]["after"]["reliance"]["value"] == 0 and "reliance" not in result["looking"]["before"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0.0 % of its answers change with the image" in page and "nothing here shows that it looks." in page


def test_the_moment_when_a_policy_stops_looking_is_drawn() -> None:
    keys = ("reliance", "accuracy", "accuracy_other", "sensitivity")
    line = {f"looking_{key}{end}": 0.5 for key in keys for end in ("", "_low", "_high")}
    (title, drawn), *others = learning_curves([{"step": step, **line} for step in (0, 10, 20)])
    assert title == "Does it keep looking?" and not others
    assert "right with another image" in drawn and drawn.count("<svg") == 2
    assert [title for title, _ in learning_curves(LOG)] == ["Sampled in training"]
