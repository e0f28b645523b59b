"""Objectives that keep a policy looking at the image: other images to ask about, and what a reply owes to its own.

An accuracy reward pays for a right answer, seen or guessed. Where the text alone tells most right answers, a policy
that looks and one that guesses are paid alike, and guessing is learned sooner. Each objective here is off by default:

- `OtherImages.exchanged`: prompts about another image whose right answer is known, so that guessing does not pay.
- `needs_image`: prompts that a reader of the text alone gets wrong, more often.
- `objective.above_chance`: an answer that is likelier than the other options whatever image is shown costs.
- `objective.perception_term`: replies become less probable under another image (PAPO).
- `image_margins`, `consistency`: rewards of an answer that owes to its image, and of one that its reasoning leads to.

Shapes: B prompts, G completions each, N = B*G rows, T tokens, O options (the most of any question), K = N*O.
"""

import hashlib
import itertools
import math
import random
import re
from array import array
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medr1.data.answers import is_correct, read_answer
from medr1.data.kept import code
from medr1.data.prompts import build_messages
from medr1.data.records import LETTERS, Record, normalise_option
from medr1.evaluation.confidence import option_logprobs
from medr1.evaluation.controls import permuted
from medr1.evaluation.looking import kept_reasoning
from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.repeated import padded
from medr1.policy.vlm import VLM

OF_POLICY = ("image_margin", "consistency")
"""Rewards that the trainer works out itself, as they take the policy or its reference."""
FOLDS = 5
"""Parts of the training records, of which `needs_image` reads all but a question's own."""
TRIES = 50
"""Records that are looked at for another image."""
MOST_NEED = 20.0
"""Times that a question is drawn for one whose text says nothing, at most."""

Pool = dict[str, npt.NDArray[np.int32]]
"""Places of records by the text of their right option."""


def of_policy(reply: str, record: Record, mode: str) -> None:
    """Stands for OF_POLICY where rewards are looked up by name; never called."""


@dataclass(frozen=True)
class Choices:
    """What each reply could have said where it first says its answer: its beginning, then each option in turn."""

    ids_KT: Tensor
    """Right-padded; the O rows of the first reply first."""
    mask_KT: Tensor
    """True at an option's tokens; nowhere in a row that has no option."""
    chosen_N: Tensor
    """Place of the option that the reply says; -1 where it says none that can be read, and at an open question."""

    def to(self, device: torch.device) -> "Choices":
        """The same on a device."""
        return Choices(self.ids_KT.to(device), self.mask_KT.to(device), self.chosen_N.to(device))


@dataclass(frozen=True)
class OtherView:
    """The prompts of a step with other images, and what is asked under them."""

    prompts: PromptBatch
    """A prompt that has no other image is there with its own."""
    mask_NT: Tensor
    """True at tokens of completions that have another image."""
    choices: Choices | None
    """Of those completions, where `grpo.hold_to_chance` weighs them."""


class OtherImages:
    """Training images to which another of a question's options is right, as their own records tell.

    Those are the images of records that were asked the same question with the same options (in any order), both up to
    case, white space and a final full stop, of the same modality where there are such. Less will not do: "yes" and
    "mild" are right or wrong by what is asked.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.by_type: dict[object, array[int]] = {}
        codes, places = array("Q"), array("i")
        for place, record in enumerate(records):
            for kind in _kinds(record):
                self.by_type.setdefault(kind, array("i")).append(place)
            for key in _keys(record):
                codes.append(code(*key, _text(record.gold)))
                places.append(place)
        order = np.argsort(np.asarray(codes), kind="stable")
        self.codes, self.places = np.asarray(codes)[order], np.asarray(places)[order]

    def pool(self, record: Record) -> Pool:
        """The record itself and all others of its pool; empty where there is no other right answer."""
        for key in _keys(record):
            pool = {text: self._places(*key, text) for text in map(_text, record.options)}
            pool = {text: places for text, places in pool.items() if len(places)}
            if len(pool) > 1:
                return pool
        return {}

    def _places(self, *parts: str) -> npt.NDArray[np.int32]:
        wanted = np.uint64(code(*parts))
        return self.places[self.codes.searchsorted(wanted) : self.codes.searchsorted(wanted, "right")]

    def exchanged(self, record: Record, share: float, seed: str) -> Record:
        """In a `share` of the draws the question about another image, its right answer drawn with equal chance."""
        draw = random.Random(f"{seed} {record.id}")
        if draw.random() >= share or not (pool := self.pool(record)):
            return record
        right = draw.choice(sorted(pool))
        answer = LETTERS[[_text(option) for option in record.options].index(right)]
        return record.model_copy(update={"images": self.records[draw.choice(pool[right])].images, "answer": answer})

    def control(self, record: Record, seed: str) -> Record | None:
        """The record with an image to which its right answer is wrong, as far as other records tell; None without any.

        An image of its pool; or of another group, to which another answer is right of the same type of question, since
        what a modality gives away stays right. Of the same modality where there is such.
        """
        draw, own = random.Random(f"{seed} control {record.id}"), _text(record.gold)
        if pool := self.pool(record):
            donor = self.records[draw.choice(pool[draw.choice([right for right in sorted(pool) if right != own])])]
            return record.model_copy(update={"images": donor.images})
        for kind in _kinds(record):
            for place in draw.choices(self.by_type.get(kind, [None]), k=TRIES):
                donor = record if place is None else self.records[place]
                if donor.group != record.group and _text(donor.gold) != own:
                    return record.model_copy(update={"images": donor.images})
        return None


def _kinds(record: Record) -> list[tuple[str | None, str | None]]:
    return [(modality, record.question_type) for modality in (record.modality, "any")] if record.images else []


def _keys(record: Record) -> list[tuple[str, ...]]:
    texts = sorted({*map(_text, record.options)})
    if not record.images or record.is_open or len(texts) < len(record.options):
        return []
    return [(modality or "", _text(record.question), *texts) for modality in (record.modality, "any")]


def _text(option: str) -> str:
    return normalise_option(option).rstrip(".")


@dataclass(frozen=True)
class _Mention:
    """Where a reply first says its answer."""

    text: str
    pieces: list[str]
    """The text, token by token."""
    letter: str | None
    """Of the option that is said."""
    span: tuple[int, int]
    """Of characters; empty where no answer can be read."""
    letters: int
    """How many of these are the option's text, at their end: behind a letter, all, or none."""

    def decides(self) -> list[int]:
        """Places of the tokens in the span."""
        start, end, found = *self.span, []
        for place, (piece, stop) in enumerate(
            zip(self.pieces, itertools.accumulate(map(len, self.pieces)), strict=True)
        ):
            if stop - len(piece) < end and stop > start:
                found.append(place)
        return found


def _mentions(vlm: VLM, replies: Sequence[Sequence[int]], records: Sequence[Record]) -> list[_Mention]:
    """The first mention of the chosen option's text (of an open question, of the answer), in the reasoning or in the
    answer tag, with its letter where that stands before it; where the text is nowhere, all that stands in the tag.
    """
    pieces: dict[int, str] = {}
    anchor = vlm.tokenizer("a", add_special_tokens=False)["input_ids"]  # or some tokenizers drop the space before
    start = len(vlm.tokenizer.decode(anchor))
    for token in {token for reply in replies for token in reply}:
        pieces[token] = vlm.tokenizer.decode([*anchor, token], skip_special_tokens=True)[start:]
    found = []
    for reply, record in zip(replies, records, strict=True):
        text = "".join(pieces[token] for token in reply)
        answer = read_answer(text, record)
        said = record.options[LETTERS.index(answer.letter)] if answer.letter else answer.text
        span, letters = (0, 0), 0
        if said:
            words = r"\s+".join(map(re.escape, said.split()))
            labelled = rf"(?:\(?{answer.letter}[).:]+\s*)?" if answer.letter else ""
            if mention := re.search(rf"(?<!\w)({labelled}){words}(?!\w)", text, re.IGNORECASE):
                span, letters = mention.span(), len(mention[0]) - len(mention[1])
            elif tag := re.search(r"(?<=<answer>).*?(?=</answer>|$)", text, re.DOTALL):
                span = tag.span()
        found.append(_Mention(text, [pieces[token] for token in reply], answer.letter, span, letters))
    return found


def deciding_tokens(vlm: VLM, replies: Sequence[Sequence[int]], records: Sequence[Record]) -> Tensor:
    """The tokens (N, T) in which a reply first says its answer, True: where what it saw must have gone in.

    That is where `_mentions` finds it; none of a reply without a readable answer.

    Args:
        replies: token ids, without padding.
        records: that of each reply.
    """
    mask_NT = torch.zeros(len(replies), max(map(len, replies)), dtype=torch.bool)
    for row, mention in enumerate(_mentions(vlm, replies, records)):
        mask_NT[row, mention.decides()] = True
    return mask_NT


def choices(vlm: VLM, replies: Sequence[Sequence[int]], records: Sequence[Record]) -> Choices:
    """What each reply could have said in the place of its answer, see `_mentions`.

    An option is said as the reply says its own: by its letter, its text (in small letters where that is), or both.
    """
    told: list[tuple[Sequence[int], list[list[int]], int]] = []
    for mention, reply, record in zip(_mentions(vlm, replies, records), replies, records, strict=True):
        decides = mention.decides()
        if not decides or not mention.letter:
            told.append(((), [], -1))
            continue
        own, before = LETTERS.index(mention.letter), "".join(mention.pieces[: decides[0]])
        shown = mention.text[len(before) : mention.span[1]]
        label, text = shown[: len(shown) - mention.letters], shown[len(shown) - mention.letters :]
        options = []
        for place, option in enumerate(record.options):
            said = re.sub(rf"\b{mention.letter}\b", LETTERS[place], label, count=1, flags=re.IGNORECASE)
            if text:
                said += " ".join(option.lower().split() if text.islower() else option.split())
            options.append([reply[each] for each in decides] if place == own else _behind(vlm, before, said))
        told.append((reply[: decides[0]], options, own))
    return _stacked(vlm, told)


def longest_choices(vlm: VLM, replies: Sequence[Sequence[int]], records: Sequence[Record]) -> Choices:
    """As many tokens as there can be: each option behind a whole reply."""
    options = [[_behind(vlm, "", option) for option in record.options] for record in records]
    return _stacked(vlm, [(reply, said, 0 if said else -1) for reply, said in zip(replies, options, strict=True)])


def _stacked(vlm: VLM, told: Sequence[tuple[Sequence[int], list[list[int]], int]]) -> Choices:
    num_options = max(1, *(len(options) for _, options, _ in told))
    rows: list[list[int]] = []
    starts: list[int] = []
    for beginning, options, _ in told:
        rows += [[*beginning, *option] for option in options] + [[]] * (num_options - len(options))
        starts += [len(beginning)] * num_options
    ids_KT = padded([row or [vlm.pad_token_id] for row in rows], vlm.pad_token_id, torch.device("cpu"))
    lengths_K1, steps_T = torch.tensor([[len(row)] for row in rows]), torch.arange(ids_KT.shape[1])
    mask_KT = (steps_T < lengths_K1) & (steps_T >= torch.tensor(starts)[:, None])
    return Choices(ids_KT, mask_KT, torch.tensor([chosen for *_, chosen in told]))


def _behind(vlm: VLM, before: str, text: str) -> list[int]:
    """Tokens of a text that stands behind another."""
    whole, first = (vlm.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (before + text, before))
    if whole[: len(first)] != first:  # a token would hold the end of the one and the beginning of the other
        return list(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(whole[len(first) :])


def image_margins(
    texts: Sequence[str], records: Sequence[Record], logp_NT: Tensor, other_logp_NT: Tensor, decides_NT: Tensor
) -> list[float]:
    """Of a right reply, how much more probable its deciding tokens are under its own image than under another, in
    [0, 1): tanh(d / 2) of the difference d in nats, 0 where the other image makes them likelier. 0 of other replies.
    """
    difference_N = ((logp_NT - other_logp_NT) * decides_NT).sum(1)
    margins = (difference_N.clamp(min=0) / 2).tanh().tolist()
    right = [is_correct(read_answer(text, record), record) for text, record in zip(texts, records, strict=True)]
    return [margin * of_right for margin, of_right in zip(margins, right, strict=True)]


@torch.no_grad()
def consistency(reader: VLM, texts: Sequence[str], records: Sequence[Record], seed: int) -> list[float | None]:
    """How much a reply's reasoning leads a reader to its answer, in [0, 1]: (p - q) / (1 - q), at least 0.

    p is the probability of the chosen option to a reader that sees question, options and reasoning, and no image; q
    the same without the reasoning. The reader has the options in another order (`permuted`), so that a reasoning which
    names a letter leads elsewhere, and one without a word leads nowhere. None of an open question.
    """
    asked = [permuted(record, seed).model_copy(update={"images": ()}) for record in records]
    chosen = [read_answer(text, record).letter for text, record in zip(texts, records, strict=True)]
    questions = {record.id: record for record in asked if not record.is_open}
    wanted = {
        (record.id, reasoning)
        for record, text in zip(asked, texts, strict=True)
        if not record.is_open
        for reasoning in ("", kept_reasoning(text))
    }
    read: dict[tuple[str, str], Tensor] = {}
    if wanted:
        order = sorted(wanted)
        each = [questions[name] for name, _ in order]
        prompts = encode_prompts(reader, [build_messages(record, "think") for record in each], [[]] * len(each))
        said = option_logprobs(reader, prompts, each, mode="think", reasoning=[reasoning for _, reasoning in order])
        read = dict(zip(order, said, strict=True))
    values: list[float | None] = []
    for record, shown, text, letter in zip(records, asked, texts, chosen, strict=True):
        if record.is_open:
            values.append(None)
        elif letter is None:
            values.append(0.0)
        else:
            place = shown.options.index(record.options[LETTERS.index(letter)])
            p, q = (math.exp(read[record.id, told][place]) for told in (kept_reasoning(text), ""))
            values.append(max(0.0, (p - q) / max(1 - q, 1e-6)))
    return values


def needs_image(records: Sequence[Record]) -> list[float]:
    """How much each question needs its image: chance / p, at most MOST_NEED, for `draws.weights`.

    p is the probability of the right option to a reader of the text alone, who takes an option by how often its text
    and its place among the options were right when offered, in the other FOLDS of groups, each with one observation at
    chance beside. Where a shortcut tells 95 % of the right options of four, it tells 25 % of what is drawn. 1 of a
    question without options.
    """

    def fold_of(record: Record) -> int:
        return int(hashlib.sha256(record.group.encode()).hexdigest(), 16) % FOLDS

    right: dict[object, list[float]] = defaultdict(lambda: [0.0] * (FOLDS + 1))
    offered: dict[object, list[float]] = defaultdict(lambda: [0.0] * (FOLDS + 1))
    for record in records:
        fold = fold_of(record)
        for letter, cues in zip(record.letters, _cues(record), strict=True):
            for cue in cues:
                for place in (fold, FOLDS):  # the last is of all folds
                    offered[cue][place] += 1
                    right[cue][place] += letter in record.right_letters

    def need(record: Record, fold: int) -> float:
        chance = 1 / len(record.options)
        scores = [
            math.prod(
                (right[cue][FOLDS] - right[cue][fold] + chance) / (offered[cue][FOLDS] - offered[cue][fold] + 1)
                for cue in cues
            )
            for cues in _cues(record)
        ]
        p = sum(scores[LETTERS.index(letter)] for letter in record.right_letters) / sum(scores)
        return min(MOST_NEED, len(record.right_letters) * chance / p)

    return [1.0 if record.is_open else need(record, fold_of(record)) for record in records]


def _cues(record: Record) -> list[tuple[Hashable, Hashable]]:
    """What a reader of the text goes by, of each option: its text, as written, and its place."""
    return [
        ((record.question_type, " ".join(option.split())), (place, len(record.options)))
        for place, option in enumerate(record.options)
    ]
