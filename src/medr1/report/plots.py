"""The report's figures as inline SVG: drawn without a display, text kept as text, colours of Okabe and Ito.

Before and after differ in shape and fill as well as in colour, so that a grey print says the same. Each figure is drawn
twice, for a wide column and for a telephone, where a shrunk one could not be read; the page shows one of them. Colours
are names of the page's own (style.css), which differ in the dark, with the one in the light to stand alone.
"""

import functools
import html
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Concatenate, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from medr1.report.pages import decimal

INK, GREY, RULE, PAPER = "#1b1f24", "#6b7280", "#d9dde3", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
NAMES = {
    INK: "ink", GREY: "dot-grey", RULE: "rule", PAPER: "paper",
    BLUE: "blue", ORANGE: "dot-orange", GREEN: "dot-green", PURPLE: "dot-purple",
}  # fmt: skip
"""What style.css calls these colours."""

WIDE, NARROW = 440, 320
"""Width of a figure in SVG units, in which text is 11 high."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medr1",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.parse_math": False,  # in the name of a model a dollar sign is one
}

Cell = dict[str, Any]
"""{accuracy, ci95, …} as metrics.py gives it."""


@dataclass(frozen=True)
class Mark:
    """How one series of dots is drawn."""

    colour: str
    filled: bool
    shape: str = "o"


BEFORE = Mark(GREY, filled=False)
AFTER = Mark(BLUE, filled=True)
CONTROL = Mark(ORANGE, filled=True, shape="D")
CHANCE = Mark(INK, filled=True, shape="|")
OTHERS = Mark(BLUE, filled=False)

CURVES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))
"""Colour and dash of the curves of one panel, in their order."""


P = ParamSpec("P")


def twice(draw: Callable[Concatenate[float, P], tuple[Figure, str]]) -> Callable[P, str]:
    """A function that draws a figure of a given width, as one that gives both its drawings."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(STYLE):
            return "".join(_svg(*draw(width, *args, **kwargs), width) for width in (WIDE, NARROW))

    return drawn


def story_plot(lines: Sequence[tuple[str, Cell, Mark]]) -> str:
    """Controls and models before and after training, see `dot_plot`."""
    return dot_plot(lines, "Accuracy of controls, of the model before and of the model after training", left=132)


@twice
def dot_plot(width: float, lines: Sequence[tuple[str, Cell, Mark]], title: str, left: float) -> tuple[Figure, str]:
    """One line a share (label, cell, mark), on one axis from 0 to 100 %, the value written at its end.

    Args:
        left: room for the labels in points.
    """
    figure, axes = _line_axes(width, [label for label, _, _ in lines], 26, left, right=48)
    for y, (_, cell, mark) in enumerate(lines):
        _dot(axes, y, cell, mark)
        bold = "bold" if mark is AFTER else "normal"
        axes.text(1.03, y, f"{decimal(100 * cell['accuracy'], 1)} %", va="center", color=INK, fontweight=bold)
    return figure, title


@twice
def reliability_plot(width: float, models: Sequence[tuple[Sequence[Cell], Mark]]) -> tuple[Figure, str]:
    """Accuracy against confidence in bins {confidence, accuracy, ci95}; a calibrated model keeps to the diagonal."""
    figure, axes = _share_axes(width, "confidence", "answers right")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1.2, linestyle=":")
    for bins, mark in models:
        for cell in bins:
            axes.plot([cell["confidence"]] * 2, cell["ci95"], color=mark.colour, linewidth=1.2, alpha=0.45)
        axes.plot(
            [cell["confidence"] for cell in bins],
            [cell["accuracy"] for cell in bins],
            mark.shape,
            markersize=6,
            markerfacecolor=mark.colour if mark.filled else PAPER,
            markeredgecolor=mark.colour,
            markeredgewidth=1.6,
        )
    return figure, "Share of right answers by confidence, before and after training"


@twice
def coverage_plot(
    width: float, models: Sequence[tuple[Sequence[tuple[float, float]], Mark]], chosen: tuple[float, float]
) -> tuple[Figure, str]:
    """Accuracy of the most confident answers against the share of questions answered; `chosen` marks a threshold."""
    figure, axes = _share_axes(width, "questions answered, the most confident first", "answers right")
    for points, mark in models:
        axes.plot(*zip(*points, strict=True), color=mark.colour, linewidth=2, linestyle="-" if mark.filled else "--")
    if chosen[1] is not None:
        axes.plot(*chosen, CONTROL.shape, color=CONTROL.colour, markersize=8)
    return figure, "Accuracy by share of questions answered, before and after training"


@twice
def truncation_plot(width: float, points: Sequence[tuple[float, dict[str, Any]]]) -> tuple[Figure, str]:
    """Share of answers {value, ci95} that are already those of the whole reasoning, by the share of words kept."""
    figure, axes = _share_axes(width, "reasoning kept", "same answer as with all of it")
    for kept, cell in points:
        if cell["ci95"]:
            axes.plot([kept, kept], cell["ci95"], color=AFTER.colour, linewidth=2, alpha=0.45)
    axes.plot(
        [kept for kept, _ in points], [cell["value"] for _, cell in points], "-o", color=AFTER.colour, linewidth=2
    )
    return figure, "Share of answers that agree with those after the whole reasoning, by the share kept"


@twice
def change_plot(width: float, lines: Sequence[tuple[str, Cell, Cell]], title: str) -> tuple[Figure, str]:
    """One line a group (name, cell before, cell after), with the group's chance level as a short stroke."""
    figure, axes = _line_axes(width, [name for name, _, _ in lines], 30, left=150)
    for y, (_, before, after) in enumerate(lines):
        _dot(axes, y - 0.16, before, BEFORE)
        _dot(axes, y + 0.16, after, AFTER)
        chance = [before["chance"]] * 2
        axes.plot(chance, [y - 0.28, y + 0.28], color=INK, linewidth=1.4, linestyle=(0, (1.5, 1)))
    return figure, title


SHARES = {
    "reward_accuracy": ("right answers", BLUE, "-"),
    "format_rate": ("exact format", GREEN, "--"),
    "zero_variance_groups": ("groups without signal", ORANGE, ":"),
    "truncated_rate": ("cut at the limit", PURPLE, "-."),
}


def learning_curves(log: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG) of what the training log holds: shares of the sampled completions, their length, the loss.

    Faint lines are the logged values, strong ones their running mean over a twentieth of the run.
    """
    figures = []
    shares = {key: style for key, style in SHARES.items() if any(key in line for line in log)}
    if shares:
        figures.append(("Sampled in training", _sampled(log, shares)))
    if any("looking_reliance" in line for line in log):
        figures.append(("Does it keep looking?", _looked(log)))
    for key, title in (("completion_tokens", "Tokens a completion"), ("loss", "Loss")):
        if sum(key in line for line in log) > 1 and not (key == "loss" and shares):
            figures.append((title, _logged(log, key, title)))
    return figures


@twice
def _sampled(
    width: float, log: Sequence[dict[str, Any]], shares: Mapping[str, tuple[str, str, str]]
) -> tuple[Figure, str]:
    tested = [line for line in log if line.get("eval_accuracy") is not None]
    figure, axes = _curve_axes(width, len(shares) + bool(tested))
    for key, (label, colour, dash) in shares.items():
        _curve(axes, log, key, label, colour, dash)
    if tested:
        values = np.array([line["eval_accuracy"] for line in tested])
        low = values - np.array([line.get("eval_ci_low", line["eval_accuracy"]) for line in tested])
        high = np.array([line.get("eval_ci_high", line["eval_accuracy"]) for line in tested]) - values
        steps = [line["step"] for line in tested]
        axes.errorbar(steps, values, yerr=[low, high], fmt="o", color=INK, ms=4, lw=1, label="held-out accuracy")
    _shares(figure, axes, width)
    return figure, f"Learning curve: {', '.join(label for label, _, _ in shares.values())}"


LOOKED = {
    "looking_accuracy": ("right with the own image", BLUE, "-"),
    "looking_accuracy_other": ("right with another image", ORANGE, "--"),
    "looking_sensitivity": ("answers that change with it", GREEN, "-."),
}


@twice
def _looked(width: float, log: Sequence[dict[str, Any]]) -> tuple[Figure, str]:
    figure, axes = _curve_axes(width, len(LOOKED))
    lines = [line for line in log if "looking_reliance" in line]
    steps = [line["step"] for line in lines]
    for key, (label, colour, dash) in LOOKED.items():
        axes.plot(steps, [line[key] for line in lines], "o", color=colour, linestyle=dash, ms=4, lw=2, label=label)
        low, high = ([line[f"{key}_{end}"] for line in lines] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    _shares(figure, axes, width)
    return figure, f"Does it keep looking: {', '.join(label for label, _, _ in LOOKED.values())}"


def _shares(figure: Figure, axes: Axes, width: float) -> None:
    """The axis of shares, and the legend below."""
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
    _legend(figure, width)


def _legend(figure: Figure, width: float) -> None:
    columns = 2 if width == WIDE else 1
    figure.legend(frameon=False, labelcolor=INK, loc="lower center", ncols=columns, columnspacing=2)


@twice
def _logged(width: float, log: Sequence[dict[str, Any]], key: str, title: str) -> tuple[Figure, str]:
    figure, axes = _curve_axes(width)
    _curve(axes, log, key, None, BLUE, "-")
    axes.set_ylim(bottom=0)
    return figure, f"Learning curve: {title.lower()}"


@twice
def study_plot(width: float, lines: Sequence[dict[str, Any]], others: str) -> tuple[Figure, str]:
    """Ways of training along one axis (`study_numbers.line_numbers`): base, own domain, others, image blanked."""
    figure, axes = _line_axes(width, [line["label"] for line in lines], 40, left=152)
    half = 0.4 if width == WIDE else 0.3  # of a stroke, which is not to cross the label over the line
    for y, line in enumerate(lines):
        for shift, cell, mark in (
            (-0.24, line["base"], BEFORE),
            (-0.08, line["own"], AFTER),
            (0.08, line["others"], OTHERS),
            (0.24, line["controls"].get("blank"), CONTROL),
        ):
            if cell:
                _dot(axes, y + shift, cell, mark)
        for cell, colour, dash in (({"accuracy": line["own"]["chance"]}, INK, ":"), (line["prior"], PURPLE, "-")):
            if cell["accuracy"] is not None:
                axes.plot([cell["accuracy"]] * 2, [y - half, y + half], color=colour, linewidth=1.6, linestyle=dash)
    return figure, f"Accuracy before training, in the own domain, on {others}, and with the image blanked"


@twice
def looking_plot(width: float, lines: Sequence[tuple[str, Sequence[dict[str, Any] | None]]]) -> tuple[Figure, str]:
    """Models (name, {value, ci95} with its own image, with another one of the modality, with a blank one; None where it
    was not asked) along one axis: the gaps are what the image adds.
    """
    figure, axes = _line_axes(width, [clipped(name) for name, _ in lines], 34, left=142)
    for y, (_, cells) in enumerate(lines):
        for shift, cell, mark in zip((-0.2, 0, 0.2), cells, (AFTER, CONTROL, BEFORE), strict=True):
            if cell:
                _dot(axes, y + shift, {"accuracy": cell["value"], "ci95": cell["ci95"]}, mark)
    return figure, "Accuracy with the own image, with another one of the modality, and with a blank one"


@twice
def steps_plot(width: float, curves: Mapping[str, Sequence[tuple[int, Cell]]]) -> tuple[Figure, str]:
    """Accuracy (name to its points) by the step after which a checkpoint was written."""
    figure, axes = _curve_axes(width, len(curves))
    for (name, points), (colour, dash) in zip(curves.items(), curve_styles(), strict=False):
        steps = [step for step, _ in points]
        values = np.array([cell["accuracy"] for _, cell in points])
        limits = np.array([cell["ci95"] for _, cell in points]).T
        spans = np.abs(limits - values)
        axes.errorbar(steps, values, yerr=spans, fmt="o", ls=dash, color=colour, ms=5, lw=1.6, label=clipped(name, 36))
    _shares(figure, axes, width)
    return figure, f"Accuracy by step of training: {', '.join(curves)}"


COMPARED = {
    "reward_accuracy": "Right answers sampled in training",
    "looking_reliance": "What the image adds over another one, held out",
    "completion_tokens": "Tokens a completion",
    "loss": "Loss",
}


def compared_curves(logs: Mapping[str, Sequence[dict[str, Any]]]) -> list[tuple[str, str]]:
    """(title, SVG) of what the logs of several runs (by name) hold, one curve a run."""
    figures = []
    for key, title in COMPARED.items():
        held = {name: log for name, log in logs.items() if sum(key in line for line in log) > 1}
        if key == "loss":  # of GRPO it says little
            held = {name: log for name, log in held.items() if not any("reward" in line for line in log)}
        if held:
            figures.append((title, _compared(held, key, title)))
    return figures


@twice
def _compared(width: float, logs: Mapping[str, Sequence[dict[str, Any]]], key: str, title: str) -> tuple[Figure, str]:
    figure, axes = _curve_axes(width, len(logs))
    for (name, log), (colour, dash) in zip(logs.items(), curve_styles(), strict=False):
        _curve(axes, log, key, clipped(name, 36), colour, dash)
    if key in ("reward_accuracy", "looking_reliance"):
        _shares(figure, axes, width)
    else:
        _legend(figure, width)
    if key == "looking_reliance":
        axes.set_ylim(min(-0.05, axes.dataLim.ymin - 0.02), 1.02)
        axes.axhline(0, color=INK, linewidth=0.8)
    elif key != "reward_accuracy":
        axes.set_ylim(bottom=0)
    return figure, f"{title}: {', '.join(logs)}"


def curve_styles() -> Iterator[tuple[str, str]]:
    """Colours and dashes without end: the same four of each, paired anew every four."""
    for number in itertools.count():
        yield CURVES[number % 4][0], CURVES[(number + number // 4) % 4][1]


def clipped(name: str, most: int = 18) -> str:
    """A name that fits beside a plot, or into its legend."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


@matplotlib.rc_context(STYLE)
def curve_panel(curves: Mapping[str, Sequence[tuple[float, float]]], title: str, *, share: bool) -> str:
    """A small panel of learning curves: name to points (step, value); `share` for values in [0, 1].

    Curves of more than 120 points are drawn as the means of 120 stretches.
    """
    width, height = 270, 150
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((44 / width, 22 / height, 1 - 50 / width, 1 - 28 / height))
    axes.grid(color=RULE, linewidth=0.6)
    axes.tick_params(length=0, labelcolor=GREY, labelsize=10)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    for points, (colour, dash) in zip(curves.values(), curve_styles(), strict=False):
        if not points:
            continue  # others keep their colours
        stretches = np.array_split(np.array(points, dtype=float), min(len(points), 120))
        axes.plot(*np.array([stretch.mean(0) for stretch in stretches]).T, color=colour, linestyle=dash, linewidth=1.8)
    if share:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
    else:
        axes.set_ylim(bottom=0)
    return _svg(figure, f"Learning curves, {title}: {', '.join(name for name, points in curves.items() if points)}")


@twice
def hiding_plot(width: float, fraction: Sequence[float], curves: Mapping[str, Sequence[float]]) -> tuple[Figure, str]:
    """An answer's probability (label to values in [0, 1]) over the share of the image that is hidden or shown."""
    figure, axes = _share_axes(width, "share of the image hidden, or shown", "probability of the answer")
    for values, (colour, dash) in zip(curves.values(), CURVES, strict=False):
        axes.plot(fraction, values, color=colour, linestyle=dash, linewidth=2)
    return figure, f"Probability of the answer: {', '.join(curves)}"


def _line_axes(width: float, labels: Sequence[str], step: float, left: float, right: float = 12) -> tuple[Figure, Axes]:
    """An axis from 0 to 100 % with a ruled line for each label, `step` high; on a telephone the label stands over it.

    Lengths in points, of which an SVG unit is one.
    """
    narrow = width == NARROW
    step, left = (step + 20, 12) if narrow else (step, left)
    height, bottom = step * len(labels) + 34, 26
    figure = Figure(figsize=(width / 72, height / 72))
    across, up = 1 - (left + right) / width, 1 - (bottom + 6) / height
    axes = figure.add_axes((left / width, bottom / height, across, up))
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.tick_params(length=0, labelcolor=INK)
    axes.tick_params(axis="x", labelcolor=GREY)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    for y, label in enumerate(labels):
        axes.axhline(y, color=RULE, linewidth=0.6, zorder=0)
        if narrow:
            axes.text(0, y - 0.5, label, color=INK, va="center")
    axes.set_yticks([] if narrow else range(len(labels)), [] if narrow else labels)
    axes.set_ylim(len(labels) - 0.4, -0.8 if narrow else -0.6)
    return figure, axes


def _share_axes(width: float, across: str, up: str) -> tuple[Figure, Axes]:
    """Both axes from 0 to 100 %, named."""
    height = 250
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((62 / width, 40 / height, 1 - 76 / width, 1 - 48 / height))
    axes.set_xlabel(across, color=GREY)
    axes.set_ylabel(up, color=GREY)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
    axes.grid(color=RULE, linewidth=0.6)
    axes.tick_params(length=0, labelcolor=GREY)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _curve_axes(width: float, num_labels: int = 0) -> tuple[Figure, Axes]:
    """Axes over training steps, above room for a legend of so many labels, two a line or on a telephone one."""
    legend = 20 * math.ceil(num_labels / (2 if width == WIDE else 1)) + (6 if num_labels else 0)
    height = 220 + legend
    figure = Figure(figsize=(width / 72, height / 72))
    bottom = 38 + legend
    axes = figure.add_axes((46 / width, bottom / height, 1 - 56 / width, 1 - (bottom + 8) / height))
    axes.grid(color=RULE, linewidth=0.6)
    axes.tick_params(length=0, labelcolor=GREY)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("step", color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_axisbelow(True)
    return figure, axes


def _dot(axes: Axes, y: float, cell: Cell, mark: Mark) -> None:
    if cell["accuracy"] is None:
        return
    if cell["ci95"]:
        axes.plot(cell["ci95"], [y, y], color=mark.colour, linewidth=2, solid_capstyle="round", zorder=2)
    axes.plot(
        cell["accuracy"],
        y,
        mark.shape,
        markersize=11 if mark.shape == "|" else 6 if mark.shape == "D" else 7.5,
        markerfacecolor=mark.colour if mark.filled else PAPER,
        markeredgecolor=mark.colour,
        markeredgewidth=2,
        zorder=3,
    )


def _curve(axes: Axes, log: Sequence[dict[str, Any]], key: str, label: str | None, colour: str, dash: str) -> None:
    points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
    steps, values = np.array(points, dtype=float).T
    half = max(1, len(values) // 40)
    smooth = [values[max(0, at - half) : at + half + 1].mean() for at in range(len(values))]
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth, color=colour, linewidth=2, linestyle=dash, label=label)


def _svg(figure: Figure, title: str, width: float = WIDE) -> str:
    """The figure as an element that scales with its column, with a name for those who hear the page."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    colours = "|".join(NAMES)  # and no other, such as what is like one in the name of a model
    text = re.sub(colours, lambda found: f"var(--{NAMES[found[0]]}, {found[0]})", text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size, "matplotlib writes a view box"
    kind = "plot" if width == WIDE else "plot narrow"
    head = f'<svg class="{kind}" role="img" aria-label="{html.escape(title)}" viewBox="{size[0][9:-1]}">'
    return head + text[text.index(">") + 1 :]


def standalone(svg: str) -> str:
    """A figure of these as a file of its own: the wide drawing, its colours for white paper."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = re.sub(r"var\(--[a-z-]+, (#\w+)\)", r"\1", svg[: svg.index("</svg>") + len("</svg>")])
    return svg.replace("<svg ", f'<svg {names} style="background: white" ', 1)
