"""Heatmaps: which parts of an image speak for an answer, one score for each image token.

- `occlusion`: how far the answer's log-probability falls when a cell shows nothing but the image's mean colour.
- `gradient`: integrated gradients from the image in its mean colour (arXiv:1703.01365), by captum.

Both score the log-probability of an option among the options (`confidence.option_logprobs`), and both paint on the
pixels as the processor gives them to the model, not on the file: a cell is then exactly one token's pixels, nothing of
it leaks into the next one through the processor's resizing, and the whole image scores what evaluation scores. Neither
is a causal explanation: a cell that was never hidden in training may disturb the model by looking strange.
`medr1.trust.fidelity` measures what a map is worth.

Shapes: K versions of one prompt's images, C cells of all its images, W windows, O options.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from medr1.data.images import load_image
from medr1.data.prompts import build_messages
from medr1.data.records import LETTERS, Record
from medr1.errors import MedR1Error
from medr1.evaluation.confidence import option_logprobs
from medr1.policy.encoding import ImageCells, PromptBatch, encode_prompts, image_cells
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, evaluating

TOKENS_AT_ONCE = 2**14
"""Prompt tokens in one call of the model, which bounds its memory."""
MAX_WINDOWS = 256
"""Calls' worth of hidden windows for one image: of a finer grid, neighbouring cells are hidden together."""
GRADIENT_STEPS = 32
"""Points of the path from the mean colour to the image at which the gradient is taken (Gauss-Legendre)."""

NOT_CAUSAL = "A heatmap shows what moved this model's answer when pixels changed. It is not a causal explanation."


@dataclass(frozen=True)
class Heatmap:
    """What each cell of one image does to the log-probability of an answer.

    Example: `occlusion(vlm, record, mode="no-think")[0].scores[0, 3]` is the cell at the upper right of a 4 x 4 grid.
    """

    scores: NDArray[np.float64]
    """(rows, columns), in nats: above 0 the cell speaks for the answer, below 0 against it."""
    letter: str
    """The option that is explained."""
    logp: float
    """Its log-probability among the options (of a reply the mean over its tokens) when the whole image is seen."""


@dataclass(frozen=True)
class Subject:
    """One record as the model reads it, ready to be asked again with parts of its images hidden."""

    vlm: VLM
    record: Record
    mode: str
    reasoning: str | None
    prompt: PromptBatch
    cells: ImageCells
    blank: Tensor
    """The pixels with each image in its mean colour, as the processor scales it."""
    reply: str | None = None
    """Scored in the options' place: the one text whose log-probability is explained."""

    @classmethod
    def read(
        cls, vlm: VLM, record: Record, *, mode: str, reasoning: str | None = None, reply: str | None = None
    ) -> Self:
        """Load and encode the record.

        Raises:
            MedR1Error: it has no image or no options, an image is unreadable, or the model's family is unknown.
        """
        if not record.images or not record.options:
            lacking = "image" if record.options else "options"
            raise MedR1Error(f"record {record.id}: it has no {lacking}, so there is no heatmap; leave it out")
        images = [load_image(path) for path in record.images]
        prompt = encode_prompts(vlm, [build_messages(record, mode)], [images], thinking=mode == "think")
        cells = image_cells(vlm, prompt)
        return cls(vlm, record, mode, reasoning, prompt, cells, _blank(prompt.vision["pixel_values"], cells), reply)

    @property
    def pixels(self) -> Tensor:
        return self.prompt.vision["pixel_values"]

    @property
    def num_cells(self) -> int:
        return sum(rows * columns for rows, columns in self.cells.grids)

    @property
    def at_once(self) -> int:
        """Versions of the prompt in one call."""
        return max(1, TOKENS_AT_ONCE // self.prompt.input_ids_BP.shape[1])

    def without(self, hidden_KC: Tensor) -> Tensor:
        """The pixels (K, …) with the cells in the mean colour that are true."""
        return torch.where(hidden_KC[:, self.cells.cell_of], self.blank, self.pixels)

    def logprobs(self, pixels_K: Tensor) -> Tensor:
        """Log-probabilities (K, O) of the options for K versions of the pixels (K, …), with gradient, in one call.

        With a `reply` they are (K, 1), the mean over its tokens.
        """
        versions = len(pixels_K)
        prompts = self.prompt.select([0] * versions)
        prompts = replace(
            prompts,
            vision={**prompts.vision, "pixel_values": pixels_K.flatten(0, 1)},
            image_keys=list(range(versions)),
        )
        if self.reply is not None:
            written = self.reply.removeprefix(self.prompt.opened[0])
            ids = self.vlm.tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids_KT = ids.to(self.vlm.device).expand(versions, -1)
            return completion_logprobs(self.vlm, prompts, ids_KT, torch.ones_like(ids_KT))[0].mean(1, keepdim=True)
        records = [self.record] * versions
        reasoning = None if self.reasoning is None else [self.reasoning] * versions
        return torch.stack(option_logprobs(self.vlm, prompts, records, mode=self.mode, reasoning=reasoning))

    def logprobs_without(self, hidden_KC: Tensor) -> Tensor:
        """Log-probabilities (K, O) of the options with the cells hidden that are true, without gradient, float64."""
        with evaluating(self.vlm.model):
            parts = [self.logprobs(self.without(part)) for part in hidden_KC.to(self.pixels.device).split(self.at_once)]
        return torch.cat(parts).double().cpu()

    def place(self, letter: str) -> int:
        """Column of an option in what `logprobs` returns; a reply is the only one."""
        return LETTERS.index(letter) if self.reply is None else 0

    def heatmaps(self, score_C: Tensor, letter: str, logp: float) -> list[Heatmap]:
        """Scores of all cells as one map an image."""
        parts = score_C.double().cpu().split([rows * columns for rows, columns in self.cells.grids])
        return [
            Heatmap(part.view(grid).numpy(), letter, logp) for part, grid in zip(parts, self.cells.grids, strict=True)
        ]


def occlusion(
    vlm: VLM,
    record: Record,
    *,
    mode: str,
    reasoning: str | None = None,
    letter: str | None = None,
    reply: str | None = None,
    window: int | None = None,
) -> list[Heatmap]:
    """Hide one window of cells at a time; its score is the fall of the answer's log-probability.

    Zeiler and Fergus, arXiv:1311.2901, with the mean colour for their grey, and windows that tile the image.

    Args:
        reasoning: text inside <think> that the answer follows; it is held fixed, and a rationale that names the
            answer leaves little to see in the image (`reply` explains both).
        letter: the option to explain; None takes the most probable one.
        reply: a whole reply, reasoning and answer, that chose `letter`: then the mean log-probability of its tokens is
            explained.
        window: side of a window in cells; None takes the least that needs no more than MAX_WINDOWS an image.

    Returns:
        One map an image, in their order.

    Raises:
        MedR1Error: see `Subject.read`.
    """
    subject = Subject.read(vlm, record, mode=mode, reasoning=reasoning, reply=reply)
    windows_WC = _windows(subject.cells.grids, window)
    logp_KO = subject.logprobs_without(torch.cat([torch.zeros_like(windows_WC[:1]), windows_WC]))
    letter = letter or LETTERS[int(logp_KO[0].argmax())]
    logp_K = logp_KO[:, subject.place(letter)]
    score_C = (logp_K[0] - logp_K[1:]) @ windows_WC.double()  # each cell lies in one window
    return subject.heatmaps(score_C, letter, float(logp_K[0]))


def gradient(
    vlm: VLM,
    record: Record,
    *,
    mode: str,
    reasoning: str | None = None,
    letter: str | None = None,
    reply: str | None = None,
) -> list[Heatmap]:
    """Integrated gradients of the answer's log-probability, summed over the pixels of each cell.

    All scores together are the log-probability with the image less that with its mean colour (completeness), up to
    the error of GRADIENT_STEPS points. Arguments, result and errors as `occlusion`; captum must be installed.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise MedR1Error("gradient heatmaps need captum; run: pip install 'medr1[explain]'") from error

    subject = Subject.read(vlm, record, mode=mode, reasoning=reasoning, reply=reply)
    logp_O = subject.logprobs_without(torch.zeros(1, subject.num_cells, dtype=torch.bool))[0]
    letter = letter or LETTERS[int(logp_O.argmax())]
    place = subject.place(letter)
    training = vlm.model.training
    vlm.model.eval()
    try:
        attributed = IntegratedGradients(lambda pixels_K: subject.logprobs(pixels_K)[:, place]).attribute(
            subject.pixels[None],
            baselines=subject.blank[None],
            n_steps=GRADIENT_STEPS,
            internal_batch_size=subject.at_once,
        )[0]
    finally:
        vlm.model.train(training)
    per_value = attributed.detach().double()
    cell_of = subject.cells.cell_of.expand_as(per_value).flatten()
    score_C = per_value.new_zeros(subject.num_cells).index_add(0, cell_of, per_value.flatten())
    return subject.heatmaps(score_C, letter, float(logp_O[place]))


METHODS = {"occlusion": occlusion, "gradient": gradient}


def overlay(image: Image.Image, heatmap: Heatmap) -> Image.Image:
    """The image, grey, under its map: orange speaks for the answer, blue against it.

    The scale is the same for all maps: without a cell of score s the answer has e^-s of its probability, and the cell
    is as deep as the share 1 - e^-|s| that goes. A map of cells that hardly matter is faint. Cells stay squares: a
    smooth map would show detail that was never measured.
    """
    share_RC = 1 - np.exp(-np.abs(heatmap.scores))
    cells_RC4 = np.zeros((*share_RC.shape, 4))
    cells_RC4[..., :3] = np.where(heatmap.scores[..., None] > 0, (255, 110, 0), (0, 110, 255))
    cells_RC4[..., 3] = 190 * share_RC
    tint = Image.fromarray(cells_RC4.round().astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(image.convert("L").convert("RGBA"), tint).convert("RGB")


def _windows(grids: Sequence[tuple[int, int]], side: int | None) -> Tensor:
    """Boolean (W, C): the windows that tile each image; those at the lower and right edge may be smaller."""
    parts = []
    for rows, columns in grids:
        step = side or int(np.ceil(np.sqrt(rows * columns / MAX_WINDOWS)))
        row_C, column_C = (index.flatten() // step for index in np.indices((rows, columns)))
        window_C = row_C * (column_C[-1] + 1) + column_C
        parts.append(torch.from_numpy(window_C[None] == np.arange(window_C[-1] + 1)[:, None]))
    return torch.block_diag(*parts).bool()


def _blank(pixels: Tensor, cells: ImageCells) -> Tensor:
    """Pixels in which each image has its mean colour everywhere."""
    sizes = torch.tensor([rows * columns for rows, columns in cells.grids], device=pixels.device)
    image_of = torch.arange(len(sizes), device=pixels.device).repeat_interleave(sizes)[cells.cell_of]
    bucket = (image_of * 3 + cells.channel_of).expand_as(pixels).flatten()
    values = pixels.flatten().double()
    total = values.new_zeros(3 * len(sizes)).index_add(0, bucket, values)
    return (total / bucket.bincount())[bucket].view_as(pixels).to(pixels.dtype)
