"""Controls that stand beside every accuracy: what a model scores that does not look at the picture.

- `text_only_prior` sees neither image nor question: it learns from the training part how often each option
  text is right. On the public Med-R1 splits that alone answers 81 to 100 % of the test part.
- The conditions "blank" and "shuffled" of `medr1.evaluation` show the model a picture that holds no evidence.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageStat

from medr1.errors import MedR1Error
from medr1.metrics import accuracy_table
from medr1.records import Record, normalise_option

CONDITIONS = ("image", "blank", "shuffled")


def text_only_prior(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Any]:
    """Accuracy of choosing the option whose text was right most often when it was offered in training.

    An option scores (times right) / (times offered) over the training records that offer it, and 0 where none
    does; tied options share the item, which then counts its expected accuracy, a fraction. Case, white
    space and a final full stop are ignored: in some public sets they alone betray the right option, which
    would score higher still (Dermoscopy 97.8 % instead of 95.3 %) but says nothing about medicine.

    Returns:
        `accuracy_table` of the test records.
    """
    right: Counter[str] = Counter()
    offered: Counter[str] = Counter()
    for record in train:
        right[_text(record.gold)] += 1
        offered.update({_text(option) for option in record.options})
    rows = []
    for record in test:
        scores = [right[_text(option)] / max(1, offered[_text(option)]) for option in record.options]
        best = [letter for letter, score in zip(record.letters, scores, strict=True) if score == max(scores)]
        rows.append(
            {
                "correct": sum(letter in record.right_letters for letter in best) / len(best),
                "chance": record.chance,
                "group": record.group,
                "modality": record.modality,
                "question_type": record.question_type,
            }
        )
    return accuracy_table(rows)


def _text(option: str) -> str:
    return normalise_option(option).rstrip(".")


def blank_image(image: Image.Image) -> Image.Image:
    """An image of the same size, all in the mean colour of the given RGB image."""
    red, green, blue = (round(mean) for mean in ImageStat.Stat(image).mean)
    return Image.new("RGB", image.size, (red, green, blue))


def shuffled_partners(records: Sequence[Record], seed: int) -> dict[str, Record]:
    """For each record id, a record of another group whose images are shown in its place.

    The partner has the same modality and as many images, and is drawn with equal chance from those by
    `seed` and the record's id, whatever the order of the records. What the modality alone gives away stays
    answerable.

    Raises:
        MedR1Error: a record has no such partner.
    """
    pools: dict[tuple[str | None, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.id):
        pools.setdefault((record.modality, len(record.images)), []).append(record)
    partners = {}
    for (modality, num_images), pool in pools.items():
        if len({record.group for record in pool}) == 1 or num_images == 0:
            raise MedR1Error(
                f"record {pool[0].id}: no other group of {modality or 'unstated modality'} has {num_images} "
                "images to show instead; evaluate more records or leave the shuffled control out"
            )
        for record in pool:
            draw = random.Random(f"{seed} {record.id}")
            partner = draw.choice(pool)
            while partner.group == record.group:
                partner = draw.choice(pool)
            partners[record.id] = partner
    return partners
