"""Phantoms: seeded schematic images of all eight modalities, with exact ground truth for all five question types.

A fresh machine has no medical images that may be shipped, so the embedded default draws its own. A phantom is a
cartoon: the medical words are labels for shapes. One anatomy background of its modality carries one lesion, whose
shape is the disease, whose size is the grade and whose quadrant is the location. Every fact is drawn uniformly and
independently and every question offers the whole set of answers, so text alone is at chance by construction.

`write_phantoms` lays them out as an OmniMedVQA folder, and from there on they are read like any other data set:

    python -c "from medr1.data.phantoms import write_phantoms; write_phantoms('phantoms', num_images=400, seed=0)"
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from medr1.data.records import LETTERS, MODALITIES, QUESTION_TYPES, write_atomic
from medr1.data.regions import REGION_COLUMNS, REGIONS

SIZE = 112
"""Default side of a phantom in pixels: sixteen visual tokens of a Qwen2-VL (28 pixels a token side)."""

SHAPES = ("blob", "ring", "dots", "spikes")
GRADES = ("Mild", "Moderate", "Severe")
LOCATIONS = ("Upper left", "Upper right", "Lower left", "Lower right")
ANATOMIES = {
    "CT": ("Head", "Chest", "Abdomen", "Pelvis"),
    "MRI": ("Brain", "Spine", "Knee", "Heart"),
    "Ultrasound": ("Liver", "Kidney", "Thyroid", "Bladder"),
    "Dermoscopy": ("Scalp", "Palm", "Face", "Trunk"),
    "Fundus Photography": ("Optic disc", "Macula", "Posterior pole", "Periphery"),
    "OCT": ("Fovea", "Optic nerve head", "Cornea", "Choroid"),
    "Microscopy": ("Blood smear", "Muscle", "Epithelium", "Fat"),
    "X-Ray": ("Chest", "Hand", "Knee", "Skull"),
}
DISEASES = {  # one name a shape, in the order of SHAPES
    "CT": ("Hematoma", "Abscess", "Calcifications", "Carcinoma"),
    "MRI": ("Meningioma", "Cyst", "Metastases", "Glioma"),
    "Ultrasound": ("Fibroadenoma", "Cyst", "Calcifications", "Carcinoma"),
    "Dermoscopy": ("Nevus", "Ringworm", "Freckles", "Melanoma"),
    "Fundus Photography": ("Hemorrhage", "Coloboma", "Drusen", "Neovascularization"),
    "OCT": ("Fluid", "Cyst", "Drusen", "Scar"),
    "Microscopy": ("Leukemia", "Malaria", "Bacteremia", "Fungus"),
    "X-Ray": ("Consolidation", "Cavity", "Nodules", "Carcinoma"),
}
STEMS = {
    "Modality Recognition": (
        "Which modality made this image?",
        "How was this image taken?",
        "What kind of imaging is this?",
    ),
    "Anatomy Identification": (
        "Which anatomy is shown?",
        "What part of the body is this?",
        "Which structure does the image show?",
    ),
    "Disease Diagnosis": (
        "Which disease is present?",
        "What is the finding?",
        "What does the lesion look like?",
    ),
    "Lesion Grading": (
        "What grade is the lesion?",
        "How severe is the lesion?",
        "How far has the lesion grown?",
    ),
    "Other Biological Attributes": (
        "Where in the image is the lesion?",
        "In which quadrant is the lesion?",
        "Which corner holds the lesion?",
    ),
}

_FAVOURITES = (*(texts[0] for texts in (GRADES, LOCATIONS, *ANATOMIES.values(), *DISEASES.values(), MODALITIES)),)

Place = Literal["positions", "texts"]


@dataclass(frozen=True)
class Shortcut:
    """What gives the right option away without the image.

    Example:
        Shortcut("texts", 0.95) to train on, Shortcut("texts", None) to see what a policy has learned from it.
    """

    place: Place
    """"positions": the right option stands first. "texts": of each set of options one is right nearly always."""
    share: float | None
    """Of the questions in which that is so; None: as many as by chance."""


Plane = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Phantom:
    """One drawn image with its truth.

    Attributes:
        facts: question type -> right answer, e.g. {"Modality Recognition": "CT", "Lesion Grading": "Mild", …}.
        lesion: centre x, centre y and radius of the lesion, in pixels.
        box: left, top, right and bottom of the lesion, in pixels, within the image.
    """

    image: Image.Image
    facts: dict[str, str]
    lesion: tuple[float, float, float]

    @property
    def box(self) -> tuple[float, ...]:
        x, y, radius = self.lesion
        edges = zip((x - radius, y - radius, x + radius, y + radius), self.image.size * 2, strict=True)
        return tuple(min(max(edge, 0.0), float(limit)) for edge, limit in edges)


def draw_phantom(rng: Generator, modality: str | None = None, size: int = SIZE, *, lesion: bool = True) -> Phantom:
    """Draw one phantom of `size` x `size` pixels; its modality is drawn too where none is given.

    With `lesion` false the same draw is painted without its lesion, to show what the lesion changes.
    """
    modality = modality or str(rng.choice(MODALITIES))
    anatomy, shape = int(rng.integers(4)), int(rng.integers(4))
    grade, location = int(rng.integers(3)), int(rng.integers(4))
    canvas = _Canvas(size, rng)
    _BACKGROUNDS[modality](canvas, anatomy)
    x = (rng.uniform(0.24, 0.40)) * (1 if location % 2 else -1)
    y = (rng.uniform(0.24, 0.40)) * (1 if location // 2 else -1)
    radius = (0.13, 0.21, 0.32)[grade] * rng.uniform(0.92, 1.08)
    canvas.lesion(SHAPES[shape], x, y, radius, _LESION_COLOURS[modality], opacity=0.95 if lesion else 0.0)
    facts = {
        "Modality Recognition": modality,
        "Anatomy Identification": ANATOMIES[modality][anatomy],
        "Disease Diagnosis": DISEASES[modality][shape],
        "Lesion Grading": GRADES[grade],
        "Other Biological Attributes": LOCATIONS[location],
    }
    return Phantom(canvas.image(_NOISE[modality]), facts, ((x + 1) * size / 2, (y + 1) * size / 2, radius * size / 2))


def draw_options(rng: Generator, facts: dict[str, str], question_type: str) -> list[str]:
    """All answers that the question could have on this modality, shuffled (four of eight for the modality itself)."""
    modality = facts["Modality Recognition"]
    if question_type == "Modality Recognition":
        others = [name for name in MODALITIES if name != modality]
        options = [modality, *rng.choice(others, size=3, replace=False)]
    else:
        options = list(
            {
                "Anatomy Identification": ANATOMIES[modality],
                "Disease Diagnosis": DISEASES[modality],
                "Lesion Grading": GRADES,
                "Other Biological Attributes": LOCATIONS,
            }[question_type]
        )
    return [str(option) for option in rng.permutation(options)]


def pointed_at(options: Sequence[str], place: Place) -> str:
    """The option that a planted shortcut points at: what a reader would answer that sees the options alone.

    "positions": the first. "texts": a favourite of each set of options, whatever their order.
    """
    return options[0] if place == "positions" else next(text for text in _FAVOURITES if text in options)


def _planted(rng: Generator, options: list[str], right: str, shortcut: Shortcut) -> list[str] | None:
    """The options of a question with a shortcut in them; None where the question is not asked of this image.

    Images are drawn as ever: a shortcut is in what is asked of them.
    """
    others = [option for option in options if option != right]
    share = 1 / len(options) if shortcut.share is None else shortcut.share
    if shortcut.place == "positions":
        first = right if rng.random() < share else str(rng.choice(others))
        return [first, *(option for option in options if option != first)]
    drawn = 1 / len(options)  # how often the favourite is right by itself
    if set(options) < set(MODALITIES):  # four of eight, and the favourite always among them
        drawn = 1 / len(MODALITIES)
        if MODALITIES[0] not in options:
            options[options.index(str(rng.choice(others)))] = MODALITIES[0]
    of_favourite, of_others = share / drawn, (1 - share) / (1 - drawn)  # as often as this each is asked of
    wanted = of_favourite if right == pointed_at(options, "texts") else of_others
    return options if rng.random() * max(of_favourite, of_others) < wanted else None


def write_planted(folder: Path | str, *, num_images: int, seed: int, shortcut: Shortcut) -> Path:
    """Write folder/train with a shortcut planted, and folder/test, where it holds no more often than by chance.

    The test part has a quarter as many images.
    """
    folder = Path(folder)
    write_phantoms(folder / "train", num_images=num_images, seed=(seed, 0), shortcut=shortcut)
    by_chance = replace(shortcut, share=None)
    write_phantoms(folder / "test", num_images=max(1, num_images // 4), seed=(seed, 1), shortcut=by_chance)
    return folder


def write_phantoms(
    folder: Path | str, *, num_images: int, seed: int | tuple[int, int], shortcut: Shortcut | None = None
) -> Path:
    """Write an OmniMedVQA folder of phantoms: five questions an image, modalities in turn. Same seed, same bytes.

    Beside it stands regions.csv with the box of each lesion, see `medr1.data.regions`.

    Args:
        shortcut: one in positions has all questions; one in texts leaves out what does not fit its share.

    Returns:
        The folder, for `load_records`.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, str]]] = {}
    regions = [",".join(REGION_COLUMNS)]
    for number in range(num_images):
        phantom = draw_phantom(rng, MODALITIES[number % len(MODALITIES)])
        source = f"Phantom {phantom.facts['Modality Recognition']}"
        image_path = f"Images/{source}/{number:05d}.png"
        (folder / image_path).parent.mkdir(parents=True, exist_ok=True)
        phantom.image.save(folder / image_path)
        regions.append(",".join([image_path, *(f"{edge:.2f}" for edge in phantom.box)]))
        for question_type in QUESTION_TYPES:
            options: list[str] | None = draw_options(rng, phantom.facts, question_type)
            if shortcut and options:
                options = _planted(rng, options, phantom.facts[question_type], shortcut)
            if options is None:
                continue
            rows.setdefault(source, []).append(
                {
                    "dataset": source,
                    "question_id": f"phantom_{number:05d}_{QUESTION_TYPES.index(question_type)}",
                    "question_type": question_type,
                    "question": str(rng.choice(STEMS[question_type])),
                    "gt_answer": phantom.facts[question_type],
                    "image_path": image_path,
                    **{f"option_{LETTERS[i]}": option for i, option in enumerate(options)},
                    "modality_type": phantom.facts["Modality Recognition"],
                }
            )
    for source, source_rows in rows.items():
        write_atomic(folder / "QA_information" / "Open-access" / f"{source}.json", json.dumps(source_rows, indent=1))
    write_atomic(folder / REGIONS, "\n".join(regions) + "\n")
    return folder


class _Canvas:
    """An RGB picture in coordinates x, y in [-1, 1] (y down), painted with soft-edged shapes."""

    def __init__(self, size: int, rng: Generator) -> None:
        axis = np.linspace(-1, 1, size, dtype=np.float32)
        self.y, self.x = np.meshgrid(axis, axis, indexing="ij")
        # Anatomy is jittered as a whole, so that no single pixel tells it.
        self.dx, self.dy = rng.uniform(-0.06, 0.06, 2)
        self.scale = rng.uniform(0.92, 1.08)
        self.rng = rng
        self.rgb = np.zeros((size, size, 3), np.float32)
        self.edge = 0.9 * size / 2  # sharpness of an edge: about one pixel wide at any size

    def fill(self, colour: tuple[float, float, float] | float) -> None:
        self.rgb[:] = colour

    def paint(self, mask: Plane, colour: tuple[float, float, float] | float, opacity: float = 1.0) -> None:
        alpha = np.clip(mask, 0, 1)[..., None] * opacity
        self.rgb += alpha * (np.asarray(colour, np.float32) - self.rgb)

    def inside(self, distance: Plane) -> Plane:
        """Soft mask of the points where a signed distance (negative inside) is below zero."""
        return np.clip(0.5 - distance * self.edge, 0, 1)

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> Plane:
        rx, ry = rx * self.scale, ry * self.scale
        r = np.hypot((self.x - x - self.dx) / rx, (self.y - y - self.dy) / ry)
        return self.inside((r - 1) * min(rx, ry))

    def rim(self, x: float, y: float, rx: float, ry: float, width: float) -> Plane:
        return self.ellipse(x, y, rx, ry) - self.ellipse(x, y, rx - width, ry - width)

    def box(self, x: float, y: float, rx: float, ry: float) -> Plane:
        dx, dy = abs(self.x - x - self.dx) - rx * self.scale, abs(self.y - y - self.dy) - ry * self.scale
        return self.inside(np.maximum(dx, dy))

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float) -> Plane:
        px, py, vx, vy = self.x - x0 - self.dx, self.y - y0 - self.dy, x1 - x0, y1 - y0
        t = np.clip((px * vx + py * vy) / (vx * vx + vy * vy), 0, 1)
        return self.inside(np.hypot(px - t * vx, py - t * vy) - width)

    def stripes(self, angle: float, period: float) -> Plane:
        phase = (self.x * np.cos(angle) + self.y * np.sin(angle)) * 2 * np.pi / period
        return 0.5 + 0.5 * np.sin(phase + self.rng.uniform(0, 2 * np.pi))

    def lesion(
        self, shape: str, x: float, y: float, radius: float, colour: tuple[float, float, float], opacity: float
    ) -> None:
        px, py = self.x - x, self.y - y
        r, angle = np.hypot(px, py), np.arctan2(py, px)
        if shape == "blob":
            mask = self.inside(r - radius * 0.9)
        elif shape == "ring":
            mask = self.inside(abs(r - radius * 0.8) - radius * 0.2)
        elif shape == "spikes":
            wave = np.cos(angle * 6 + self.rng.uniform(0, 2 * np.pi))
            mask = self.inside((r - radius * (0.68 + 0.38 * wave)) * 0.7)
        else:
            mask = np.zeros_like(r)
            turn = self.rng.uniform(0, 2 * np.pi)
            for k in range(6):
                distance = 0.0 if k == 5 else radius * 0.8
                cx, cy = (
                    distance * np.cos(turn + k * 2 * np.pi / 5),
                    distance * np.sin(turn + k * 2 * np.pi / 5),
                )
                mask = np.maximum(mask, self.inside(np.hypot(px - cx, py - cy) - radius * 0.22))
        self.paint(mask, colour, opacity)

    def image(self, noise: float) -> Image.Image:
        """8-bit RGB with a random exposure and noise; `noise` below zero means speckle (multiplied)."""
        gain, grain = self.rng.uniform(0.9, 1.1), self.rng.normal(0, abs(noise), self.x.shape)[..., None]
        rgb = self.rgb * (1 + grain) if noise < 0 else self.rgb + grain
        return Image.fromarray((np.clip(rgb * gain, 0, 1) * 255).astype(np.uint8))


def _ct(c: _Canvas, anatomy: int) -> None:
    c.fill(0.02)
    if anatomy == 0:
        c.paint(c.ellipse(0, 0, 0.68, 0.85), 0.42)
        c.paint(c.rim(0, 0, 0.68, 0.85, 0.09), 0.92)
    elif anatomy == 1:
        c.paint(c.ellipse(0, 0, 0.92, 0.70), 0.45)
        for side in (-1, 1):
            c.paint(c.ellipse(0.42 * side, -0.02, 0.34, 0.52), 0.10)
        c.paint(c.ellipse(0, 0.50, 0.13, 0.12), 0.92)
    elif anatomy == 2:
        c.paint(c.ellipse(0, 0, 0.92, 0.72), 0.40)
        c.paint(c.ellipse(-0.30, -0.05, 0.52, 0.48), 0.52)
        c.paint(c.ellipse(0, 0.50, 0.13, 0.12), 0.92)
    else:
        c.paint(c.ellipse(0, 0, 0.92, 0.62), 0.40)
        for side in (-1, 1):
            c.paint(c.rim(0.62 * side, 0.05, 0.24, 0.36, 0.09), 0.92)


def _mri(c: _Canvas, anatomy: int) -> None:
    c.fill(0.01)
    if anatomy == 0:
        c.paint(c.ellipse(0, 0, 0.72, 0.86), 0.50)
        c.paint(c.stripes(c.rng.uniform(0, 3), 0.22) * c.rim(0, 0, 0.70, 0.84, 0.20), 0.25)
        for side in (-1, 1):
            c.paint(c.ellipse(0.11 * side, 0, 0.07, 0.26), 0.05)
    elif anatomy == 1:
        c.paint(c.box(0, 0, 0.85, 0.95), 0.25)
        for k in range(-3, 4):
            c.paint(c.box(0, k * 0.29, 0.22, 0.11), 0.60)
        c.paint(c.box(0.36, 0, 0.06, 0.95), 0.75)
    elif anatomy == 2:
        c.paint(c.box(0, 0, 0.62, 0.98), 0.22)
        c.paint(c.ellipse(0, -0.62, 0.50, 0.52), 0.62)
        c.paint(c.ellipse(0, 0.66, 0.50, 0.50), 0.62)
    else:
        c.paint(c.ellipse(0, 0, 0.92, 0.78), 0.18)
        c.paint(c.ellipse(0, 0, 0.56, 0.56), 0.62)
        c.paint(c.ellipse(0.06, 0, 0.34, 0.34), 0.20)


def _ultrasound(c: _Canvas, anatomy: int) -> None:
    c.fill(0.30)
    if anatomy == 0:
        c.paint(c.stripes(1.5, 0.9), 0.42, 0.6)
    elif anatomy == 1:
        c.paint(c.ellipse(0, 0, 0.78, 0.52), 0.14)
        c.paint(c.ellipse(0, 0, 0.42, 0.16), 0.62)
    elif anatomy == 2:
        for side in (-1, 1):
            c.paint(c.ellipse(0.46 * side, 0, 0.38, 0.40), 0.48)
        c.paint(c.ellipse(0, 0.02, 0.16, 0.20), 0.05)
    else:
        c.paint(c.ellipse(0, 0, 0.74, 0.66), 0.03)
    fan = c.inside(abs(np.arctan2(c.x, c.y + 1.6)) - 0.62) * c.inside(np.hypot(c.x, c.y + 1.6) - 2.45)
    c.rgb *= fan[..., None]


def _dermoscopy(c: _Canvas, anatomy: int) -> None:
    tone = c.rng.uniform(0.75, 1.0)
    c.fill((0.90 * tone, 0.68 * tone, 0.58 * tone))
    if anatomy == 0:
        for _ in range(9):
            x, lean = c.rng.uniform(-1, 1), c.rng.uniform(-0.5, 0.5)
            c.paint(c.line(x - lean, -1.2, x + lean, 1.2, 0.015), (0.16, 0.10, 0.08), 0.85)
    elif anatomy == 1:
        c.paint(c.stripes(c.rng.uniform(1.2, 1.9), 0.24), (0.70 * tone, 0.46 * tone, 0.40 * tone), 0.6)
    elif anatomy == 2:
        grid = np.sin((c.x - c.dx) * 15) * np.sin((c.y - c.dy) * 15)
        c.paint(np.clip(grid * 2 - 0.6, 0, 1), (0.98, 0.86, 0.70), 0.8)


def _fundus(c: _Canvas, anatomy: int) -> None:
    c.fill(0.01)
    c.paint(c.inside(np.hypot(c.x, c.y) - 0.97), (0.78, 0.36, 0.14))
    vessel, disc, macula = (0.48, 0.10, 0.06), (0.98, 0.86, 0.55), (0.42, 0.16, 0.06)
    if anatomy == 3:
        for lean in (-0.6, -0.2, 0.2, 0.6):
            c.paint(c.line(lean - 0.2, -0.9, lean + 0.2, 0.9, 0.022), vessel, 0.8)
    else:
        x = {0: 0.0, 1: 1.05, 2: -0.66}[anatomy]
        for end in (-0.75, 0.75):
            c.paint(c.line(x, 0, 0.1, end, 0.028), vessel, 0.9)
            c.paint(c.line(x, 0, -0.5 if anatomy != 2 else 0.7, end * 0.8, 0.022), vessel, 0.9)
        if anatomy != 1:
            c.paint(c.ellipse(x, 0, 0.20, 0.22), disc)
        if anatomy != 0:
            c.paint(c.ellipse(0.0 if anatomy == 1 else 0.35, 0, 0.17, 0.17), macula, 0.8)
    c.rgb *= c.inside(np.hypot(c.x, c.y) - 0.97)[..., None]


def _oct(c: _Canvas, anatomy: int) -> None:
    c.fill(0.05)
    x = c.x - c.dx
    surface = {
        0: -0.25 + 0.30 * np.exp(-((x / 0.28) ** 2)),
        1: -0.25 + 0.85 * np.exp(-((x / 0.22) ** 2)),
        2: -0.65 + 0.75 * x**2,
        3: -0.62 + 0.0 * x,
    }[anatomy] + c.dy
    layers = ((0.12, 0.70), (0.30, 0.35), (0.16, 0.55)) if anatomy != 2 else ((0.07, 0.75), (0.24, 0.30), (0.07, 0.75))
    if anatomy == 3:
        layers = ((0.10, 0.60), (0.18, 0.35), (0.90, 0.50))
    for thickness, brightness in layers:
        c.paint(c.inside(surface - c.y) * c.inside(c.y - surface - thickness), brightness)
        surface = surface + thickness


def _microscopy(c: _Canvas, anatomy: int) -> None:
    c.fill((0.95, 0.90, 0.93))
    if anatomy == 0:
        for _ in range(16):
            x, y = c.rng.uniform(-1, 1, 2)
            c.paint(c.ellipse(x, y, 0.15, 0.15), (0.90, 0.62, 0.66), 0.9)
            c.paint(c.ellipse(x, y, 0.06, 0.06), (0.95, 0.76, 0.78), 0.9)
    elif anatomy == 1:
        c.paint(c.stripes(c.rng.uniform(0.3, 0.9), 0.36), (0.86, 0.42, 0.56), 0.9)
    elif anatomy == 2:
        c.fill((0.88, 0.66, 0.82))
        for gx in range(-3, 4):
            for gy in range(-3, 4):
                c.paint(c.ellipse(gx * 0.36 + 0.18 * (gy % 2), gy * 0.34, 0.08, 0.08), (0.50, 0.28, 0.62), 0.8)
    else:
        c.fill((0.84, 0.56, 0.70))
        for gx in range(-1, 2):
            for gy in range(-1, 2):
                c.paint(c.ellipse(gx * 0.66 + 0.2 * (gy % 2), gy * 0.64, 0.30, 0.29), (0.98, 0.96, 0.97))


def _xray(c: _Canvas, anatomy: int) -> None:
    c.fill(0.04)
    if anatomy == 0:
        c.paint(c.box(0, 0, 0.92, 0.95), 0.50)
        for side in (-1, 1):
            c.paint(c.ellipse(0.45 * side, 0, 0.34, 0.72), 0.12)
        for k in range(-3, 4):
            c.paint(c.box(0, k * 0.27, 0.88, 0.025), 0.62, 0.55)
        c.paint(c.box(0, 0, 0.09, 0.95), 0.72)
    elif anatomy == 1:
        c.paint(c.ellipse(0, 0.55, 0.42, 0.36), 0.42)
        for tip, top in zip((-0.52, -0.24, 0.04, 0.32), (-0.55, -0.82, -0.86, -0.70), strict=True):
            c.paint(c.line(tip * 0.6, 0.45, tip, top, 0.085), 0.52)
        c.paint(c.line(0.25, 0.6, 0.75, 0.05, 0.085), 0.52)
    elif anatomy == 2:
        c.paint(c.box(0, 0, 0.60, 1.0), 0.20)
        for top in (-1, 1):
            c.paint(c.box(0, 0.62 * top, 0.30, 0.56), 0.60)
            c.paint(c.ellipse(0, 0.20 * top, 0.46, 0.16), 0.64)
    else:
        c.paint(c.ellipse(0, -0.05, 0.74, 0.84), 0.40)
        c.paint(c.rim(0, -0.05, 0.74, 0.84, 0.06), 0.66)
        for side in (-1, 1):
            c.paint(c.ellipse(0.27 * side, 0.12, 0.17, 0.14), 0.10)
        c.paint(c.box(0, 0.62, 0.30, 0.06), 0.70)


_BACKGROUNDS: dict[str, Callable[[_Canvas, int], None]] = {
    "CT": _ct,
    "MRI": _mri,
    "Ultrasound": _ultrasound,
    "Dermoscopy": _dermoscopy,
    "Fundus Photography": _fundus,
    "OCT": _oct,
    "Microscopy": _microscopy,
    "X-Ray": _xray,
}
_LESION_COLOURS = {
    "CT": (0.80, 0.80, 0.80),
    "MRI": (1.0, 1.0, 1.0),
    "Ultrasound": (0.95, 0.95, 0.95),
    "Dermoscopy": (0.30, 0.13, 0.10),
    "Fundus Photography": (0.99, 0.93, 0.40),
    "OCT": (1.0, 1.0, 1.0),
    "Microscopy": (0.28, 0.10, 0.48),
    "X-Ray": (0.98, 0.98, 0.98),
}
_NOISE = {  # standard deviation of the grain, of full scale; below zero: speckle
    "CT": 0.04,
    "MRI": 0.03,
    "Ultrasound": -0.35,
    "Dermoscopy": 0.02,
    "Fundus Photography": 0.02,
    "OCT": -0.30,
    "Microscopy": 0.02,
    "X-Ray": 0.02,
}
