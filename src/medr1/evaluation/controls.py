"""Controls that stand beside every accuracy: what a model scores that does not look at the picture.

- `text_only_prior` sees neither image nor question: it learns from the training part how often each option
  text is right. On the public Med-R1 splits that alone answers 81 to 100 % of the test part.
- The conditions of `medr1.evaluation.run` beside "image": "blank" and "no_image" take the picture away, "shuffled" and
  "shuffled_other" show another one, "permuted" reorders the options, "repeat" asks the same once more.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, ImageStat

from medr1.data.images import file_of
from medr1.data.records import LETTERS, Record, normalise_option
from medr1.data.splits import links_of
from medr1.errors import MedR1Error
from medr1.evaluation.metrics import accuracy_table
from medr1.processes import tell

SHUFFLED = ("shuffled", "shuffled_other")
CONDITIONS = ("image", "blank", "shuffled", "shuffled_other", "no_image", "permuted", "repeat")
ALONE = "reasoning_alone"
"""One more condition, for a given reasoning (`medr1.evaluation.looking`): no image, and the options in another order,
so that a reasoning which merely names a letter leads elsewhere."""


def text_only_prior(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Any]:
    """Accuracy of choosing the option whose text was right most often when it was offered in training.

    Tied options share the item, which then counts its expected accuracy, a fraction. Open questions have no options:
    they are neither learned from nor scored.

    Returns:
        `accuracy_table` of the test records that have options.
    """
    listed = [record for record in test if not record.is_open]
    rows = [
        {
            "correct": sum(letter in record.right_letters for letter in best) / len(best),
            "chance": record.chance,
            "group": record.group,
            "modality": record.modality,
            "question_type": record.question_type,
        }
        for record, best in zip(listed, most_often_right(train, listed), strict=True)
    ]
    return accuracy_table(rows)


def most_often_right(train: Sequence[Record], test: Sequence[Record]) -> list[set[str]]:
    """Of each test record the letters of the options whose text was right most often when it was offered in training.

    An option scores (times right) / (times offered) over the training records that offer it, and 0 where none
    does. Case, white space and a final full stop are ignored: in some public sets they alone betray the right option,
    which would score higher still (Dermoscopy 97.8 % instead of 95.3 %) but says nothing about medicine.
    """
    right: Counter[str] = Counter()
    offered: Counter[str] = Counter()
    for record in train:
        if not record.is_open:
            right[_text(record.gold)] += 1
            offered.update({_text(option) for option in record.options})
    best = []
    for record in test:
        scores = [right[_text(option)] / max(1, offered[_text(option)]) for option in record.options]
        best.append({letter for letter, score in zip(record.letters, scores, strict=True) if score == max(scores)})
    return best


def _text(option: str) -> str:
    return normalise_option(option).rstrip(".")


def blank_image(image: Image.Image) -> Image.Image:
    """An image of the same size, all in the mean colour of the given RGB image."""
    red, green, blue = (round(mean) for mean in ImageStat.Stat(image).mean)
    return Image.new("RGB", image.size, (red, green, blue))


def as_shown(
    records: Sequence[Record], condition: str, seed: int, donors: Sequence[Record] | None = None
) -> list[Record]:
    """The records as a condition asks them, in the same order, with their own ids and groups.

    - "image", "repeat", "blank": unchanged ("blank" is painted over where the image is read, see `blank_image`).
    - "no_image": without images, so that the prompt is text only.
    - "shuffled", "shuffled_other": with the images of a partner of the same or of another modality, see
      `shuffled_partners`.
    - "permuted": with the options in another order and the answer's letter in that order, see `permuted`.
    - ALONE: permuted, and without images.

    Args:
        donors: where partners are drawn from; None draws them from `records`.

    Raises:
        MedR1Error: the condition is unknown, a record has no image to take away, or has no partner.
    """
    if condition not in (*CONDITIONS, ALONE):
        raise MedR1Error(f"condition {condition!r} is unknown; choose {', '.join(CONDITIONS)}")
    if condition in ("blank", "no_image") and (textual := [record.id for record in records if not record.images]):
        raise MedR1Error(f"record {textual[0]}: no image to blank or take away; leave the {condition} control out")
    if condition == "no_image":
        return [record.model_copy(update={"images": ()}) for record in records]
    if condition in ("permuted", ALONE):
        shown = [permuted(record, seed) for record in records]
        return shown if condition == "permuted" else [record.model_copy(update={"images": ()}) for record in shown]
    if condition in SHUFFLED:
        partners = shuffled_partners(records, seed, donors, other_modality=condition == "shuffled_other")
        return [record.model_copy(update={"images": partners[record.id].images}) for record in records]
    return [*records]


def can_be_asked(records: Sequence[Record], condition: str, donors: Sequence[Record] | None) -> bool:
    """Whether there is another image to show and the like; where not, a line on stderr says what is left out."""
    try:
        as_shown(records, condition, 0, donors)
    except MedR1Error as error:
        line = f"the {condition} control is left out: {error}"
        tell(line, "yellow")
        return False
    return True


def permuted(record: Record, seed: int) -> Record:
    """The record with its options in an order in which none keeps its letter; two options change places.

    An open question, which has none, stays as it is. Each such order is equally likely, by `seed` and the record's id.
    """
    if record.is_open:
        return record
    draw = random.Random(f"{seed} {record.id}")
    order = list(range(len(record.options)))
    while any(old == new for new, old in enumerate(order)):
        draw.shuffle(order)
    answer = LETTERS[order.index(LETTERS.index(record.answer))]
    return record.model_copy(update={"options": tuple(record.options[old] for old in order), "answer": answer})


def shuffled_partners(
    records: Sequence[Record], seed: int, donors: Sequence[Record] | None = None, *, other_modality: bool = False
) -> dict[str, Record]:
    """For each record id, a record that shares no group and no content with it, whose images are shown instead.

    The partner has as many images and the same modality, or with `other_modality` another one (both stated). It is
    drawn with equal chance from those among `donors` (None: among `records`) by `seed` and the record's id, whatever
    the order of either. What the modality alone gives away stays answerable with a partner of the same modality.

    Raises:
        MedR1Error: a record has no such partner.
    """
    ordered = sorted(records if donors is None else donors, key=lambda donor: donor.id)
    links = dict(zip([donor.id for donor in ordered], links_of(ordered), strict=True))
    pools: dict[tuple[str | None, int], list[Record]] = {}
    partners = {}
    for record, own in zip(records, links_of(records), strict=True):
        kind = modality, num_images = record.modality, len(record.images)
        if kind not in pools:
            pools[kind] = [
                donor
                for donor in ordered
                if len(donor.images) == num_images > 0
                and (donor.modality != modality) == other_modality
                and not (other_modality and None in (modality, donor.modality))
            ]
        draw = random.Random(f"{seed} {record.id}")
        partner = next((donor for donor in _drawn(pools[kind], draw) if links[donor.id].isdisjoint(own)), None)
        if partner is None:
            raise MedR1Error(
                f"record {record.id}: no other group of {'a modality other than ' if other_modality else ''}"
                f"{modality or 'unstated modality'} has {num_images} images to show instead; "
                "evaluate more records or leave this control out"
            )
        partners[record.id] = partner
    return partners


def _drawn(pool: Sequence[Record], draw: random.Random) -> Iterator[Record]:
    """Records of the pool at random, at last each of them: one that fits is found soon, or none does."""
    for _ in range(20 if pool else 0):
        yield draw.choice(pool)
    yield from draw.sample(pool, len(pool))


def image_disjoint(train: Sequence[Record], test: Sequence[Record]) -> list[Record]:
    """The test records none of whose image files (by path) is in training: what is left of a split by question."""
    seen = {file_of(image) for record in train for image in record.images}
    return [record for record in test if seen.isdisjoint(map(file_of, record.images))]


def group_disjoint(train: Sequence[Record], test: Sequence[Record]) -> list[Record]:
    """The test records none of whose groups (patients, lesions or studies of all their images) has one in training."""
    seen = {group for record in train for group in (record.group, *record.groups)}
    return [record for record in test if seen.isdisjoint((record.group, *record.groups))]
