"""A page of questions drawn from a data set, to look at before anything is trained on it.

medr1 data show OmniMedVQA --out page.html
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medr1.data.datasets import num_refused
from medr1.data.records import Record, write_atomic
from medr1.report.pages import environment, html_file, thumbnail


def write_samples(
    records: Sequence[Record], out: Path, *, name: str, num: int = 24, seed: int = 0, refused: Sequence[str] = ()
) -> dict[str, Any]:
    """Write one self-contained HTML page with `num` questions drawn at random, or all where there are fewer.

    Args:
        name: the data set as the page calls it.
        refused: a line for each row that was left out, see `load_records`; counted in the page.

    Returns:
        page (path), records, shown, lost_images (of those shown, how many images could not be read).

    Raises:
        MedR1Error: the file cannot be written.
    """
    html_file(out)
    drawn = random.Random(seed).sample(list(records), min(num, len(records)))
    samples = [(record, [thumbnail(image) for image in record.images]) for record in drawn]
    page = (
        environment()
        .get_template("show.html.j2")
        .render(
            name=name,
            seed=seed,
            samples=samples,
            refused=refused,
            left_out=num_refused(refused, len(records)),
            num_records=len(records),
            num_images=len({image for record in records for image in record.images}),
            num_groups=len({record.group for record in records}),
            num_open=sum(record.is_open for record in records),
        )
    )
    write_atomic(out, page)
    lost = sum(images.count(None) for _, images in samples)
    return {"page": str(out), "records": len(records), "shown": len(samples), "lost_images": lost}
