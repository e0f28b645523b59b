"""Heatmaps: every cell the right pixels, nothing leaks, and the numbers of plain definitions."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import FAMILIES, picture, plain_logprobs, tiny_smolvlm, tiny_vlm

import medr1.trust.explain as module
from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.evaluation.confidence import option_logprobs
from medr1.policy.encoding import encode_prompts, image_cells
from medr1.policy.vlm import VLM, evaluating
from medr1.trust.explain import METHODS, Heatmap, Subject, gradient, occlusion, overlay


def record_of(folder: Path, *images: Image.Image) -> Record:
    paths = []
    for number, image in enumerate(images):
        paths.append(folder / f"{number}.png")
        image.save(paths[-1])
    return Record(
        id="r",
        images=tuple(paths),
        question="Which finding?",
        options=("Cyst", "Tumour", "None"),
        answer="A",
        modality="CT",
        question_type="Disease Diagnosis",
        source="made",
        group="g",
    )


def even_picture(seed: int, width: int, height: int) -> Image.Image:
    """Random pixels whose mean is exactly 128 in every channel: each value v is paired with 256 - v."""
    half = np.random.default_rng(seed).integers(1, 256, (height, width // 2, 3))
    return Image.fromarray(np.concatenate([half, 256 - half], axis=1).astype(np.uint8))


def answers_from_cell(cell: int) -> object:
    """Stands for a model that reads one cell: the first option's logit is its mean pixel, the others' are 0."""

    def stub(vlm: VLM, prompts, records, **settings) -> list[torch.Tensor]:
        per_prompt = prompts.vision["pixel_values"].unflatten(0, (len(prompts), -1))
        seen = per_prompt[:, 4 * cell : 4 * cell + 4].mean((1, 2))
        return list(torch.stack([seen, 0 * seen, 0 * seen], dim=1).log_softmax(1))

    return stub


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_reads_one_cell_has_exactly_that_cell(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bright = Image.new("RGB", (84, 56), (90, 90, 90))
    bright.paste((250, 250, 250), (56, 28, 84, 56))  # the sixth of 2 x 3 cells
    monkeypatch.setattr(module, "option_logprobs", answers_from_cell(5))
    [heatmap] = METHODS[method](tiny_vlm("qwen2_vl"), record_of(tmp_path, bright), mode="no-think", letter="A")

    assert heatmap.scores.shape == (2, 3)
    assert not heatmap.scores.ravel()[:5].any(), "exactly 0: nothing leaks between cells"
    # The processor scales grey v to (v / 255 - mean) / std, averaged over its channels; blank is the mean of all cells.
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    seen, blank = (float(((grey / 255 - mean) / std).mean()) for grey in (250, (5 * 90 + 250) / 6))

    def logp(value: float) -> float:
        return value - np.log(np.exp(value) + 2)

    assert heatmap.scores[1, 2] == pytest.approx(logp(seen) - logp(blank), abs=1e-4)
    assert heatmap.logp == pytest.approx(logp(seen), abs=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("qwen")])
def test_a_hidden_cell_is_that_rectangle_painted_on_the_image(family: str, tmp_path: Path) -> None:
    """Against painting the file itself and asking once for each cell; images of a size that no processor resizes."""
    vlm = tiny_vlm(family)
    side = 32 if family == "qwen3_vl" else 28
    images = [even_picture(0, 3 * side, 2 * side), even_picture(1, 2 * side, 2 * side)]
    record = record_of(tmp_path, *images)

    def ask(shown: list[Image.Image]) -> float:
        prompts = encode_prompts(vlm, [build_messages(record, "no-think")], [shown])
        with evaluating(vlm.model):
            return float(option_logprobs(vlm, prompts, [record], mode="no-think")[0][1])

    heatmaps = occlusion(vlm, record, mode="no-think", letter="B")
    whole = ask(images)
    assert len(heatmaps) == 2
    for number, heatmap in enumerate(heatmaps):
        assert heatmap.scores.shape == (images[number].height // side, images[number].width // side)
        for row, column in np.ndindex(*heatmap.scores.shape):
            painted = images[number].copy()
            painted.paste((128, 128, 128), (column * side, row * side, (column + 1) * side, (row + 1) * side))
            drop = whole - ask([painted if n == number else image for n, image in enumerate(images)])
            assert heatmap.scores[row, column] == pytest.approx(drop, abs=2e-5)
        assert heatmap.logp == pytest.approx(whole, abs=1e-5)
    assert max(np.ptp(heatmap.scores) for heatmap in heatmaps) > 1e-3, "the images matter to this random model"


def test_a_whole_reply_is_explained_by_its_own_log_probability(tmp_path: Path) -> None:
    vlm, reply = tiny_vlm("qwen2_vl"), "<think>A ring.</think><answer>B</answer>"
    image = even_picture(0, 84, 56)
    record = record_of(tmp_path, image)
    ids = vlm.tokenizer(reply, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def logp(shown: Image.Image) -> float:
        prompts = encode_prompts(vlm, [build_messages(record, "think")], [[shown]])
        with evaluating(vlm.model):
            return float(plain_logprobs(vlm, prompts, ids, torch.ones_like(ids)).mean())

    [heatmap] = occlusion(vlm, record, mode="think", letter="B", reply=reply)
    assert heatmap.logp == pytest.approx(logp(image), abs=1e-4)
    for row, column in np.ndindex(2, 3):
        painted = image.copy()
        painted.paste((128, 128, 128), (column * 28, row * 28, column * 28 + 28, row * 28 + 28))
        assert heatmap.scores[row, column] == pytest.approx(logp(image) - logp(painted), abs=1e-4)
    assert np.ptp(heatmap.scores) > 1e-4
    [steps] = gradient(vlm, record, mode="think", letter="B", reply=reply)
    blank = Image.new("RGB", image.size, (128, 128, 128))
    assert steps.scores.sum() == pytest.approx(logp(image) - logp(blank), abs=2e-3)


@pytest.mark.parametrize("splitting", [True, False])
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_a_hidden_cell_is_hidden_in_its_tile_and_in_the_whole_view(
    family: str, splitting: bool, tmp_path: Path
) -> None:
    """Pixels against those of the painted file, but for the rim that shrinking it to the whole view blurs."""
    vlm = tiny_smolvlm() if family == "smolvlm" else tiny_vlm(family)
    vlm.processor.image_processor.do_image_splitting = splitting
    images = [even_picture(0, 64, 32), even_picture(1, 32, 64)]
    subject = Subject.read(vlm, record_of(tmp_path, *images), mode="no-think")
    assert subject.cells.grids == ([(2, 4), (4, 2)] if splitting else [(2, 2), (2, 2)])
    for cell, hidden in enumerate(torch.eye(subject.num_cells, dtype=torch.bool)):
        number, place = (0, cell) if cell < subject.num_cells // 2 else (1, cell - subject.num_cells // 2)
        rows, columns = subject.cells.grids[number]
        painted = [image.copy() for image in images]
        width, height = images[number].width // columns, images[number].height // rows
        left, top = place % columns * width, place // columns * height
        painted[number].paste((128, 128, 128), (left, top, left + width, top + height))
        prompts = encode_prompts(vlm, [build_messages(subject.record, "no-think")], [painted])
        differs = (subject.without(hidden[None])[0] - prompts.vision["pixel_values"]).abs()[0].amax(1) > 0.05
        in_tiles = [tile for tile in range(len(differs)) if splitting and tile not in (2, 5)]
        assert not differs[in_tiles].any()
        whole = differs[2 + 3 * number if splitting else number]
        across, down = 32 // columns, 32 // rows
        inner = torch.zeros_like(whole)
        for y, x in np.ndindex(32, 32):
            edges = [abs(x + 0.5 - place % columns * across), abs(x + 0.5 - (place % columns + 1) * across)]
            edges += [abs(y + 0.5 - place // columns * down), abs(y + 0.5 - (place // columns + 1) * down)]
            inner[y, x] = min(edges) > 3
        assert inner.any() and not (whole & inner).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_complete(family: str, tmp_path: Path) -> None:
    """All scores sum to the log-probability with the images less that with blank ones."""
    vlm = tiny_vlm(family)
    record = record_of(tmp_path, picture(1), picture(2, 56, 84))
    subject = Subject.read(vlm, record, mode="no-think")
    none_and_all = torch.tensor([[False], [True]]).expand(-1, subject.num_cells)
    whole, blank = subject.logprobs_without(none_and_all)[:, 0].tolist()
    heatmaps = gradient(vlm, record, mode="no-think", letter="A")
    assert [heatmap.scores.shape for heatmap in heatmaps] == subject.cells.grids
    assert sum(heatmap.scores.sum() for heatmap in heatmaps) == pytest.approx(whole - blank, rel=0.02, abs=2e-3)
    assert all(parameter.grad is None for parameter in vlm.model.parameters())


def test_windows_tile_each_image_and_score_their_cells_together(tmp_path: Path) -> None:
    vlm, record = tiny_vlm("qwen2_vl"), record_of(tmp_path, picture(1, 84, 84), picture(2, 56, 84))
    wide, _ = occlusion(vlm, record, mode="no-think", letter="A", window=2)
    subject = Subject.read(vlm, record, mode="no-think")
    hidden = torch.zeros(2, subject.num_cells, dtype=torch.bool)
    hidden[1, [2, 5]] = True  # the upper right window of 3 x 3 cells: one column of two cells
    before, after = subject.logprobs_without(hidden)[:, 0].tolist()
    assert wide.scores[0, 2] == wide.scores[1, 2] == pytest.approx(before - after, abs=1e-5)
    assert len(np.unique(wide.scores)) == 4


def test_parts_of_a_batch_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, record = tiny_vlm("qwen2_vl"), record_of(tmp_path, picture(1))
    [whole] = occlusion(vlm, record, mode="think", reasoning="It is round.")
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 1)
    [alone] = occlusion(vlm, record, mode="think", reasoning="It is round.")
    assert whole.letter == alone.letter
    assert np.allclose(whole.scores, alone.scores, atol=1e-5)


def test_the_explained_answer_is_the_models_own(tmp_path: Path) -> None:
    vlm, record = tiny_vlm("qwen2_vl"), record_of(tmp_path, picture(1))
    [own] = occlusion(vlm, record, mode="no-think")
    named = {letter: occlusion(vlm, record, mode="no-think", letter=letter)[0] for letter in record.letters}
    assert own.logp == max(heatmap.logp for heatmap in named.values())
    assert np.array_equal(own.scores, named[own.letter].scores)
    assert sum(np.exp(heatmap.logp) for heatmap in named.values()) == pytest.approx(1)


def test_overlay_is_strongest_where_the_map_is() -> None:
    image = Image.new("RGB", (60, 40), (100, 100, 100))
    painted = np.asarray(overlay(image, Heatmap(np.array([[2.0, 0, -1], [0, 0, 0]]), "A", -0.1)), int)
    assert painted.shape == (40, 60, 3)
    assert (painted[20:] == 100).all() and (painted[:, 20:40] == 100).all(), "where it is 0 the image stays"
    assert painted[5, 5, 0] > painted[5, 5, 2] and painted[5, 45, 2] > painted[5, 45, 0]
    assert abs(painted[5, 5] - 100).max() > abs(painted[5, 45] - 100).max()
    faint = np.asarray(overlay(image, Heatmap(np.array([[0.02, 0, -0.01], [0, 0, 0]]), "A", -0.1)), int)
    assert 0 < abs(faint - 100).max() <= 5, "what moves the answer by two in a hundred is hardly seen"
    flat = overlay(image, Heatmap(np.zeros((2, 3)), "A", -0.1))
    assert np.array_equal(np.asarray(flat), np.asarray(image))


def test_what_cannot_be_explained_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, record = tiny_vlm("qwen2_vl"), record_of(tmp_path, picture(1))
    with pytest.raises(MedR1Error, match="r: it has no image"):
        occlusion(vlm, record.model_copy(update={"images": ()}), mode="no-think")
    subject = Subject.read(vlm, record, mode="no-think")
    del subject.prompt.vision["image_grid_thw"]
    with pytest.raises(MedR1Error, match="qwen2_vl: which pixels an image token stands for"):
        image_cells(vlm, subject.prompt)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MedR1Error, match=r"medr1\[explain\]"):
        gradient(vlm, record, mode="no-think")
