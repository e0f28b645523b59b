"""Several models in one report: what each line says, whose control is whose, and that no winner is made of noise."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_report import LOG, embedded, make_rows

from medr1.cli.evaluate import _named
from medr1.config import Config, to_toml
from medr1.data.records import append_jsonl, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.controls import text_only_prior
from medr1.evaluation.metrics import compare, holm, summarise
from medr1.evaluation.rows import record_of
from medr1.report.several import Model, _checkpoints, several_from_files

RIGHT = {"base": 24, "weak": 26, "strong": 60, "other": 58, "worse": 4}
"""Of eighty in each of two modalities."""


def rows_of(name: str, **fields: Any) -> list[dict]:
    return make_rows(RIGHT[name], count=160, **{"model": f"models/{name}", "weights": (name * 16)[:16]} | fields)


def write(folder: Path, name: str, rows: Sequence[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").unlink(missing_ok=True)
    append_jsonl(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def page_of(folder: Path, *names: str, **options: Any) -> tuple[dict[str, Any], str]:
    base = write(folder, "base", rows_of("base"))
    given = [(name, write(folder, name, rows_of(name))) for name in names]
    result = several_from_files(base, given, out=folder / "page.html", **options)
    return result, (folder / "page.html").read_text(encoding="utf-8")


def story_of(page: str) -> list[str]:
    listed = re.search(r'<ul class="story">(.*?)</ul>', page, re.DOTALL)
    assert listed
    return [re.sub(r"<[^>]+>", "", item).strip() for item in re.findall(r"<li.*?</li>", listed[1], re.DOTALL)]


def cells_of(page: str, table: str) -> list[list[str]]:
    body = page.split(f'aria-label="{table}"')[1].split("</table>")[0]
    return [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in re.findall("<tr.*?</tr>", body, re.DOTALL)
    ]


def test_each_model_has_its_line(tmp_path: Path) -> None:
    result, page = page_of(tmp_path, "weak", "strong", "worse")
    names = ["weak", "strong", "worse"]
    assert list(result["models"]) == names and result["n"] == 160 and result["base_macro"] == 0.3
    alone = [compare(rows_of("base"), rows_of(name))["macro"] for name in names]
    adjusted = holm([change["p"] for change in alone])
    for name, change, p in zip(names, alone, adjusted, strict=True):
        told = result["models"][name]
        assert told["macro"] == RIGHT[name] / 80
        assert told["change"]["difference"] == change["difference"] and told["change"]["ci95"] == change["ci95"]
        assert told["change"]["holm_p"] == p
    assert [result["models"][name]["verdict"] for name in names] == ["noise", "better", "worse"]

    lines = cells_of(page, "Each model against the base")
    assert [line[0] for line in lines[1:]] == ["base", *names] and "75.0 %" in lines[3][1] and lines[3][2] == "160"
    parts = cells_of(page, "Accuracy in numbers")
    assert parts[0][1:5] == ["base", *names]
    ct = next(line for line in parts if line[0] == "CT")
    assert [cell.split(" %")[0] for cell in ct[1:5]] == ["30.0", "32.5", "75.0", "5.0"]
    assert "Above the base, beyond the noise: strong (+45.0 points)." in " ".join(story_of(page))
    assert "Below the base, beyond the noise: worse (−25.0 points)." in " ".join(story_of(page))
    assert "Within the noise of the base: weak (+2.5 points)." in " ".join(story_of(page))
    assert "strong is above every other model here, beyond the noise." in " ".join(story_of(page))
    samples = embedded(page)
    assert samples["names"] == ["base", *names] and all(len(one["replies"]) == 4 for one in samples["samples"])


def test_no_winner_within_the_noise(tmp_path: Path) -> None:
    told = " ".join(story_of(page_of(tmp_path, "strong", "other", "weak")[1]))
    assert "No model is best beyond the noise: strong scores highest, and other cannot be told from it." in told
    assert "above every other" not in told
    twin = [(name, write(tmp_path, name, rows_of("strong"))) for name in ("one", "two")]
    several_from_files(tmp_path / "base.jsonl", twin, out=tmp_path / "twins.html")
    told = " ".join(story_of((tmp_path / "twins.html").read_text(encoding="utf-8")))
    assert "No model is best beyond the noise: one and two score highest." in told
    base = write(tmp_path, "few", rows_of("base")[:20])
    few = [(name, write(tmp_path, name, rows_of(name)[:20])) for name in ("strong", "worse")]
    result = several_from_files(base, few, out=tmp_path / "few.html")
    assert [model["verdict"] for model in result["models"].values()] == ["few", "few"]
    told = " ".join(story_of((tmp_path / "few.html").read_text(encoding="utf-8")))
    assert "Too few questions (under 30)" in told and "No model is best" in told and "✓" not in told


def test_the_order_of_models_moves_columns_only(tmp_path: Path) -> None:
    names = ("weak", "strong", "other")
    orders = (names, names[::-1], ("strong", "other", "weak"))
    results, pages = zip(*(page_of(tmp_path / str(k), *order) for k, order in enumerate(orders)), strict=True)
    for order, result, page in zip(orders, results, pages, strict=True):
        assert list(result["models"]) == list(order) and result["models"] == results[0]["models"]
        for table in ("Accuracy in numbers", "What became of the replies"):
            head, *lines = cells_of(page, table)
            own = [0, 1, *(head.index(name) for name in names), *range(5, len(head))]
            moved = [[line[at] for at in own] if len(line) > 1 else line for line in (head, *lines)]
            assert moved == cells_of(pages[0], table)
        head, base, *lines = cells_of(page, "Each model against the base")
        of_first = cells_of(pages[0], "Each model against the base")
        assert [head, base] == of_first[:2] and sorted(lines) == sorted(of_first[2:])
        words = [sorted(re.sub("[,.]( |$)", " ", " ".join(story_of(one))).split()) for one in (page, pages[0])]
        assert words[0] == words[1]
        ours, first = embedded(page), embedded(pages[0])
        for one, other in zip(ours["samples"], first["samples"], strict=True):
            assert one["id"] == other["id"]
            replies = dict(zip(ours["names"], one["replies"], strict=True))
            assert replies == dict(zip(first["names"], other["replies"], strict=True))


def test_a_control_is_of_the_model_that_its_rows_state(tmp_path: Path) -> None:
    def control(name: str, condition: str = "blank", **fields: Any) -> str:
        path = write(tmp_path / condition, "-".join([name, *fields]), rows_of(name, condition=condition, **fields))
        return f"{condition}={path}"

    elsewhere = rows_of("weak", model="elsewhere", weights=rows_of("strong")[0]["weights"], condition="blank")
    by_weights = f"blank={write(tmp_path, 'by-weights', elsewhere)}"  # the same weights under another name
    result, page = page_of(tmp_path, "weak", "strong", controls=[control("weak"), by_weights, control("base")])
    assert result["models"]["weak"]["blank"] == 26 / 80 and result["models"]["strong"]["blank"] == 26 / 80
    told = " ".join(story_of(page))
    assert "so it looks at the image: strong." in told and "Nothing here shows that it looks at the image" in told
    head, base, weak, _ = cells_of(page, "Each model against the base")
    assert head[-1] == "image blanked" and base[-1].startswith("30.0 %") and weak[-1].startswith("32.5 %")
    assert "No blank-image control was run, so whether the image is used is not known: weak and strong." in " ".join(
        story_of(page_of(tmp_path, "weak", "strong")[1])
    )

    for controls, line in (
        (
            [control("other")],
            r"other\.jsonl: is of model models/other \(weights otheroth\), which is none of the page",
        ),
        ([control("weak"), control("weak")], r"weak\.jsonl: a second control blank of weak"),
        ([control("weak", mode="no-think")], "is of mode no-think, and .*weak.jsonl of mode think"),
        ([control("weak", question="Which?")], "160 of 160 questions are not the same"),
        ([control("weak").replace("blank=", "repeat=")], "of condition blank, not repeat"),
        (["weak.jsonl"], "write NAME=FILE"),
    ):
        with pytest.raises(MedR1Error, match=line):
            page_of(tmp_path, "weak", "strong", controls=controls)
    nameless = {"model": "made", "weights": None}
    files = [(None, write(tmp_path / name, "rows", rows_of(name, **nameless))) for name in ("weak", "strong")]
    with pytest.raises(MedR1Error, match=r"is of model made, and so are .*whose control it is cannot be told"):
        several_from_files(
            tmp_path / "base.jsonl", files, out=tmp_path / "none.html", controls=[control("weak", **nameless)]
        )
    assert not (tmp_path / "none.html").exists()


def test_names(tmp_path: Path) -> None:
    base = write(tmp_path, "base", rows_of("base"))

    def names_of(*given: tuple[str | None, Path]) -> list[str]:
        return list(several_from_files(base, given, out=tmp_path / "page.html")["models"])

    one, two = (write(tmp_path / name, "rows", rows_of(name, model="runs/model")) for name in ("weak", "strong"))
    three = write(tmp_path / "weak", "again", rows_of("weak", model="runs/model"))
    assert names_of((None, one), (None, write(tmp_path, "other", rows_of("other")))) == ["runs/model", "models/other"]
    assert names_of((None, one), (None, two)) == ["runs/model (weak)", "runs/model (strong)"]
    assert names_of((None, one), ("runs/model", two)) == ["runs/model (weak)", "runs/model"]
    assert names_of((None, one), (None, three), (None, two)) == [
        "runs/model (weak) (rows.jsonl)", "runs/model (weak) (again.jsonl)", "runs/model (strong)",
    ]  # fmt: skip
    odd = [("runs/#123abc", one), (r"$\frac{$", two)]  # like a colour, and like a formula
    assert names_of(*odd) == ["runs/#123abc", r"$\frac{$"]
    for given, name in ((((None, one), (None, one)), "runs/model"), ((("a", one), ("a", two)), "a")):
        with pytest.raises(MedR1Error, match=rf"rows\.jsonl: a second model of the page is called {name}"):
            names_of(*given)
    with pytest.raises(MedR1Error, match="is called base"):
        names_of(("base", one), (None, two))

    assert _named("a.jsonl") == (None, Path("a.jsonl")) and _named("a=b=c.jsonl") == ("a", Path("b=c.jsonl"))
    there = write(tmp_path / "lr=1", "rows", rows_of("weak"))
    assert _named(str(there)) == (None, there) and _named(f"low={there}") == ("low", there)
    with pytest.raises(MedR1Error, match="write FILE or NAME=FILE"):
        _named("=a.jsonl")


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"question": "Which one?"}, "160 of 160 questions are not the same in both, such as r0"),
        ({"options": ["Cyst", "Stone"]}, "160 of 160 questions are not the same"),
        ({"mode": "no-think"}, "is of mode no-think, and .*base.jsonl of mode think"),
        ({"condition": "blank"}, "of condition blank, not image"),
        ({"scoring": "votes"}, "is of scoring votes"),
    ],
)
def test_mixed_questions_are_refused(changed: dict, line: str, tmp_path: Path) -> None:
    base = write(tmp_path, "base", rows_of("base"))
    given = [
        (None, write(tmp_path, "weak", rows_of("weak"))),
        (None, write(tmp_path, "strong", rows_of("strong", **changed))),
    ]
    with pytest.raises(MedR1Error, match=line):
        several_from_files(base, given, out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_questions_that_one_run_trained_on_are_in_no_number(tmp_path: Path) -> None:
    """Each column is of the same questions: what one model has seen is left out of the base and the others too."""
    base, weak, strong = (rows_of(name) for name in ("base", "weak", "strong"))
    for number, row in enumerate(weak):
        row["seen_by_run"] = "trained on" if number < 40 else "held out"
    given = [(name, write(tmp_path, name, rows)) for name, rows in (("weak", weak), ("strong", strong))]
    blank = write(tmp_path, "blank", [row | {"condition": "blank"} for row in strong])
    result = several_from_files(
        write(tmp_path, "base", base), given, out=tmp_path / "page.html", controls=[f"blank={blank}"]
    )
    assert result["n"] == 120 and result["left_out"] == 40
    assert result["models"]["strong"]["macro"] == result["models"]["strong"]["blank"] == 40 / 60
    assert result["base_macro"] == 4 / 60 and result["models"]["weak"]["macro"] == 6 / 60
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "40 of the questions were trained on by a model" in page and len(embedded(page)["samples"]) == 120
    write(tmp_path, "weak", [row | {"seen_by_run": "trained on"} for row in weak])
    with pytest.raises(MedR1Error, match="every question was trained on by the run of one of the models"):
        several_from_files(tmp_path / "base.jsonl", given, out=tmp_path / "page.html")


def test_a_run_is_of_the_models_that_lie_in_it(tmp_path: Path) -> None:
    recipe = Config.model_validate({"data": {"path": "phantoms", "num_phantoms": 40, "modalities": ["CT"]}})
    for name in ("weak", "strong"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "recipe.toml").write_text(to_toml(recipe))
        append_jsonl(tmp_path / name / "log.jsonl", LOG)
    base = write(tmp_path, "base", rows_of("base"))
    given = [
        (name, write(tmp_path, name, rows_of(name, model=str(tmp_path / name / "model"))))
        for name in ("weak", "strong")
    ]
    from medr1.data.parts import load_parts

    result = several_from_files(base, given, out=tmp_path / "page.html", runs=[tmp_path / "strong"])
    prior = text_only_prior(load_parts(recipe.data)[0], [record_of(row) for row in rows_of("base")])
    assert result["models"]["strong"]["text_only"] == prior["macro"]["accuracy"]
    assert "text_only" not in result["models"]["weak"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "GRPO from tiny on phantoms: 20 steps" in page and "The whole recipe of strong" in page
    assert "No text-only control was run, so the options may give the answers away: weak." in " ".join(story_of(page))
    write(tmp_path, "weak", rows_of("weak"))
    with pytest.raises(MedR1Error, match=r"weak: none of the models lies in this run"):
        several_from_files(base, given, out=tmp_path / "page.html", runs=[tmp_path / "weak"])

    (tmp_path / "text.json").write_text(json.dumps(summarise(rows_of("weak"))))
    text = f"text_only={tmp_path / 'text.json'}"
    result = several_from_files(base, given, out=tmp_path / "page.html", controls=[text], runs=[tmp_path / "strong"])
    assert result["models"]["weak"]["text_only"] == 26 / 80
    assert result["models"]["strong"]["text_only"] == prior["macro"]["accuracy"]
    with pytest.raises(MedR1Error, match="a second table of option texts"):
        several_from_files(base, given, out=tmp_path / "page.html", controls=[text, text])


def test_checkpoints_of_a_run_are_a_curve_and_runs_have_theirs(tmp_path: Path) -> None:
    run = tmp_path / "ct"
    for place in ("checkpoint-10", "model"):
        (run / place).mkdir(parents=True)
    (run / "recipe.toml").write_text(to_toml(Config.model_validate({"data": {"num_phantoms": 40}})))
    append_jsonl(run / "log.jsonl", LOG)
    base = write(tmp_path, "base", rows_of("base", model="tiny"))
    files = {}
    for name, place in (("weak", "checkpoint-10"), ("strong", "model")):
        files[place] = write(tmp_path, place, rows_of(name, model=str(run / place)))
        shown = {"model": str(run / place), "condition": "shuffled", "weights": (name * 16)[:16]}
        write(tmp_path / f"{place}.looking", "shuffled", rows_of("base", **shown))
    given = [(None, path) for path in files.values()]
    several_from_files(base, given, out=tmp_path / "page.html", runs=[run])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'aria-label="Accuracy by step of training: ct, ct, another image"' in page
    assert 'aria-label="Right answers sampled in training: ct"' in page
    models = [Model(path.stem, path, rows_of(name)) for name, path in (("base", base), ("weak", files["model"]))]
    assert _checkpoints(models) == {}  # in no run's folder
    first, *others = [Model(path.stem, path, read_jsonl(path)) for path in (base, *files.values())]
    curve = _checkpoints([first, *others])["ct"]
    assert [(step, cell["accuracy"]) for step, cell in curve] == [(0, 0.3), (10, 0.325), (20, 0.75)]
    first.rows = rows_of("base", model="another")
    assert [step for step, _ in _checkpoints([first, *others])["ct"]] == [10, 20]
    assert _checkpoints([first, others[0]]) == {}


def test_whether_each_model_looks(tmp_path: Path) -> None:
    for name in ("base", "strong"):
        own = rows_of(name)
        write(tmp_path / f"{name}.looking", "shuffled", [{**row, "condition": "shuffled"} for row in rows_of("weak")])
        for path in (tmp_path / f"{name}.looking").iterdir():
            rows = [{**row, "model": own[0]["model"], "weights": own[0]["weights"]} for row in read_jsonl(path)]
            write(path.parent, "shuffled", rows)
    result, page = page_of(tmp_path, "strong", "other")
    assert result["models"]["strong"]["looking"]["reliance"]["value"] == pytest.approx((60 - 26) / 80)
    assert set(result["models"]["other"]["looking"]) == {"accuracy", "claims"}
    assert result["models"]["strong"]["shuffled"] == 26 / 80
    told = page.split(">Does it look?</h2>")[1]
    assert "strong: its own image adds +42.5 points over another image of the modality" in told
    assert "strong: training made it lean more on the image, by +45.0 points" in told
    assert "other: its own" not in told


def test_a_control_of_a_part_of_the_questions_is_no_control_of_all(tmp_path: Path) -> None:
    rows = rows_of("worse", model="models/strong", weights=rows_of("strong")[0]["weights"], condition="blank")
    write(tmp_path / "strong.looking", "blank", rows[-12:])
    result, page = page_of(tmp_path, "strong", "other")
    assert "blank" not in result["models"]["strong"]
    assert result["models"]["strong"]["looking"]["reliance_blank"]["n"] == 12
    told = " ".join(story_of(page))
    assert "so it looks at the image: strong" not in told and "the image is used is not known: other." in told


def test_option_texts_that_may_give_much_away_are_not_called_guessing(tmp_path: Path) -> None:
    rows = [{**row, "group": str(number % 2)} for number, row in enumerate(rows_of("weak"))]  # of two patients
    (tmp_path / "text.json").write_text(json.dumps(summarise(rows)))
    page = page_of(tmp_path, "weak", "strong", controls=[f"text_only={tmp_path / 'text.json'}"])[1]
    told = "Open: Whether option texts alone do better than guessing cannot be told: weak (32.5 %) and strong (32.5 %)."
    assert told in story_of(page)


def test_open_questions_alone(tmp_path: Path) -> None:
    fields = {"options": [], "gold": "cyst", "chance": None, "token_f1": 0.5, "text": "cyst", "letter": None}
    files = [write(tmp_path, name, rows_of(name, **fields, outcome="text")) for name in ("base", "weak", "strong")]
    result = several_from_files(files[0], [(None, path) for path in files[1:]], out=tmp_path / "page.html")
    assert result["models"]["models/strong"]["macro"] == 0.75
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Scores of open questions" in page and "Accuracy in numbers" not in page and "None" not in page


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medr1.cli import app

    files = {name: write(tmp_path, name, rows_of(name)) for name in ("base", "weak", "strong")}
    command = ["report", "--base", str(files["base"]), "--out", str(tmp_path / "page.html")]
    both = [*command, "--trained", f"sft={files['weak']}", "--trained", f"grpo={files['strong']}"]

    def run(*words: str) -> str:
        app([*words], standalone_mode=False)
        return capsys.readouterr().out

    assert "sft 32.5 %: +2.5 points, within the noise" in run(*both)
    assert list(json.loads(run(*both, "--json"))["models"]) == ["sft", "grpo"]
    run(*command, "--trained", f"sft={files['weak']}")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<dt>after</dt><dd>sft</dd>" in page and "before and after training" in page
    for words, line in (
        ([*both, "--calibration", "c.json"], r"c\.json: is of one model"),
        ([*both, "--faithfulness", "folder"], "folder: is of one model"),
        ([*command, "--trained", str(files["weak"]), "--run", "a", "--run", "b"], "given 2 times for one model"),
    ):
        with pytest.raises(MedR1Error, match=line):
            run(*words)


def test_one_chooses_whose_reply_stands_beside_the_bases(browser: Any, tmp_path: Path) -> None:
    page_of(tmp_path, "weak", "strong")
    page = browser.new_page()
    page.set_default_timeout(120_000)  # a busy machine is no fault of the page
    page.goto((tmp_path / "page.html").as_uri())
    article = page.locator("#samples article").first
    assert article.locator(".reply h3").all_inner_texts()[1].startswith("weak")
    page.select_option("#model", "2")
    page.select_option("#change", "turned right")
    assert page.locator("#count").inner_text() == "20 of 72 shown"
    heads = page.locator("#samples article").first.locator(".reply h3").all_inner_texts()
    assert [head.split()[0] for head in heads] == ["base", "strong"]
    page.select_option("#model", "")
    assert page.locator("#samples article").first.locator(".reply").count() == 3
    assert page.locator("#outcome").is_hidden()
    page.select_option("#change", "some right, some wrong")
    assert page.locator("#count").inner_text() == "20 of 72 shown"
    page.close()
