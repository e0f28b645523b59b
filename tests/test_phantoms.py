"""Phantoms: same seed same bytes, truth where it is drawn, text at chance."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medr1.data.parts as parts
from medr1.data.datasets import load_records
from medr1.data.phantoms import (
    LOCATIONS,
    Place,
    Shortcut,
    draw_options,
    draw_phantom,
    pointed_at,
    write_phantoms,
    write_planted,
)
from medr1.data.records import MODALITIES, QUESTION_TYPES, Record
from medr1.data.regions import read_regions
from medr1.data.splits import split_by_group
from medr1.evaluation.controls import text_only_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "p", num_images=160, seed=0)


def digest(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        digest(write_phantoms(tmp_path / name, num_images=8, seed=seed))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == second != other


def test_every_modality_and_question_type_is_read_back(folder: Path) -> None:
    records = load_records(folder)
    cells = Counter((record.modality, record.question_type) for record in records)
    assert cells == {(modality, kind): 20 for modality in MODALITIES for kind in QUESTION_TYPES}
    assert len({record.id for record in records}) == len(records)
    assert {len(record.images) for record in records} == {1}


def test_text_alone_is_at_chance(folder: Path) -> None:
    train, test = split_by_group(load_records(folder), test_fraction=0.5, seed=0)
    prior = text_only_prior(train, test)
    low, high = prior["ci95"]
    assert low - 0.02 < prior["chance"] < high + 0.02
    assert prior["accuracy"] < prior["chance"] + 0.08


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("size", [112, 224])
def test_the_lesion_is_drawn_where_the_truth_says(modality: str, size: int) -> None:
    """Against the same picture without it: the pixels that differ lie in the stated circle, in the stated quadrant."""
    for seed in range(6):
        phantom = draw_phantom(np.random.default_rng(seed), modality, size)
        assert phantom.image.size == (size, size)
        x, y, radius = phantom.lesion
        assert 0 < radius < size / 4
        vertical, horizontal = ("Upper", "Lower")[y > size / 2], ("left", "right")[x > size / 2]
        assert phantom.facts["Other Biological Attributes"] == f"{vertical} {horizontal}"
        bare = draw_phantom(np.random.default_rng(seed), modality, size, lesion=False)
        changed = np.abs(np.asarray(phantom.image, float) - np.asarray(bare.image, float)).max(-1) > 40
        rows, columns = changed.nonzero()
        assert len(rows) > 5, "the lesion can be seen"
        assert np.hypot(columns - x, rows - y).max() < 1.25 * radius + 2


def test_options_hold_the_answer_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        facts = draw_phantom(rng).facts
        for kind in QUESTION_TYPES:
            options = draw_options(rng, facts, kind)
            assert options.count(facts[kind]) == 1
            assert len(set(options)) == len(options) == (3 if kind == "Lesion Grading" else 4)
    assert set(draw_options(rng, facts, "Other Biological Attributes")) == set(LOCATIONS)


def test_the_stated_box_holds_the_lesion_and_drawing_is_as_ever(folder: Path) -> None:
    boxes = read_regions(folder)
    assert len(boxes) == 160 and {len(group) for group in boxes.values()} == {1}
    phantom = draw_phantom(np.random.default_rng(7), "CT")
    x, y, radius = phantom.lesion
    assert phantom.box == (x - radius, y - radius, x + radius, y + radius)
    # The tiny checkpoint learned from these very pictures: their mean greys before regions.csv was written.
    greys = [np.asarray(Image.open(path)).mean() for path in sorted(folder.rglob("*.png"))[:5]]
    assert greys == pytest.approx([69.39, 71.27, 54.8, 65.9, 57.26], abs=0.05)


@pytest.mark.parametrize("place", ["positions", "texts"])
def test_a_planted_shortcut_is_as_strong_as_asked_and_gone_in_testing(tmp_path: Path, place: Place) -> None:
    write_planted(tmp_path, num_images=320, seed=0, shortcut=Shortcut(place, 0.9))
    train, test = load_records(tmp_path / "train"), load_records(tmp_path / "test")

    def share(records: list[Record]) -> float:
        return float(np.mean([pointed_at(record.options, place) == record.gold for record in records]))

    assert share(train) == pytest.approx(0.9, abs=0.04)
    assert share(test) == pytest.approx(np.mean([record.chance for record in test]), abs=0.06)
    if place == "texts":  # which the control sees in training, and which is of no use in testing
        again, _ = split_by_group(train, test_fraction=0.5, seed=0)
        assert text_only_prior(again, train)["accuracy"] > 0.8
        assert text_only_prior(train, test)["accuracy"] < 0.4
    assert (
        {record.question_type for record in train} == {record.question_type for record in test} == set(QUESTION_TYPES)
    )
    assert all(len(set(record.options)) == len(record.options) for record in train)


@pytest.mark.parametrize("place", ["positions", "texts"])
def test_a_shortcut_that_never_fails_leaves_the_images_as_they_are(tmp_path: Path, place: Place) -> None:
    write_phantoms(tmp_path / "plain", num_images=24, seed=(3, 0))
    write_planted(tmp_path, num_images=24, seed=3, shortcut=Shortcut(place, 1.0))
    records = load_records(tmp_path / "train")
    assert {pointed_at(record.options, place) == record.gold for record in records} == {True}
    asked = {path.relative_to(tmp_path / "train") for record in records for path in record.images}
    assert len(asked) > 8 and all((tmp_path / "plain" / path).exists() for path in asked)


def test_a_drawing_that_is_stopped_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDR1_CACHE", str(tmp_path / "cache"))

    def stopped(folder: Path, num_images: int, seed: int) -> Path:
        write_phantoms(folder, num_images=num_images, seed=seed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_phantoms", stopped)
        with pytest.raises(KeyboardInterrupt):
            parts.phantom_folder(4)
    assert not any((tmp_path / "cache").iterdir())
    assert digest(parts.phantom_folder(4)) == digest(write_phantoms(tmp_path / "again", num_images=4, seed=0))
