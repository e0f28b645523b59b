"""What heatmaps are worth: hand-computed curves and shares, a model that knows nothing, and the shipped model."""

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_explain import answers_from_cell, record_of
from tiny_vlms import FAMILIES, picture, tiny_vlm

import medr1.trust.explain
import medr1.trust.fidelity as module
from medr1.data.datasets import load_records
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, read_jsonl
from medr1.data.regions import ABOUT_REGION, read_regions
from medr1.errors import MedR1Error
from medr1.policy.vlm import load_vlm
from medr1.report.heatmaps import tell, write_heatmaps_page
from medr1.trust.explain import Heatmap, Subject
from medr1.trust.fidelity import conclude, curves, measure_heatmaps, rank_correlation, shuffled_weights


def test_curves_of_a_model_that_reads_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hiding or showing that cell is the only step that the probability takes."""
    image = Image.new("RGB", (84, 56), (90, 90, 90))
    image.paste((250, 250, 250), (56, 28, 84, 56))
    monkeypatch.setattr(medr1.trust.explain, "option_logprobs", answers_from_cell(5))
    subject = Subject.read(tiny_vlm("qwen2_vl"), record_of(tmp_path, image), mode="no-think")
    with_cell, without = subject.logprobs_without(torch.eye(6, dtype=torch.bool)[[0, 5]])[:, 0].exp().tolist()
    assert with_cell > without + 0.3

    scores = np.array([[0.3, 0.2, 0.1], [0.0, -0.5, 0.9]])
    found = curves(subject, [Heatmap(scores, "A", 0.0)], seed=4)
    assert found["fraction"] == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1])
    assert found["deletion"] == pytest.approx([with_cell, *[without] * 6])
    assert found["insertion"] == pytest.approx([without, *[with_cell] * 6])
    rng = np.random.default_rng(4)
    places = [rng.permutation(6).tolist().index(5) for _ in range(module.RANDOM_ORDERS)]
    plain = np.mean([[with_cell if hidden <= place else without for hidden in range(7)] for place in places], axis=0)
    assert found["random"] == pytest.approx(plain)
    worst = curves(subject, [Heatmap(-scores, "A", 0.0)], seed=4)
    assert worst["deletion"] == pytest.approx([*[with_cell] * 6, without])


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_weights_keep_their_values_and_forget_their_places(family: str) -> None:
    vlm = tiny_vlm(family)
    before = {name: weight.clone() for name, weight in vlm.model.named_parameters()}
    shuffled, again, other = (shuffled_weights(vlm, seed=seed) for seed in (0, 0, 1))
    for name, weight in vlm.model.named_parameters():
        assert torch.equal(weight, before[name]), "the model itself stays"
    moved = 0
    for (name, weight), same, different in zip(
        shuffled.model.named_parameters(), again.model.parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(weight.flatten().sort()[0], before[name].flatten().sort()[0])
        assert torch.equal(weight, same)
        moved += not torch.equal(weight, before[name]) and not torch.equal(weight, different)
    assert moved == sum(len(weight.unique()) > 1 for weight in before.values()), "all but those of one value"
    assert shuffled.core.get_output_embeddings().weight is shuffled.core.get_input_embeddings().weight


def test_rank_correlation_by_hand() -> None:
    first = np.array([0.1, 5.0, 0.2, -3.0])
    assert rank_correlation(first, first**3) == pytest.approx(1)
    assert rank_correlation(first, -first) == pytest.approx(-1)
    # Ranks 2, 4, 3, 1 against 1, 2, 3, 4: squared differences 1 + 4 + 0 + 9, so 1 - 6 * 14 / (4 * 15).
    assert rank_correlation(first, np.arange(4.0)) == pytest.approx(-0.4)
    assert rank_correlation(first, np.ones(4)) is None


def row(group: str, hottest: int, shuffled: int, region: int | None, kind: str = "Disease Diagnosis") -> dict[str, Any]:
    def hot(cell: int) -> list[list[float]]:
        return np.eye(4)[cell].reshape(2, 2).tolist()

    return {
        "group": group,
        "question_type": kind,
        "right": True,
        "maps": [hot(hottest)],
        "shuffled_maps": [hot(shuffled)],
        "regions": [None if region is None else {"cells": (np.array(hot(region)) == 1).tolist(), "boxes": []}],
        "curves": {"fraction": [0, 0.5, 1], "deletion": [1, 0, 0], "insertion": [0, 1, 1], "random": [1, 0.5, 0]},
    }


def test_numbers_by_hand() -> None:
    rows = [
        row("a", 0, 1, 0),
        row("b", 3, 0, 3, "Lesion Grading"),
        row("c", 0, 2, 3),
        row("c", 1, 2, 3, "Modality Recognition"),
        row("d", 2, 2, None),
    ]
    numbers = conclude(rows)
    # Trapezoids of [1, 0, 0], [0, 1, 1] and [1, 0.5, 0] over halves.
    assert [numbers[name]["value"] for name in ("deletion", "insertion", "random")] == [0.25, 0.75, 0.5]
    assert numbers["deletion_gain"]["value"] == numbers["insertion_gain"]["value"] == 0.25
    assert numbers["curves"]["deletion"] == [1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0]
    assert (numbers["n"], numbers["groups"], numbers["flat"]) == (5, 4, 0)
    # One hot cell of four each: the same one correlates by 1, another one by -1/3.
    assert numbers["correlation"]["value"] == pytest.approx((4 * -1 / 3 + 1) / 5)
    about = numbers["pointing"]["about the region"]
    assert about["n"] == 3 and about["chance"] == 0.25
    assert about["hit"]["value"] == pytest.approx(2 / 3) and about["shuffled"]["value"] == 0
    # Maps of the other two: 3 and 0 for the region 0, 0 and 0 for 3, 0 and 3 for 3.
    assert about["other"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert about["over_chance"]["value"] == pytest.approx(2 / 3 - 0.25)
    assert about["overlap"]["value"] == pytest.approx(2 / 3) and about["overlap_chance"] == pytest.approx(0.25)
    assert list(numbers["pointing"]) == [
        "about the region",
        "Modality Recognition",
        "Disease Diagnosis",
        "Lesion Grading",
    ]
    assert numbers["pointing"]["Modality Recognition"]["other"] is None, "there is no other map to compare with"


def test_maps_that_are_no_better_than_chance_are_not_praised() -> None:
    flat = {"fraction": [0, 1], "deletion": [1, 0], "insertion": [0, 1], "random": [1, 0]}
    # The hottest cell is in the region once in four, as a random one is; both models have the same map.
    rows = [row(str(n), n % 4, n % 4, n // 4 % 4) | {"curves": flat} for n in range(32)]
    worths = {worth for worth, _ in tell(conclude(rows) | {"method": "occlusion"})}
    assert "good" not in worths and "bad" in worths


def test_a_comparison_that_was_not_made_is_not_lost() -> None:
    """Maps of images of other sizes have other grids, and say nothing of this image's region."""

    def of_grid(number: int, columns: int) -> dict[str, Any]:
        cells = np.eye(2 * columns)[number % 4].reshape(2, columns)
        other = np.eye(2 * columns)[3].reshape(2, columns)
        inside = {"cells": (cells == 1).tolist(), "boxes": []}
        changed = {"maps": [cells.tolist()], "shuffled_maps": [other.tolist()], "regions": [inside]}
        return row(str(number), 0, 0, 0) | changed

    alone = [of_grid(number, 2 + number) for number in range(40)]
    (worth, said), *_ = tell(conclude(alone))
    assert worth == "good"
    assert said.endswith(
        "beyond the noise it beats a random cell and shuffled weights; "
        "no other map of the same grid is there to compare with."
    )
    (worth, said), *_ = tell(conclude([*alone, *(of_grid(number, 2) for number in range(40, 60))]))
    assert worth == "good" and "another image's map (21 maps have one of the same grid)" in said
    missed = [of_grid(number, 2 + number) for number in range(40)]
    for number, one in enumerate(missed):
        one["maps"] = [np.eye(2 * (2 + number))[-1 - number % 4].reshape(2, -1).tolist()]
    (worth, said), *_ = tell(conclude(missed))
    assert worth == "bad" and "another image" not in said
    alone_here = "; no other map of the same grid is there to compare with."
    assert said.endswith(f"it is not clearly above a random cell or shuffled weights{alone_here}")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "p", num_images=64, seed=11)


def test_the_shipped_model_looks_at_the_lesion_and_a_shuffled_one_does_not(phantoms: Path, tmp_path: Path) -> None:
    records = [record for record in load_records(phantoms) if record.question_type in ABOUT_REGION][::7]
    rows, numbers = measure_heatmaps(load_vlm("tiny"), records, out=tmp_path, regions=read_regions(phantoms))
    about = numbers["pointing"]["about the region"]
    assert about["n"] == len(rows) == len(records) == 19
    assert about["hit"]["ci95"][0] > 3 * about["chance"], "three times as often as a random cell, beyond the noise"
    assert not about["shuffled"]["ci95"][0] > 3 * about["chance"]
    assert min(about[f"over_{rival}"]["ci95"][0] for rival in ("chance", "other", "shuffled")) > 0
    assert about["overlap"]["ci95"][0] > 3 * about["overlap_chance"]
    assert numbers["deletion_gain"]["ci95"][0] > 0 and numbers["insertion_gain"]["ci95"][0] > 0
    assert abs(numbers["correlation"]["value"]) < 0.3
    assert {worth for worth, _ in tell(numbers)} == {"good"}


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The letters that the replies are read as: a model of random weights names none."""
    real, given = module.evaluate, []
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda *arguments, **settings: [
            {**answer, "letter": letter} for answer, letter in zip(real(*arguments, **settings), given, strict=True)
        ],
    )

    def give(*named: str | None) -> None:
        given[:] = named

    return give


def measured(records: list[Record], out: Path, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return measure_heatmaps(tiny_vlm("qwen2_vl"), records, out=out, max_new_tokens=4, **settings)


def made_records(folder: Path, num: int = 3) -> list[Record]:
    records = []
    for number in range(num):
        (folder / str(number)).mkdir()
        record = record_of(folder / str(number), picture(number), *[picture(9, 56, 56)] * (number == 1))
        records.append(record.model_copy(update={"id": f"r{number}", "group": f"g{number}"}))
    return records


def test_a_reply_is_explained_by_the_option_that_it_chose(tmp_path: Path, letters: Callable[..., None]) -> None:
    records = made_records(tmp_path)
    letters("B", None, "A")
    rows, numbers = measured(records, tmp_path / "out", mode="think")
    assert [(row["id"], row["letter"], row["right"]) for row in rows] == [
        ("r0", "B", "B" in records[0].right_letters),
        ("r2", "A", "A" in records[2].right_letters),
    ]
    assert (numbers["n"], numbers["left_out"]) == (2, 1)
    letters(None, None, None)
    with pytest.raises(MedR1Error, match="none of 3 replies chose an option to explain"):
        measured(records, tmp_path / "other", mode="think")


def test_a_full_disk_under_the_maps_is_told(tmp_path: Path) -> None:
    records = made_records(tmp_path, num=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(MedR1Error, match=r"overlays/.*-1\.png: cannot be written .*free space and run again"):
            measured(records, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_stopped_run_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letters: Callable[..., None]
) -> None:
    records = made_records(tmp_path)
    letters("A", "A", "A")
    regions = {records[0].images[0]: [(10.0, 10.0, 30.0, 40.0)]}
    whole, numbers = measured(records, tmp_path / "whole", regions=regions, mode="think")
    assert [len(line["maps"]) for line in whole] == [1, 2, 1] and len(whole[1]["overlays"]) == 2
    assert [line["regions"][0] is None for line in whole] == [False, True, True]
    assert whole[0]["regions"][0]["boxes"] == [[10 / 84, 10 / 56, 30 / 84, 40 / 56]]
    assert numbers["left_out"] == 0 and numbers == json.loads((tmp_path / "whole/heatmaps.json").read_text())
    for line in whole:
        assert all(Image.open(tmp_path / "whole" / path).size for path in line["overlays"])
        assert math.isclose(line["curves"]["deletion"][0], line["probability"], abs_tol=1e-5)

    real, calls = module.curves, 0

    def dies(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(module, "curves", dies)
    with pytest.raises(KeyboardInterrupt):
        measured(records, tmp_path / "stopped", regions=regions, mode="think")
    with (tmp_path / "stopped/heatmaps.jsonl").open("a") as file:
        file.write('{"key": "to')
    monkeypatch.setattr(module, "curves", real)
    rows = read_jsonl(tmp_path / "stopped/heatmaps.jsonl")
    assert len(rows) == 2
    again, same = measured(records, tmp_path / "stopped", regions=regions, mode="think")
    assert again[:2] == rows and [line["maps"] for line in again] == [line["maps"] for line in whole]
    assert same == numbers
    assert read_jsonl(tmp_path / "stopped/heatmaps.jsonl") == again
    with pytest.raises(MedR1Error, match="3 rows of another model, seed or data"):
        measured(records, tmp_path / "stopped", regions=regions, mode="think", seed=1)


def test_the_page_stands_alone_and_escapes(tmp_path: Path) -> None:
    records = [
        record.model_copy(update={"question": "<script>alert(1)</script>?", "options": ("<b>Cyst</b>", "Tumour")})
        for record in made_records(tmp_path, 2)
    ]
    open_question = records[0].model_copy(update={"id": "open", "options": (), "answer": "a cyst"})
    rows, numbers = measured([*records, open_question], tmp_path / "out", method="gradient")
    assert numbers["left_out"] == 1 and numbers["pointing"] is None
    write_heatmaps_page(rows, numbers, tmp_path / "out")
    page = (tmp_path / "out/explain.html").read_text()
    assert "not for clinical use" in page and "not a causal explanation" in page
    assert "No region is known here" in page and "left out" in page
    assert "<script" not in page and "<b>Cyst" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/", "").replace("http-equiv", "")
    assert page.count("data:image/webp") == 2 * sum(len(line["images"]) for line in rows)
    (tmp_path / "out" / rows[0]["overlays"][0]).unlink()
    write_heatmaps_page(rows, numbers, tmp_path / "out")
    assert "file lost" in (tmp_path / "out/explain.html").read_text()


def test_mistakes_are_named(tmp_path: Path) -> None:
    [record] = made_records(tmp_path, 1)
    with pytest.raises(MedR1Error, match="--method saliency: choose occlusion, gradient"):
        measured([record], tmp_path / "out", method="saliency")
    with pytest.raises(MedR1Error, match="no question with both an image and options"):
        measured([record.model_copy(update={"images": ()})], tmp_path / "out")
    with pytest.raises(MedR1Error, match=r"0\.png: no pixel of the 84 x 56 image lies in its region"):
        measured([record], tmp_path / "out", regions={record.images[0]: [(90.0, 0.0, 99.0, 9.0)]})
    with pytest.raises(MedR1Error, match=r"0\.png: its box to 85, 9 reaches beyond the 84 x 56 image; mend its line"):
        measured([record], tmp_path / "out", regions={record.images[0]: [(10.0, 0.0, 85.0, 9.0)]})
