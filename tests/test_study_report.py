"""The study's report from planted studies: what its first screen claims, its numbers, exports, and its viewer."""

import base64
import csv
import gzip
import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import medr1.study.report as study_report
from medr1.data.records import LETTERS, MODALITIES, QUESTION_TYPES, append_jsonl, read_jsonl, write_atomic
from medr1.errors import MedR1Error
from medr1.evaluation.metrics import accuracy_table
from medr1.study.exports import study_tables
from medr1.study.numbers import StudyResults, _prior_average, study_numbers
from medr1.study.report import tell, write_study_report

NASTY = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> </script> B & A"
VALUES = {"modality": MODALITIES, "question_type": QUESTION_TYPES}


class Planted:
    """A made study whose true accuracies are known: rows are drawn with a seed from the accuracy of each cell."""

    base, own, others, blank, prior = 0.40, 0.90, 0.45, 0.35, 0.35

    def __init__(self, folder: Path, *, num_images: int = 20, values: int = 3, seeds: tuple[int, ...] = (0,), **true):
        self.folder, self.seeds = folder, seeds
        self.values = {axis: names[:values] for axis, names in VALUES.items()}
        self.trained_on = self.values
        self.shuffled: dict[str, float] = {}  # by method, where it is not as blank
        self.has = lambda method, value, seed: True  # whether a cell was trained
        vars(self).update(true)
        self.records = [
            {
                "id": f"{modality}-{number}-{kind}",
                "modality": modality,
                "question_type": question_type,
                "source": "made",
                "group": f"{modality}-{number}",
                "images": [f"../images/{modality}.png"],
                "question": f"Which {question_type.lower()} fits?",
                "options": ["Cyst", "Tumour <i>", "Abscess", "None of these"],
                "gold": LETTERS[(number + kind) % 4],
                "chance": 0.25,
            }
            for modality in self.values["modality"]
            for number in range(num_images)
            for kind, question_type in enumerate(self.values["question_type"])
        ]
        self.evaluations: list[dict] = []
        self.runs: list[dict] = []

    def rows(self, accuracy, seed: str, records=None, **fields) -> list[dict]:
        """Rows of which a fraction accuracy(record) is right."""
        draw = random.Random(seed)
        rows = []
        for record in self.records if records is None else records:
            right = draw.random() < accuracy(record)
            letter = record["gold"] if right else LETTERS[(LETTERS.index(record["gold"]) + draw.randint(1, 3)) % 4]
            name = record["options"][LETTERS.index(letter)]
            rows.append(
                {
                    "key": "0",
                    **record,
                    "model": "made",
                    "reply": f"<think>It looks like {name}.</think><answer>{letter}</answer>",
                    "finish": "stop",
                    "tokens": 12,
                    "seconds": 0.1,
                    "outcome": "letter",
                    "letter": letter,
                    "correct": right,
                    "format_ok": True,
                    "extractor_version": 1,
                    **fields,
                }
            )
        return rows

    def add(self, method, mode, axis, value, seed, rows, condition="image") -> None:
        file = f"evaluations/{len(self.evaluations)}.jsonl"
        (self.folder / "evaluations").mkdir(exist_ok=True)
        draw = random.Random(file)
        rows = [{**row, "condition": condition, "mode": mode} for row in rows]
        append_jsonl(self.folder / file, draw.sample(rows, len(rows)))  # a resumed evaluation has another order
        self.evaluations.append(
            {"method": method, "mode": mode, "axis": axis, "trained_on": value, "seed": seed, "model": "made",
             "condition": condition, "rows": file}
        )  # fmt: skip

    def write(
        self, methods=(("sft", "no-think"), ("grpo", "think"), ("grpo", "no-think")), controls=("blank",)
    ) -> Path:
        """Write everything; returns the folder."""
        (self.folder / "images").mkdir()
        for index, modality in enumerate(self.values["modality"]):
            Image.new("RGB", (300, 200), (40 * index, 90, 120)).save(self.folder / f"images/{modality}.png")
        modes = dict.fromkeys(mode for _, mode in methods)
        for mode in modes:
            self.add("base", mode, None, None, None, self.rows(lambda _: self.base, f"base {mode}", mode=mode))
        for condition, seed in (("permuted", 1), ("repeat", 0)):
            rows = self.rows(lambda _: self.base, f"base {next(iter(modes))}" if seed == 0 else "permuted")
            self.add("base", next(iter(modes)), None, None, None, rows, condition)
        self.add("baseline", "no-think", None, None, None, self.rows(lambda _: 0.6, "baseline"))
        for axis, values in self.trained_on.items():
            for value in values:
                for method, mode in methods:
                    for seed in (seed for seed in self.seeds if self.has(method, value, seed)):
                        self._cell(method, mode, axis, value, seed, controls)
        priors = []
        for axis, values in self.trained_on.items():
            for value in values:
                rows = [{**r, "correct": self.prior if r[axis] == value else 0.25} for r in self.records]
                priors.append({"axis": axis, "trained_on": value, "table": accuracy_table(rows)})
        results = {
            "study": {
                "name": "Planted",
                "recipe": {
                    "model": {"name": "tiny"},
                    "data": {"path": "made-data", "split_seed": 0},
                },
                "grpo": {"grpo": {"rewards": {"accuracy": 1.0}}},
            },
            "evaluations": self.evaluations,
            "priors": priors,
            "runs": self.runs,
            "versions": {"python": "3", "medr1": "0"},
            "disk_bytes": 12_000_000,
            "recipe_hash": "0123456789abcdef",
            "data_sha256": "fedcba9876543210",
        }
        write_atomic(self.folder / "results.json", json.dumps(results))
        return self.folder

    def _cell(self, method, mode, axis, value, seed, controls) -> None:
        name = f"{axis} {value} {method} {mode} {seed}"
        answers = self.rows(lambda record: self.own if record[axis] == value else self.others, name, mode=mode)
        self.add(method, mode, axis, value, seed, answers)
        own = [record for record in self.records if record[axis] == value]
        for condition in controls:
            blind = self.shuffled.get(method, self.blank) if condition == "shuffled" else self.blank
            rows = self.rows(lambda _, blind=blind: blind, f"{name} {condition}", own, mode=mode)
            self.add(method, mode, axis, value, seed, rows, condition)
        folder = f"runs/{name.replace(' ', '-')}"
        (self.folder / folder).mkdir(parents=True)
        learned = "loss" if method == "sft" else "reward_accuracy"
        append_jsonl(self.folder / folder / "log.jsonl", [{"step": s, learned: s / 20} for s in range(1, 11)])
        self.runs.append(
            {"folder": folder, "axis": axis, "trained_on": value, "method": method, "mode": mode, "seed": seed,
             "seconds": 31.5, "steps": 10, "examples": 160}
        )  # fmt: skip


def planted(folder: Path, **true) -> Path:
    folder.mkdir()
    return Planted(folder, **true).write()


@pytest.fixture(scope="module")
def on_image(tmp_path_factory) -> Path:
    """A study that uses the image, with its report."""
    folder = planted(tmp_path_factory.mktemp("studies") / "image")
    rows = read_jsonl(folder / "evaluations/0.jsonl")
    rows[0]["reply"] = NASTY
    write_atomic(folder / "evaluations/0.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_study_report(folder)
    return folder


def first_screen(folder: Path) -> str:
    page = (folder / "report.html").read_text(encoding="utf-8")
    return " ".join(page.split("<body>")[1].split("What training changed</h2>")[0].split())


def viewer_data(folder: Path) -> dict:
    page = (folder / "report.html").read_text(encoding="utf-8")
    packed = re.search(r'<script type="application/gzip" id="data">(.*?)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_where_the_image_is_used_the_first_screen_says_so(on_image: Path):
    screen = first_screen(on_image)
    assert '<p class="verdict good">The image is used.</p>' in screen
    assert "beyond the noise in 6 of 6 ways of training" in screen
    assert "trained models score above that in 6 of 6" in screen
    assert "on what it was trained on: all 6 better" in screen
    assert "on what it was not trained on: all 6 within the noise" in screen
    assert "GRPO against SFT: all 8 within the noise" in screen
    assert "against no-think: all 4 within the noise" in screen
    assert "Research use only. Not a medical device, not for clinical use." in screen


def test_where_text_gives_the_answers_away_the_first_screen_says_so(tmp_path: Path):
    folder = planted(tmp_path / "text", own=0.95, blank=0.95, prior=0.95)
    summary = write_study_report(folder)
    assert summary["image"] == "bad"
    screen = first_screen(folder)
    told = "The answers can be guessed from the text alone, and nothing shows that the image is used."
    assert f'<p class="verdict bad">{told}</p>' in screen
    assert "score 95.0 % (guessing 25.0 %); trained models score above that in 0 of 6" in screen


def test_the_verdict_tells_ways_of_training_apart(on_image: Path):
    lines = study_numbers(StudyResults(on_image))["lines"]
    high = {"accuracy": 0.95, "ci95": [0.9, 0.99], "n": 3, "chance": 0.25}
    noise = {"cost": {"difference": 0.0, "verdict": "noise"}}
    one = [{**lines[0], "prior": high}, *lines[1:]]
    assert tell({"lines": one, "comparisons": []})[0] == (
        "open",
        "Nothing shows that the image is what is used in 1 of 6 ways of training.",
    )
    modality = [{**line, "prior": high} if line["axis"] == "modality" else line for line in lines]
    assert tell({"lines": modality, "comparisons": []})[0] == (
        "bad",
        "The answers can be guessed from the text alone within one modality.",
    )
    alone = [line for line in modality if line["axis"] == "modality"]
    assert tell({"lines": alone, "comparisons": []})[0] == tell({"lines": modality, "comparisons": []})[0]
    blind = [{**line, "controls": {"blank": noise}} for line in lines[:2]]
    assert tell({"lines": [*blind, *lines[2:]], "comparisons": []})[0][0] == "open"
    assert tell({"lines": blind, "comparisons": []})[0] == ("bad", "Nothing here shows that the image is used.")
    worse = {"cost": {"difference": -0.1, "verdict": "down"}}  # with the image than with a blank one
    story = tell({"lines": [{**lines[0], "controls": {"blank": worse}}, *blind], "comparisons": []})[1]
    said = [(worth, line.split(", beyond ")[1]) for worth, line in story if "image blanked" in line]
    assert said == [("bad", "the noise in 1 of 3 ways of training.")]


@pytest.mark.parametrize(
    ("true", "controls", "worth", "words"),
    [
        ({"blank": 0.9}, ("blank",), "bad", "Nothing here shows that the image is used."),
        ({"blank": 0.35, "prior": 0.99}, ("blank",), "bad", "The answers can be guessed from the text alone."),
        ({"own": 0.25, "blank": 0.25, "prior": 0.25}, ("blank",), "bad", "Nothing here shows that the image is used."),
        ({}, (), "open", "Whether the image is used is not known: no blank-image control was run."),
    ],
)
def test_the_verdict_is_no_better_than_the_controls(tmp_path: Path, true: dict, controls, worth: str, words: str):
    (tmp_path / "study").mkdir()
    folder = Planted(tmp_path / "study", **true).write(controls=controls)
    summary = write_study_report(folder)
    assert (summary["image"], summary["verdict"]) == (worth, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([(0.0, "noise")] * 4, "Training changed nothing: +0.0 points everywhere. The image is used."),
        (
            [(0.01, "noise"), (-0.0001, "noise")],
            "Nothing shows that training changed accuracy: +0.0 to +1.0 points, none of it beyond the noise. The image"
            " is used.",
        ),
        (
            [(-0.2, "down"), (0.01, "noise")],
            "Training lowered accuracy in 1 of 2 comparisons with the base, and raised it in none. The image is used.",
        ),
        ([(0.2, "up"), (-0.2, "down")], "The image is used."),
    ],
)
def test_where_training_bettered_nothing_that_is_said_first(on_image: Path, changes: list, words: str):
    made = [
        {"kind": "base", "side": side, "difference": by, "verdict": verdict}
        for side in ("own", "others")
        for by, verdict in changes[:: 1 if side == "own" else -1][: len(changes) // 2]
    ]
    lines = study_numbers(StudyResults(on_image))["lines"]
    assert tell({"lines": lines, "comparisons": made})[0] == (
        "good" if words == "The image is used." else "open",
        words,
    )


def test_a_matrix_of_the_bases_numbers_is_folded_and_cells_stand_in_words(tmp_path: Path, on_image: Path):
    (tmp_path / "study").mkdir()
    made = Planted(tmp_path / "study")
    drawn = made.rows
    made.rows = lambda accuracy, seed, records=None, **fields: drawn(lambda _: 0.4, "one", made.records, **fields)
    page = (Path(write_study_report(made.write(controls=()))["report"])).read_text(encoding="utf-8")
    assert page.count('<details class="matrix"') == page.count("every number is the base’s</summary>") == 6
    assert '<details class="matrix" open' not in page and "Training changed nothing" in page
    page = (on_image / "report.html").read_text(encoding="utf-8")
    assert page.count('<details class="matrix" open') == 6
    assert "title=" not in page.split("<script")[0] and "Hover" not in page
    assert "<li>trained on MRI, tested on CT: " in page


@pytest.mark.parametrize("trained", [1, 2, 3])
def test_the_base_is_averaged_over_the_questions_of_the_models_beside_it(tmp_path: Path, trained: int):
    (tmp_path / "study").mkdir()
    made = Planted(tmp_path / "study")
    made.trained_on = {axis: values[:trained] for axis, values in made.values.items()}
    numbers = study_numbers(StudyResults(made.write()))
    answers = read_jsonl(made.folder / "evaluations/0.jsonl")  # the base's, in no-think
    for table in study_tables(StudyResults(made.folder), numbers):
        if table.name in ("averages", "controls"):  # of how many values an average is
            assert all(line[1].endswith(f" ({trained} of 3)") == (trained < 3) for line in table.lines)

    def accuracy(axis: str, values) -> float:
        parts = [[row["correct"] for row in answers if row[axis] == value] for value in values]
        return sum(sum(part) / len(part) for part in parts) / len(parts)

    for axis, values in made.values.items():
        own = values[:trained]
        others = values[1:] if trained == 1 else values  # what at least one model was not trained on
        base = next(b for b in numbers["bases"] if (b["axis"], b["mode"]) == (axis, "no-think"))
        assert base["own"]["accuracy"] == pytest.approx(accuracy(axis, own))
        assert base["others"]["accuracy"] == pytest.approx(accuracy(axis, others))
        sft = next(line for line in numbers["lines"] if (line["axis"], line["method"]) == (axis, "sft"))
        assert sft["base"] == base["own"]
        for side in ("own", "others"):
            change = next(
                c["difference"] for c in numbers["comparisons"]
                if (c["axis"], c["side"], c["kind"], c["after"]) == (axis, side, "base", "SFT no-think")
            )  # fmt: skip
            assert change == pytest.approx(sft[side]["accuracy"] - base[side]["accuracy"])


def test_numbers_against_their_slow_definition(tmp_path: Path):
    (tmp_path / "study").mkdir()
    made = Planted(tmp_path / "study", seeds=(0, 1))
    made.write(controls=("blank", "shuffled"))
    study = StudyResults(made.folder)
    numbers = study_numbers(study)

    def accuracy(value: str, tested_on: str, method="grpo", mode="think") -> float:
        """Mean over seeds of the accuracy of a cell, straight from the files."""
        right = [
            row["correct"]
            for e in made.evaluations
            if (e["method"], e["mode"], e["trained_on"], e["condition"]) == (method, mode, value, "image")
            for row in read_jsonl(made.folder / e["rows"])
            if tested_on in (row["modality"], row["question_type"])
        ]
        return sum(right) / len(right)

    for axis, values in made.values.items():
        line = next(n for n in numbers["lines"] if (n["axis"], n["label"]) == (axis, "GRPO think"))
        own = [accuracy(value, value) for value in values]
        others = [accuracy(value, other) for value in values for other in values if other != value]
        assert line["own"]["accuracy"] == pytest.approx(sum(own) / 3)
        assert line["others"]["accuracy"] == pytest.approx(sum(others) / 6)
        assert line["whole"]["accuracy"] == pytest.approx(sum(own + others) / 9)
        assert line["seeds"] == [0, 1]
        assert sum(line["seeds_own"]) / 2 == pytest.approx(sum(own) / 3)
        table = next(m for m in numbers["matrices"] if (m["axis"], m["label"]) == (axis, "GRPO think"))
        bases = [cell["base"] for cell in table["rows"][0]["cells"]]
        gain = next(
            c["difference"] for c in numbers["whole"]
            if (c["axis"], c["kind"], c["after"]) == (axis, "base", "GRPO think")
        )  # fmt: skip
        assert gain == pytest.approx(line["whole"]["accuracy"] - sum(bases) / 3)
        for row in table["rows"]:
            for cell in row["cells"]:
                assert cell["accuracy"] == pytest.approx(accuracy(row["trained_on"], cell["tested_on"]))
                assert sum(cell["seeds"]) / 2 == pytest.approx(cell["accuracy"])
                assert cell["n"] == 60  # 20 images, 3 types or modalities: a seed is no further question
                assert cell["change"]["difference"] == pytest.approx(cell["accuracy"] - cell["base"])
        sft = next(n for n in numbers["lines"] if (n["axis"], n["method"]) == (axis, "sft"))
        compared = next(
            c for c in numbers["comparisons"]
            if (c["axis"], c["side"], c["kind"], c["after"]) == (axis, "own", "sft", "GRPO think")
        )  # fmt: skip
        assert compared["difference"] == pytest.approx(line["own"]["accuracy"] - sft["own"]["accuracy"])
        blank = line["controls"]["blank"]
        assert blank["cost"]["difference"] == pytest.approx(line["own"]["accuracy"] - blank["accuracy"])
        assert line["prior"]["accuracy"] == pytest.approx(0.35)
    assert [flips["label"] for flips in numbers["order"]] == ["base no-think"]
    assert numbers["order"][0]["repeat"]["rate"] == 0
    assert numbers["order"][0]["permuted"]["rate"] > 0.5


def test_seeds_and_values_that_not_all_have(tmp_path: Path):
    """Seeds are averaged before values, and two ways of training compared over the models that both have."""
    made = Planted(tmp_path, seeds=(0, 1), shuffled={"grpo": 0.8, "looking": 0.3})
    made.trained_on = {"modality": made.values["modality"]}
    every = made.values["modality"]
    trained = {"sft": {0: every}, "grpo": {0: every, 1: ["CT"]}, "looking": {0: ["CT", "MRI"], 1: ["CT"]}}
    made.has = lambda method, value, seed: value in trained[method].get(seed, ())
    made.write((("sft", "no-think"), ("grpo", "think"), ("looking", "think")), controls=("blank", "shuffled"))
    numbers = study_numbers(StudyResults(made.folder))
    lines = {line["method"]: line for line in numbers["lines"]}
    right = {
        (e["method"], e["trained_on"], e["seed"], e["condition"], row["id"]): row["correct"]
        for e in made.evaluations
        for row in read_jsonl(made.folder / e["rows"])
    }

    def share(method: str, value: str, tested: str, seeds: tuple, condition: str = "image") -> float:
        """Accuracy of a cell, the mean of those of its seeds."""
        ids = [record["id"] for record in made.records if record["modality"] == tested]
        by_seed = [sum(right[method, value, seed, condition, i] for i in ids) / len(ids) for seed in seeds]
        return sum(by_seed) / len(by_seed)

    seeds = {"CT": (0, 1), "MRI": (0,), "Ultrasound": (0,)}
    values = [*seeds]
    own = [share("grpo", value, value, seeds[value]) for value in values]
    others = [
        sum(share("grpo", value, tested, seeds[value]) for value in values if value != tested) / 2 for tested in values
    ]
    grpo, looking = lines["grpo"], lines["looking"]
    assert grpo["own"]["accuracy"] == pytest.approx(sum(own) / 3)
    assert grpo["others"]["accuracy"] == pytest.approx(sum(others) / 3)
    assert (grpo["values"], grpo["num_values"], grpo["num_seeded"]) == (values, 3, 1)
    assert grpo["seeds_own"] == pytest.approx([share("grpo", "CT", "CT", (seed,)) for seed in (0, 1)])
    assert (looking["values"], looking["own"]["n"], looking["seeds"]) == (["CT", "MRI"], 2, [0, 1])
    assert looking["label"] == "GRPO, looking, think" and looking["prior"]["n"] == 2

    found = {(c["kind"], c["side"], c["after"]): c for c in numbers["comparisons"]}
    against_sft = found["sft", "own", "GRPO think"]  # SFT has seed 0 alone
    expected = [share("grpo", value, value, (0,)) - share("sft", value, value, (0,)) for value in values]
    assert (against_sft["models"], against_sft["difference"]) == (3, pytest.approx(sum(expected) / 3))
    kept = {"CT": (0, 1), "MRI": (0,)}
    change = found["looking", "own", "GRPO, looking, think"]
    expected = [share("looking", v, v, kept[v]) - share("grpo", v, v, kept[v]) for v in kept]
    assert (change["models"], change["difference"]) == (3, pytest.approx(sum(expected) / 2))
    change = found["looking", "others", "GRPO, looking, think"]  # Ultrasound is asked of both, CT of MRI's alone
    others = {"CT": ["MRI"], "MRI": ["CT"], "Ultrasound": ["CT", "MRI"]}
    expected = [
        sum(share("looking", v, tested, kept[v]) - share("grpo", v, tested, kept[v]) for v in of) / len(of)
        for tested, of in others.items()
    ]
    assert change["difference"] == pytest.approx(sum(expected) / 3)
    relied = {
        method: [share(method, v, v, kept[v]) - share(method, v, v, kept[v], "shuffled") for v in kept]
        for method in ("grpo", "looking")
    }
    change = found["reliance", "own", "GRPO, looking, think"]
    assert change["difference"] == pytest.approx((sum(relied["looking"]) - sum(relied["grpo"])) / 2)
    assert (change["models"], change["n"], change["verdict"]) == (3, 120, "up")
    assert ("reliance", "others", "GRPO, looking, think") not in found and len(found) == 3 * 2 + 2 + 2 + 1

    write_study_report(made.folder)
    whole = {(c["kind"], c["after"]): c for c in numbers["whole"]}["looking", "GRPO, looking, think"]
    rows = [row for row in csv.DictReader((made.folder / "tables/whole.csv").open()) if row["before"] == "GRPO think"]
    for side, method in (("accuracy", "looking"), ("accuracy_before", "grpo")):  # of CT and MRI, which both have
        compared = [sum(share(method, v, tested, kept[v]) for v in kept) / 2 for tested in values]
        assert whole[side]["accuracy"] == float(rows[0][side]) == pytest.approx(sum(compared) / 3)
    assert (whole["accuracy"]["n"], rows[0]["num_values"], rows[0]["questions"]) == (3, "3", str(len(made.records)))
    screen = first_screen(made.folder)
    assert "On each of 3 modalities: SFT no-think; GRPO think. On CT, MRI: GRPO, looking, think." in screen
    assert "Seeds 0, 1 (not of all). 10 trained models" in screen
    assert "looking against plain GRPO: 1 better" in screen
    page = (made.folder / "report.html").read_text(encoding="utf-8")
    assert "CT, MRI alone; base there" in page and "over the 1 that have each" in page
    assert "trains on as many in as many steps, which are other ones by design" in page
    table = (made.folder / "tables/averages.md").read_text(encoding="utf-8")
    assert "| GRPO, looking, think (2 of 3) |" in table and "| GRPO think |" in re.sub(" +", " ", table)
    rows = list(csv.DictReader((made.folder / "tables/comparisons.csv").open()))
    assert [row["after"] for row in rows if row["measure"] == "reliance"] == ["GRPO, looking, think"]
    assert (made.folder / "tables/matrix-modality-grpo-looking-think.csv").is_file()
    panels = re.findall(r'aria-label="Learning curves, (\w+): ([^"]*)"', page)
    assert ("Ultrasound", "GRPO think") in panels and ("CT", "GRPO think, GRPO, looking, think") in panels


def test_priors_of_shared_patients_are_not_independent():
    """Two modalities, both 0.5 (0.3 to 0.7): of the same patients one and the same, of others two of half the error."""
    cells = [{"accuracy": 0.5, "ci95": [0.3, 0.7], "n": 20, "chance": 0.25}] * 2
    same, apart = (_prior_average(cells, groups) for groups in (["abc", "abc"], ["abc", "def"]))
    assert same["ci95"] == pytest.approx([0.3, 0.7]) and same["questions"] == 40
    assert apart["ci95"] == pytest.approx([0.5 - 0.2 / 2**0.5, 0.5 + 0.2 / 2**0.5])
    assert _prior_average([], []) == {"accuracy": None, "chance": None, "ci95": None, "n": 0, "questions": 0}


def test_kept_gains_name_their_axis(on_image: Path):
    spec = importlib.util.spec_from_file_location("collect", Path(__file__).parents[1] / "results" / "collect.py")
    collect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collect)
    lines = [line.split("|") for line in collect.gains(StudyResults(on_image)).splitlines()[2:]]
    assert {label.strip() for _, label, *_ in lines} >= {"GRPO think, one modality", "GRPO think, one question type"}
    assert len({(label, kind) for _, label, kind, *_ in lines}) == len(lines)


def test_whether_each_way_of_training_looks(tmp_path: Path):
    """By the controls that there are: the base and the trained models with another image, seeds averaged a question."""
    study = Planted(tmp_path, num_images=6, values=2, seeds=(0, 1))
    folder = study.write(methods=(("grpo", "think"),), controls=("blank", "shuffled"))
    numbers = study_numbers(StudyResults(folder))
    for line in numbers["lines"]:
        looked, blank = line["looking"], line["controls"]["blank"]
        assert list(looked) == ["reliance", "reliance_blank", "sensitivity", "claims", "hallucinated"]
        assert looked["reliance_blank"]["value"] == pytest.approx(blank["cost"]["difference"])  # values of one size
        assert looked["reliance_blank"]["n"] == blank["cost"]["n"] and looked["reliance"]["change"] is None
        assert looked["claims"] == {"value": 0, "ci95": looked["claims"]["ci95"], "n": looked["reliance"]["n"]} | {
            "change": looked["claims"]["change"]
        }
        assert 0 < looked["sensitivity"]["value"] < 1
    study.add("base", "think", None, None, None, study.rows(lambda _: study.base, "other", mode="think"), "shuffled")
    results = json.loads((folder / "results.json").read_text()) | {"evaluations": study.evaluations}
    write_atomic(folder / "results.json", json.dumps(results))
    moved = study_numbers(StudyResults(folder))["lines"][0]["looking"]["reliance"]
    assert moved["change"]["n"] == moved["n"] and moved["change"]["difference"] > 0
    write_study_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Does it look?</h2>" in page and "answers that change with the image" in page


def test_nothing_within_the_noise_is_marked(tmp_path: Path):
    folder = planted(tmp_path / "noise", own=0.4, others=0.4)
    write_study_report(folder)
    tables = (folder / "report.html").read_text(encoding="utf-8").split('<details class="matrix"')[1:]
    assert len(tables) == 6
    for table in tables:
        assert not re.search("▲|▼|background", table.split("</details>")[0])
    assert "all 6 within the noise" in first_screen(folder)


def test_cells_under_the_least_number_are_too_few(tmp_path: Path):
    folder = planted(tmp_path / "few", num_images=9, own=1.0)  # 9 images, 3 questions each: 27 a cell
    write_study_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<small>too few</small>") == 6 * 9
    assert (
        "▲"
        not in page.split("Trained on one, tested on all</h2>")[1].split("Is it the image?")[0].split("<table>", 1)[1]
    )


def test_the_page_stands_alone_and_model_text_stays_text(on_image: Path):
    page = (on_image / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert str(on_image) not in page
    assert "<script>document" not in page and "<img src=x" not in page
    assert NASTY in viewer_data(on_image)["texts"]
    assert "None" not in page.split("<script")[0].replace("None of these", "")
    assert "nan" not in page.split("<body>")[1].split("<script")[0].lower()


def test_the_same_study_gives_the_same_report(on_image: Path, tmp_path: Path):
    """Whatever the order in which a resumed evaluation left its rows."""
    again = planted(tmp_path / "again")
    rows = read_jsonl(again / "evaluations/0.jsonl")
    changed = read_jsonl(on_image / "evaluations/0.jsonl")[0]
    rows = sorted(
        ({**row, "reply": NASTY} if row["id"] == changed["id"] else row for row in rows), key=lambda r: r["id"]
    )
    write_atomic(again / "evaluations/0.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_study_report(again)
    for file in ("report.html", "samples.md", "model-card.md", "tripod-llm.md", "tables/averages.tex"):
        assert (again / file).read_bytes() == (on_image / file).read_bytes()


def test_the_viewer_holds_own_domain_replies_once(on_image: Path):
    data = viewer_data(on_image)
    assert len(data["id"]) == 180
    assert [way["label"] for way in data["ways"]][:2] == ["SFT no-think, own modality", "GRPO think, own modality"]
    way = data["ways"][1]
    trained = {
        row["id"]: row["reply"]
        for e in json.loads((on_image / "results.json").read_text())["evaluations"]
        if (e["axis"], e["mode"], e["condition"]) == ("modality", "think", "image")
        for row in read_jsonl(on_image / e["rows"])
        if row["modality"] == e["trained_on"]
    }
    shown = dict(zip(data["id"], (data["texts"][place] for place in data["sets"][way["after"]]["reply"]), strict=True))
    assert shown == trained
    assert len(set(data["texts"])) == len(data["texts"])


def test_a_large_study_keeps_a_sample_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study_report, "MAX_ROWS", 6 * 50)
    monkeypatch.setattr(study_report, "MAX_THUMBNAILS", 1)
    folder = planted(tmp_path / "large")
    (folder / "images/CT.png").unlink()
    write_study_report(folder)
    page = " ".join((folder / "report.html").read_text(encoding="utf-8").split())
    data = viewer_data(folder)
    assert "50 of 180 questions, drawn at random" in page
    assert "Pictures of 1 of 3 images are in this page" in page
    assert len(data["id"]) == 50
    pictured = [places == [0] for places in data["images"]]
    assert pictured == sorted(pictured, reverse=True) and any(pictured)


def test_tables_for_citing(on_image: Path):
    numbers = study_numbers(StudyResults(on_image))
    with (on_image / "tables/matrix-modality-grpo-think.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["trained_on"] == "MRI"]
    cells = next(m for m in numbers["matrices"] if m["label"] == "GRPO think")["rows"][1]["cells"]
    assert [float(row["accuracy"]) for row in rows] == [cell["accuracy"] for cell in cells]
    assert [row["verdict"] for row in rows] == ["noise", "up", "noise"]
    with (on_image / "tables/averages.csv").open() as file:
        base = next(csv.DictReader(file))
    assert base["model"] == "base think" and base["difference"] == ""  # undefined is empty, never 0
    assert (base["num_values"], base["questions"]) == ("3", "180")  # three modalities, 60 questions each
    with (on_image / "tables/models.csv").open() as file:
        counts = [(row["average"], row["num_values"], row["questions"]) for row in csv.DictReader(file)]
    assert counts[:3] == [("all questions", "", "180"), ("modality", "3", "180"), ("question_type", "3", "180")]
    names = {path.stem for path in (on_image / "tables").iterdir()}
    assert {"averages", "whole", "comparisons", "controls", "option-order", "models", "runs"} < names
    for name in names:
        latex = (on_image / f"tables/{name}.tex").read_text(encoding="utf-8")
        assert latex.isascii() and latex.count("\\begin") == latex.count("\\end") == 2
        assert not re.search(r"(?<!\\)[%_#]", latex)
        for kind in ("md", "tex", "csv"):
            assert not re.search(r"\b(None|nan)\b", (on_image / f"tables/{name}.{kind}").read_text(encoding="utf-8"))


def test_model_card_and_tripod_table(on_image: Path):
    content = (on_image / "model-card.md").read_text(encoding="utf-8")
    card = ModelCard(content, ignore_metadata_errors=False)
    lines = study_numbers(StudyResults(on_image))["lines"]
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured["GRPO think, trained on one modality each, tested on the same"] == pytest.approx(
        lines[1]["own"]["accuracy"], abs=1e-4
    )
    assert len(measured) == 2 * len(lines)
    assert card.data.base_model == "tiny"
    assert "The image is used." in card.text and "not for clinical use" in card.text
    tripod = (on_image / "tripod-llm.md").read_text(encoding="utf-8")
    assert [int(line.split("|")[1]) for line in tripod.splitlines() if re.match(r"\| \d", line)] == list(range(1, 20))
    assert "| Ethical approval" in tripod and "not reported" in tripod


def test_what_a_study_no_longer_has_leaves_no_table(tmp_path: Path):
    """Of questions without a modality, and then by SFT alone: no name None, no reward, no earlier matrix or curve."""
    made = Planted(tmp_path, num_images=8, values=2)
    made.trained_on = {"question_type": made.values["question_type"]}
    for record in made.records:
        record["modality"] = None
    write_study_report(made.write())
    assert (tmp_path / "tables/matrix-question-type-grpo-think.csv").is_file()
    results = json.loads((tmp_path / "results.json").read_text())
    for part in ("evaluations", "runs"):
        results[part] = [entry for entry in results[part] if entry["method"] != "grpo"]
    write_atomic(tmp_path / "results.json", json.dumps(results))
    assert "rewards accuracy" in (tmp_path / "tripod-llm.md").read_text(encoding="utf-8")
    write_study_report(tmp_path)
    left = {path.name for folder in ("tables", "figures") for path in (tmp_path / folder).iterdir()}
    assert "matrix-question-type-sft-no-think.csv" in left and "question-type.svg" in left
    assert not [name for name in left if "grpo" in name or "right-answers" in name]
    assert "rewards" not in (tmp_path / "tripod-llm.md").read_text(encoding="utf-8")
    assert not re.search(r"\bNone\b(?! of these)", (tmp_path / "samples.md").read_text(encoding="utf-8"))


def test_samples_are_drawn_by_seed_and_kept_as_text(on_image: Path):
    text = (on_image / "samples.md").read_text(encoding="utf-8")
    names = [line.split(",")[0].removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    asked = sorted({row["id"] for row in read_jsonl(on_image / "evaluations/0.jsonl")})
    assert names == random.Random(0).sample(asked, 10)
    assert text.count("\nBefore, ") == text.count("\nAfter, ") == 10
    assert "GRPO think" in text and "not for clinical use" in text


def test_folders_without_a_finished_study(tmp_path: Path):
    with pytest.raises(MedR1Error, match=r"results\.json: holds no finished study"):
        write_study_report(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(MedR1Error, match=r"results\.json: holds no finished study"):
        write_study_report(tmp_path)
    (tmp_path / "study").mkdir()
    folder = Planted(tmp_path / "study").write()
    (folder / "evaluations/0.jsonl").unlink()
    with pytest.raises(MedR1Error, match=r"0\.jsonl: no such file"):
        write_study_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_samples_are_filtered_and_opened(browser, on_image: Path, width: int):
    page = browser.new_page(viewport={"width": width, "height": 844})
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(120_000)  # a busy machine is no fault of the page
    page.goto((on_image / "report.html").as_uri())
    page.wait_for_selector("#samples details")
    assert page.inner_text("#count") == "20 of 180 shown"
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll sideways

    page.select_option("#way", label="GRPO think, own modality")
    page.select_option("#modality", "MRI")
    page.select_option("#question_type", "Disease Diagnosis")
    page.select_option("#change", "turned right")
    page.select_option("#outcome", "right")
    lines = page.locator("#samples details")
    by_id = {row["id"]: row["correct"] for row in read_jsonl(on_image / "evaluations/1.jsonl")}  # the base, think
    turned = [
        row["id"]
        for e in json.loads((on_image / "results.json").read_text())["evaluations"]
        if (e["trained_on"], e["mode"], e["condition"]) == ("MRI", "think", "image")
        for row in read_jsonl(on_image / e["rows"])
        if (row["modality"], row["question_type"]) == ("MRI", "Disease Diagnosis") and row["correct"] > by_id[row["id"]]
    ]
    assert turned and page.inner_text("#count") == f"{len(turned)} of {len(turned)} shown"
    assert lines.count() == len(turned)

    lines.first.locator("summary").click()
    card = lines.first.locator("article")
    card.locator(".pictures img").wait_for(state="attached")  # the browser tells of an opened line a moment later
    assert card.locator(".pictures img").count() == 1
    assert any(name in card.locator(".from").inner_text() for name in turned)
    assert card.locator(".reply").count() == 2
    assert "✓" in card.locator(".reply").nth(1).inner_text()
    assert "Tumour <i>" in card.locator(".options").inner_text()

    page.select_option("#way", label="SFT no-think, own modality")
    for field in ("modality", "question_type", "change", "outcome"):
        page.select_option(f"#{field}", "")
    page.click("#more")
    assert page.inner_text("#count") == "40 of 180 shown"
    page.evaluate("while (!byId('more').hidden) byId('more').click()")
    page.evaluate("for (const head of document.querySelectorAll('#samples summary')) head.click()")
    page.wait_for_function("document.querySelectorAll('#samples article').length === 180")
    assert NASTY in page.locator("#samples").inner_text()
    assert page.title() == "Med-R1 study: Planted"
    assert page.locator("img[src=x]").count() == 0
    assert not faults
    page.close()


def test_on_paper_tables_are_open_and_the_viewer_is_away(browser, on_image: Path):
    page = browser.new_page()
    page.set_default_timeout(120_000)  # a busy machine is no fault of the page
    page.goto((on_image / "report.html").as_uri())
    page.wait_for_selector("#samples details")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not page.is_visible("#viewer")
    assert page.locator("details:not([open])").count() == 0
    assert page.is_visible("text=runs/modality-CT-sft-no-think-0")
    page.close()
