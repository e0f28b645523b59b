"""What a file or a reply of any bytes may do to the readers and the extractor: give a result, or one clear line.

Each target takes bytes and returns, or raises on what is a fault: another exception than MedR1Error, a message of
several lines, a result that breaks the promise of the function. `run.py` searches with coverage, `test_fuzz.py` with
hypothesis.
"""

import os
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

from medr1.data.answers import EXTRACTOR_VERSION, extract_answer
from medr1.data.datasets import load_records
from medr1.data.images import expand_reference, read_image
from medr1.data.records import LETTERS
from medr1.errors import MedR1Error

FOLDER = Path(tempfile.mkdtemp(prefix="medr1-fuzz-"))

# The first byte of an input picks a file name, or a selector.
IMAGE_NAMES = ("x", "x.dcm", "x.nii", "x.nii.gz", "x.png", "x.tif", "x.jpg", "x.mrxs")
SELECTORS = ("", "#frame=1", "#window=lung", "#slice=1&axis=coronal", "#window=40,400", "#redact=top:1", "#frames=2",
             "#slices=2", "#level=0&x=0&y=0&size=8")  # fmt: skip
os.environ["MEDR1_CACHE"] = str(FOLDER / "cache")  # where readers put images that stand inside rows
DATA_NAMES = (
    "data.json",
    "data.jsonl",
    "data.csv",
    "data.tsv",
    "data.parquet",
    "CT_train.json",
    "QA_information/Open-access/A.json",
)


def image(data: bytes) -> None:
    """A file of any content under any name, whole or by a selector."""
    choice, content = data[:1] or b"\0", data[1:]
    path = FOLDER / IMAGE_NAMES[choice[0] % len(IMAGE_NAMES)]
    path.write_bytes(content)
    selector = SELECTORS[choice[0] // len(IMAGE_NAMES) % len(SELECTORS)]
    try:
        for reference in expand_reference(f"{path}{selector}"):
            reading = read_image(reference)
            assert reading.image.mode == "RGB" and min(reading.image.size) > 0
    except MedR1Error as error:
        _one_line(error, path)
    finally:
        path.unlink()


def dataset(data: bytes) -> None:
    """A file of questions of any content under any name; images need not exist."""
    choice, content = data[:1] or b"\0", data[1:]
    name = DATA_NAMES[choice[0] % len(DATA_NAMES)]
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    refused: list[str] = []
    try:
        for left_out in (None, refused):
            try:
                records = load_records(FOLDER if "/" in name else path, check_images=False, refused=left_out)
                assert records and len({record.id for record in records}) == len(records)
            except MedR1Error as error:
                _one_line(error, FOLDER)
        assert not any("\n" in line for line in refused)
    finally:
        path.unlink()
        if path.parent != FOLDER:
            path.parent.rmdir()
            path.parent.parent.rmdir()


def reply(data: bytes) -> None:
    """A reply to a question with any options; separated by a line feed and a NUL."""
    text, *options = data.decode("utf-8", errors="replace").split("\n\0")
    check_reply(text, options[: len(LETTERS)])


def check_reply(text: str, options: list[str]) -> None:
    """`extract_answer` gives one of its outcomes, a letter that exists or none, and is not led astray by reasoning."""
    answer = extract_answer(text, options)
    assert answer == extract_answer(text, options)
    letters = LETTERS[: len(options)]
    assert (answer.letter is not None) == (answer.outcome == "letter")
    assert answer.letter is None or answer.letter in letters
    assert EXTRACTOR_VERSION >= 1
    if options:
        assert answer.text is None and answer.outcome != "text"
    if len(options) > 1 and "<" not in unicodedata.normalize("NFKC", text):
        for letter in letters:
            said = extract_answer(f"<think>{text}</think><answer>{letter}</answer>", options)
            plain = extract_answer(f"<answer>{letter}</answer>", options)
            assert said == plain, "reasoning is dropped, whatever it holds"


def _one_line(error: MedR1Error, path: Path) -> None:
    message = str(error)
    assert "\n" not in message and "\r" not in message, message
    assert str(path) in message, "the message names the file"
    assert len(message) < 1000, "a line that a person reads"


TARGETS: dict[str, Callable[[bytes], None]] = {"image": image, "dataset": dataset, "reply": reply}
