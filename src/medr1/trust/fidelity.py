"""What a heatmap is worth: does hiding what it marks change the answer, does it depend on the weights at all, and does
it point where the finding is?

- Deletion and insertion (Petsiuk et al., arXiv:1806.07421): hide the cells, hottest first, or show them so on the image
  in its mean colour (where the paper blurs), and follow the answer's probability. A map that finds what the answer
  rests on has a small area under the first curve and a large one under the second; cells in random order say what
  small and large mean.
- Shuffled weights (Adebayo et al., arXiv:1810.03292): a map that looks the same for a model that knows nothing shows
  the image, not the model.
- Pointing (see `medr1.data.regions`), where the data states regions: the hottest cell against a random one, against
  another image's map, which knows where findings are in general, and against the map of the shuffled weights.

    medr1 explain --model runs/mine/model --data phantoms --out runs/mine/heatmaps

    OUT/answers.jsonl   evaluation rows with option_probs
    OUT/heatmaps.jsonl  a row a question: its maps and curves
    OUT/overlays/       the maps over the images
    OUT/heatmaps.json   the numbers; OUT/explain.html shows them

Shapes: C cells of all images of a record, S steps, O orders.
"""

import copy
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy import stats

from medr1.data.images import load_image
from medr1.data.records import LETTERS, QUESTION_TYPES, Record, append_jsonl, resume_jsonl, to_json, write_atomic
from medr1.data.regions import ABOUT_REGION, Box, overlap, overlap_chance, pointing, region_cells
from medr1.errors import MedR1Error
from medr1.evaluation.intervals import DIFFERENCE, SHARE, Interval, interval, jackknife_interval
from medr1.evaluation.metrics import NOT_STATED, Row
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import VLM
from medr1.processes import alone, make_folder
from medr1.trust.explain import METHODS, Heatmap, Subject, overlay

STEPS = 8
"""Parts in which cells are hidden, or fewer where there are fewer cells."""
RANDOM_ORDERS = 4
"""A record; it is their mean over many records that counts."""
NUMBERS, OVERLAYS = "heatmaps.json", "overlays"


def measure_heatmaps(
    vlm: VLM,
    records: Sequence[Record],
    *,
    out: Path,
    method: str = "occlusion",
    mode: str = "no-think",
    regions: Mapping[Path, list[Box]] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[list[Row], dict[str, Any]]:
    """Map the answer to every question, measure the maps, and write what this module's head lists but the page.

    Questions without an image, open questions, and replies that chose no option are left out; goes on from what `out`
    already has.

    Args:
        method: one of explain.METHODS.
        mode: in "no-think" the most probable option is explained, else the whole reply, since the answer follows from
            the reasoning and the reasoning from the image.
        regions: boxes by image path, see `regions.read_regions`.
        seed: of the random orders and of the shuffled weights.

    Returns:
        The rows of heatmaps.jsonl, and what `conclude` returns with model, method, mode, seed and left_out.

    Raises:
        MedR1Error: as `evaluate`; an unknown method; no record to map; a region outside of its image; or rows of
            another model, data or seed in `out`.
    """
    if method not in METHODS:
        raise MedR1Error(f"--method {method}: choose {', '.join(METHODS)}")
    mapped = [record for record in records if record.images and record.options]
    if not mapped:
        raise MedR1Error(f"{out}: no question with both an image and options to explain; widen the filters")
    make_folder(out)
    make_folder(out / OVERLAYS)
    with alone(out):
        rows = _map(vlm, mapped, out, method, mode, regions or {}, max_new_tokens, batch_size, seed)
        numbers = conclude(rows) | {
            "model": vlm.name,
            "method": method,
            "mode": mode,
            "seed": seed,
            "left_out": len(records) - len(rows),
        }
        write_atomic(out / NUMBERS, to_json(numbers, indent=1) + "\n")
    return rows, numbers


def _map(
    vlm: VLM,
    mapped: Sequence[Record],
    out: Path,
    method: str,
    mode: str,
    regions: Mapping[Path, list[Box]],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[Row]:
    answers = evaluate(
        vlm,
        mapped,
        mode=mode,
        out=out / "answers.jsonl",
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        scoring="options",
    )
    boxes = [[regions.get(path) for path in record.images] for record in mapped]
    jobs = {
        hashlib.sha256(json.dumps([answer["key"], method, boxes_R, seed]).encode()).hexdigest(): (
            record,
            answer,
            boxes_R,
        )
        for record, answer, boxes_R in zip(mapped, answers, boxes, strict=True)
        if mode == "no-think" or answer["letter"]
    }
    if not jobs:
        raise MedR1Error(f"{out}: none of {len(mapped)} replies chose an option to explain; see answers.jsonl there")
    path = out / "heatmaps.jsonl"
    rows = resume_jsonl(path, jobs.keys())
    pending = {key: job for key, job in jobs.items() if key not in rows}
    shuffled = shuffled_weights(vlm, seed=seed) if pending else vlm
    for key, (record, answer, of_images) in track(
        pending.items(), f"heatmaps, {method}", console=Console(stderr=True), disable=not pending
    ):
        reply, chosen = None, max(record.letters, key=lambda letter: answer["option_probs"][LETTERS.index(letter)])
        if mode != "no-think":
            reply, chosen = answer["reply"], answer["letter"]
        asked: dict[str, Any] = {"mode": mode, "reply": reply, "letter": chosen}
        maps, others = (METHODS[method](model, record, **asked) for model in (vlm, shuffled))
        subject = Subject.read(vlm, record, mode=mode, reply=reply)
        images = [load_image(path) for path in record.images]
        named = [f"{key[:16]}-{number}.png" for number in range(1, len(maps) + 1)]
        for image, heatmap, name in zip(images, maps, named, strict=True):
            picture = io.BytesIO()
            overlay(image, heatmap).save(picture, "PNG")
            write_atomic(out / OVERLAYS / name, picture.getvalue())
        row = {
            "key": key,
            **{name: answer[name] for name in COPIED if name in answer},
            "letter": chosen,
            "right": chosen in record.right_letters,
            "probability": math.exp(maps[0].logp),
            "maps": [heatmap.scores.tolist() for heatmap in maps],
            "shuffled_maps": [heatmap.scores.tolist() for heatmap in others],
            "overlays": [f"{OVERLAYS}/{name}" for name in named],
            "regions": [
                _region(record, place, image.size, heatmap.scores.shape, of_images[place])
                for place, (image, heatmap) in enumerate(zip(images, maps, strict=True))
            ],
            "curves": curves(subject, maps, seed=seed),
        }
        append_jsonl(path, [row])
        rows[key] = row
    return [rows[key] for key in jobs]


COPIED = (
    *("id", "modality", "question_type", "source", "group", "images", "question", "options", "gold"),
    "seen_by_run",  # of a run's model alone
)
"""Fields of an evaluation row that a row of maps repeats."""


def _region(
    record: Record, place: int, size: tuple[int, int], grid: tuple[int, ...], boxes: list[Box] | None
) -> dict[str, Any] | None:
    """The cells in an image's region, and its boxes as fractions of the image."""
    if boxes is None:
        return None
    try:
        inside = region_cells(boxes, size, (grid[0], grid[1]))
    except ValueError as error:
        raise MedR1Error(f"{record.images[place]}: {error}; mend its line of regions.csv") from error
    return {
        "cells": inside.tolist(),
        "boxes": [[edge / size[side % 2] for side, edge in enumerate(box)] for box in boxes],
    }


def conclude(rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers from the rows. A share or mean is {value, ci95 (over groups), n}; undefined is None.

    Returns:
        n, groups; accuracy: of the explained answers.
        deletion, insertion, random: mean areas under the curves; deletion_gain: random less deletion, and
            insertion_gain: insertion less random, paired by question: above 0 the map beats chance.
        curves: fraction and the mean curves, each STEPS + 1 points.
        correlation: Spearman's, of a map with that of the shuffled weights; flat: maps of the two without any contrast.
        pointing: None where no region is known; else by part ("about the region", then each question type):
            n (images), hit, chance (a random cell), other (another image's map), shuffled (the map of the shuffled
            weights); over_chance, over_other, over_shuffled: hit less these, paired by image; overlap, overlap_chance.
            Answers about a region are those of ABOUT_REGION's question types.
    """
    groups = [row["group"] for row in rows]
    areas = {
        name: [float(np.trapezoid(row["curves"][name], row["curves"]["fraction"])) for row in rows] for name in CURVES
    }
    gains = {
        "deletion_gain": np.subtract(areas["random"], areas["deletion"]).tolist(),
        "insertion_gain": np.subtract(areas["insertion"], areas["random"]).tolist(),
    }
    correlations = [rank_correlation(*(_scores(row, name) for name in ("maps", "shuffled_maps"))) for row in rows]
    contrasted = [(rho, group) for rho, group in zip(correlations, groups, strict=True) if rho is not None]
    at = np.linspace(0, 1, STEPS + 1)
    return {
        "n": len(rows),
        "groups": len(set(groups)),
        "accuracy": _cell([float(row["right"]) for row in rows], groups, SHARE),
        **{name: _average(values, groups, SHARE) for name, values in areas.items()},
        **{name: _average(values, groups, DIFFERENCE) for name, values in gains.items()},
        "curves": {
            "fraction": at.tolist(),
            **{
                name: np.mean(
                    [np.interp(at, row["curves"]["fraction"], row["curves"][name]) for row in rows], 0
                ).tolist()
                for name in CURVES
            },
        },
        "correlation": _average([rho for rho, _ in contrasted], [group for _, group in contrasted], DIFFERENCE),
        "flat": len(rows) - len(contrasted),
        "pointing": _pointing(rows),
    }


CURVES = ("deletion", "insertion", "random")


def curves(subject: Subject, maps: Sequence[Heatmap], *, seed: int) -> dict[str, list[float]]:
    """The answer's probability as cells are hidden and shown by their score, and in RANDOM_ORDERS drawn by `seed`.

    Returns:
        fraction: (S + 1,) of the cells that are hidden or shown, 0 to 1.
        deletion, insertion, random: (S + 1,) probabilities among the options (of a reply the geometric mean over its
            tokens); random is of hiding, the mean of the
            orders. (Showing a random order is hiding its reverse, so the two have one mean area.)
    """
    score_C = np.concatenate([heatmap.scores.ravel() for heatmap in maps])
    num_cells = len(score_C)
    counts = np.unique(np.linspace(0, num_cells, min(STEPS, num_cells) + 1).round().astype(int))
    rng = np.random.default_rng(seed)
    orders = [np.argsort(-score_C, kind="stable"), *(rng.permutation(num_cells) for _ in range(RANDOM_ORDERS))]
    rank_OC = np.argsort(orders, axis=1)
    hidden_OSC = rank_OC[:, None, :] < counts[:, None]
    shown_SC = ~hidden_OSC[0]  # insertion: what deletion hides is what it shows
    masks = np.concatenate([hidden_OSC, shown_SC[None]]).reshape(-1, num_cells)
    different, which = np.unique(masks, axis=0, return_inverse=True)  # all curves share their ends
    logp = subject.logprobs_without(torch.from_numpy(different))[:, subject.place(maps[0].letter)]
    probability_OS = logp.exp().numpy()[which].reshape(len(orders) + 1, -1)
    return {
        "fraction": (counts / num_cells).tolist(),
        "deletion": probability_OS[0].tolist(),
        "insertion": probability_OS[-1].tolist(),
        "random": probability_OS[1:-1].mean(0).tolist(),
    }


def shuffled_weights(vlm: VLM, *, seed: int) -> VLM:
    """A copy of the model whose every weight tensor has its values in another order, drawn by `seed`.

    So nothing learned is left, and sizes of weights are as they were: activations neither die nor explode.
    """
    model = copy.deepcopy(vlm.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():  # tied ones once
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return dataclasses.replace(vlm, model=model, name=f"{vlm.name}, weights shuffled")


def rank_correlation(scores_C: NDArray[np.float64], others_C: NDArray[np.float64]) -> float | None:
    """Spearman's correlation of two maps' scores over all cells of a record; None where one is flat."""
    if np.ptp(scores_C) == 0 or np.ptp(others_C) == 0:
        return None
    return float(stats.spearmanr(scores_C, others_C).statistic)


def _scores(row: Row, name: str) -> NDArray[np.float64]:
    return np.concatenate([np.ravel(scores) for scores in row[name]])


def _pointing(rows: Sequence[Row]) -> dict[str, Any] | None:
    items = [
        {
            "type": row["question_type"],
            "group": row["group"],
            "map": np.array(row["maps"][place]),
            "shuffled": np.array(row["shuffled_maps"][place]),
            "inside": np.array(region["cells"]),
        }
        for row in rows
        for place, region in enumerate(row["regions"])
        if region
    ]
    if not items:
        return None
    parts = {"about the region": [item for item in items if item["type"] in ABOUT_REGION]}
    for kind in (*QUESTION_TYPES, None):
        if part := [item for item in items if item["type"] == kind]:
            parts[kind or NOT_STATED] = part
    return {name: _pointing_cell(part) for name, part in parts.items()}


def _pointing_cell(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    groups = [item["group"] for item in items]
    hit, shuffled = ([pointing(item[name], item["inside"]) for item in items] for name in ("map", "shuffled"))
    chance = [float(item["inside"].mean()) for item in items]
    other = [_other_maps(item, items) for item in items]

    def over(values: Sequence[float | None]) -> dict[str, Any]:
        paired = [
            (own - value, group) for own, value, group in zip(hit, values, groups, strict=True) if value is not None
        ]
        differences, of = [difference for difference, _ in paired], [group for _, group in paired]
        return _cell(differences, of, DIFFERENCE)

    return {
        "n": len(items),
        "hit": _cell(hit, groups, SHARE),
        "chance": _mean(chance),
        "other": _mean([value for value in other if value is not None]),
        "shuffled": _cell(shuffled, groups, SHARE),
        "over_chance": over(chance),
        "over_other": over(other),
        "over_shuffled": over(shuffled),
        "overlap": _average([overlap(item["map"], item["inside"]) for item in items], groups, SHARE),
        "overlap_chance": _mean([overlap_chance(item["inside"]) for item in items]),
    }


def _other_maps(item: dict[str, Any], items: Sequence[dict[str, Any]]) -> float | None:
    """How often the maps of other groups' images of the same grid point into this image's region."""
    others = [other["map"] for other in items if other["group"] != item["group"]]
    maps = [scores for scores in others if scores.shape == item["inside"].shape]
    return _mean([pointing(scores, item["inside"]) for scores in maps])


def _cell(values: Sequence[float], groups: Sequence[str], span: tuple[float, float]) -> dict[str, Any]:
    return _with(values, interval(values, groups, span))


def _average(values: Sequence[float], groups: Sequence[str], span: tuple[float, float]) -> dict[str, Any]:
    return _with(values, jackknife_interval(values, groups, span))


def _with(values: Sequence[float], ci: Interval | None) -> dict[str, Any]:
    return {"value": _mean(values), "ci95": list(ci) if ci else None, "n": len(values)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
