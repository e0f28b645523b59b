"""One question about one case: the reply that evaluation would get, and what speaks for and against trusting it.

`ask` is the one maker of a `Case`; the command line prints it, the app shows it while it grows, `medr1.case` writes it
as a page.

    case = ask(load_respondent("runs/ct/model"), question_about([Path("scan.png")], "Which?", ["Cyst", "Abscess"]))
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from pydantic import ValidationError
from scipy.ndimage import laplace
from torch import Tensor

from medr1.answers import extract_answer
from medr1.confidence import option_logprobs
from medr1.config import Config, load_config
from medr1.controls import blank_image, permuted
from medr1.errors import MedR1Error
from medr1.evaluation import weights_fingerprint
from medr1.images import load_image
from medr1.models import VLM, encode_prompts, evaluating, load_vlm
from medr1.prompts import MODES, build_messages
from medr1.records import LETTERS, Record
from medr1.rollouts import sample

SHOWN = 640
"""Longest side of a picture that a case keeps, in pixels."""
NO_LETTER = "none"
"""Among votes: a sample that chose no single option."""

SAME_PROBABILITY = 0.1
"""The image barely matters where blanking it leaves the option and moves its probability by less than this."""
MIN_SIDE, MAX_ASPECT = 64, 4.0
"""An image with a shorter side below this (pixels), or a longer side above so many shorter ones, is warned about."""
MIN_CONTRAST = 2.0
"""An image whose grey values (0 to 255) spread less than this (standard deviation) counts as blank."""
MIN_SHARPNESS = 8.0
"""A `sharpness` below this counts as blurred."""


@dataclass(frozen=True)
class Respondent:
    """A model that answers, and what is known about it."""

    vlm: VLM
    fingerprint: str
    """SHA-256 (hex) of its weights."""
    training: Config | None
    """The recipe of the run that made it; None where none lies beside the model."""


@dataclass(frozen=True)
class Case:
    """What one model made of one question. While `ask` is under way, what is not measured yet is None.

    Example:
        Case(…, reply="<think>ring</think><answer>B</answer>", outcome="letter", letter="B", probabilities=(0.2, 0.8),
             votes={"B": 7, "A": 1}, warnings=())
    """

    model: str
    fingerprint: str
    record: Record
    mode: str
    max_new_tokens: int
    num_samples: int
    seed: int
    pictures: tuple[Image.Image, ...]
    """What the model was shown, RGB, shrunk to SHOWN pixels or fewer a side."""
    reply: str = ""
    """Raw text, greedy, as far as it is written."""
    cut: bool = False
    """Whether the reply ran into max_new_tokens."""
    outcome: str | None = None
    """As `answers.Answer`; None until the reply is complete."""
    letter: str | None = None
    probabilities: tuple[float, ...] | None = None
    """Of each option among the options; in mode "think" after the reply's reasoning."""
    votes: dict[str, int] | None = None
    """Letters (or NO_LETTER) of `num_samples` replies drawn at temperature 1."""
    warnings: tuple[str, ...] | None = None
    """Sentences; () where the checks found nothing."""
    heatmaps: tuple[Image.Image, ...] | None = None
    """Each picture under its map of what speaks for the answer."""

    @property
    def option(self) -> str | None:
        """Text of the chosen option."""
        return self.record.options[LETTERS.index(self.letter)] if self.letter else None

    @property
    def confidence(self) -> float | None:
        """Probability of the chosen option."""
        return self.probabilities[LETTERS.index(self.letter)] if self.letter and self.probabilities else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without pictures and without names of files."""
        by_letter = dict(zip(self.record.letters, self.probabilities, strict=True)) if self.probabilities else None
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "mode": self.mode,
            "reply": self.reply,
            "outcome": self.outcome,
            "letter": self.letter,
            "option": self.option,
            "confidence": self.confidence,
            "probabilities": by_letter,
            "votes": self.votes,
            "warnings": self.warnings,
        }


def load_respondent(name: str) -> Respondent:
    """Load a model, its fingerprint and, where it lies in a training run's folder, that run's recipe.

    Raises:
        MedR1Error: see `models.load_vlm`, or the recipe beside the model is damaged.
    """
    vlm = load_vlm(name)
    recipe = Path(name).expanduser().resolve().parent / "recipe.toml"
    known = name != "tiny" and recipe.is_file()
    return Respondent(vlm, weights_fingerprint(vlm.model), load_config(recipe) if known else None)


def question_about(
    images: Sequence[Path], question: str, options: Sequence[str], modality: str | None = None
) -> Record:
    """A record of a question that is asked, not evaluated.

    Raises:
        MedR1Error: an empty question, fewer than two options, or an unknown modality.
    """
    try:
        return Record(
            id="ask",
            images=tuple(images),
            question=question,
            options=tuple(options),
            answer=LETTERS[0],  # nobody knows it, and nothing here reads it
            modality=modality,
            question_type=None,
            source="ask",
            group="ask",
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise MedR1Error(f"the question cannot be asked: {reason}; give a question and two options or more") from error


def ask(
    respondent: Respondent,
    record: Record,
    *,
    mode: str = "think",
    max_new_tokens: int = 256,
    num_samples: int = 0,
    heatmap: bool = False,
    seed: int = 0,
    on_update: Callable[[Case], None] = lambda case: None,
) -> Case:
    """Ask once greedily, then measure the answer.

    Args:
        record: from `question_about`.
        num_samples: replies drawn at temperature 1 to see how many agree; 0 draws none.
        heatmap: also make a heatmap an image (`explain.occlusion`).
        seed: of these samples and of the other order of the options.
        on_update: called with the case after each token and each measurement; what it raises ends the call.

    Raises:
        MedR1Error: an unreadable image, an unknown mode, a text with a chat control token.
    """
    if mode not in MODES:
        raise MedR1Error(f"--mode {mode}: choose {', '.join(MODES)}")
    vlm = respondent.vlm
    images = [load_image(path) for path in record.images]
    pictures = tuple(map(shrunk, images))
    case = Case(vlm.name, respondent.fingerprint, record, mode, max_new_tokens, num_samples, seed, pictures)

    def update(**measured: Any) -> None:
        nonlocal case
        case = replace(case, **measured)
        on_update(case)

    def show(ids_NT: Tensor) -> None:
        text = vlm.tokenizer.decode(ids_NT[0], skip_special_tokens=True)
        update(reply=text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character whose last bytes are to come

    prompts = encode_prompts(vlm, [build_messages(record, mode)], [images])
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    rollout = sample(vlm, prompts, num_completions=1, greedy=True, on_step=show, **settings)
    reply = rollout.texts[0]
    answer = extract_answer(reply, record.options)
    cut = not bool(rollout.finished_N[0])
    update(reply=reply, cut=cut, outcome=answer.outcome, letter=answer.letter)

    def probabilities(prompts: Any, replies: Sequence[str], record: Record) -> list[list[float]]:
        reasoning = [_reasoning(reply) for reply in replies] if mode == "think" else None
        with evaluating(vlm.model):
            logps = option_logprobs(vlm, prompts, [record] * len(replies), mode=mode, reasoning=reasoning)
        return [logp.exp().tolist() for logp in logps]

    update(probabilities=tuple(probabilities(prompts, [reply], record)[0]))
    if num_samples:
        drawn = sample(vlm, prompts, num_completions=num_samples, **settings).texts
        update(votes=dict(Counter(extract_answer(text, record.options).letter or NO_LETTER for text in drawn)))

    warnings = _training_warnings(respondent, record.modality)
    if case.votes and case.letter and 2 * (agree := case.votes.get(case.letter, 0)) <= num_samples:
        warnings.append(f"The model is not of one mind: {agree} of {num_samples} samples agree.")
    for number, image in enumerate(images, start=1):
        name = f"Image {number}" if len(images) > 1 else "The image"
        warnings += [f"{name} {fault}." for fault in image_faults(image)]
    other = permuted(record, seed)
    asked = [(other, images)] + ([(record, [blank_image(image) for image in images])] if images else [])
    prompts = encode_prompts(vlm, [build_messages(each, mode) for each, _ in asked], [shown for _, shown in asked])
    replies = sample(vlm, prompts, num_completions=1, greedy=True, **settings).texts
    again = extract_answer(replies[0], other.options).letter
    if case.letter and (said := other.options[LETTERS.index(again)] if again else None) != case.option:
        instead = f"“{said}” instead of “{case.option}”" if said else "no single option"
        warnings.append(f"The order of the options matters: with another order the model says {instead}.")
    if images and case.letter and extract_answer(replies[1], record.options).letter == case.letter:
        [blank] = probabilities(prompts.select([1]), replies[1:], record)
        without = blank[LETTERS.index(case.letter)]
        assert case.confidence is not None
        if abs(without - case.confidence) < SAME_PROBABILITY:
            warnings.append(
                f"The image barely matters: painted over in its mean colour, the answer stays {case.letter} with "
                f"{100 * without:.0f} % ({100 * case.confidence:.0f} % with the image)."
            )
    update(warnings=tuple(warnings))
    if heatmap and case.letter:
        from medr1.explain import occlusion, overlay

        maps = occlusion(vlm, record, mode=mode, letter=case.letter)
        update(heatmaps=tuple(overlay(*pair) for pair in zip(pictures, maps, strict=True)))
    return case


def shrunk(image: Image.Image) -> Image.Image:
    """The image with at most SHOWN pixels a side."""
    return ImageOps.contain(image, (SHOWN, SHOWN)) if max(image.size) > SHOWN else image


def image_faults(image: Image.Image) -> list[str]:
    """What is wrong with an RGB image as a picture, each as the end of a sentence that begins with "The image"."""
    faults = []
    short, long = sorted(image.size)
    if short < MIN_SIDE:
        faults.append(f"is small: {image.width} x {image.height} pixels, a side below {MIN_SIDE}")
    if long > MAX_ASPECT * short:
        faults.append(f"is a strip: {image.width} x {image.height} pixels")
    if np.asarray(image.convert("L")).std() < MIN_CONTRAST:
        faults.append("is blank or nearly so")
    elif (sharp := sharpness(image)) < MIN_SHARPNESS:
        faults.append(f"looks blurred: sharpness {sharp:.1f}, below {MIN_SHARPNESS:g}")
    return faults


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the grey values (0 to 255), the image shrunk to 224 pixels or fewer a side.

    Pech-Pacheco et al., ICPR 2000. Of 1,500 public clinical images in ten sets one is below MIN_SHARPNESS; after a
    Gaussian blur with a standard deviation of 2 pixels 1,068 are, with 4 pixels all.
    """
    grey = image.convert("L")
    grey.thumbnail((224, 224))
    return float(laplace(np.asarray(grey, np.float64)).var())


def _training_warnings(respondent: Respondent, modality: str | None) -> list[str]:
    training = respondent.training
    if training is None:
        if respondent.vlm.name == "tiny":
            return ["This model knows drawn phantoms only: it has never seen a medical image."]
        return ["What this model was trained on is not recorded beside it."]
    if training.data.path == "phantoms":
        return ["This model was trained on drawn phantoms, not on medical images."]
    if trained := training.data.modalities:
        said = "the image's modality was not stated" if modality is None else f"this image is stated to be {modality}"
        if modality not in trained:
            return [f"Trained on {', '.join(trained)} only; {said}."]
    return []


def _reasoning(reply: str) -> str:
    """The text inside <think></think>."""
    return reply.partition("<think>")[2].partition("</think>")[0]
