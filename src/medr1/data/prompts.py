"""From a record to the chat messages that a model sees: images, stem, lettered options where there are any, and
one line of instruction.

The wording is our own. Training, evaluation and `ask` all use this function, so a model is always asked as it
was taught. Image paths and ids never enter a prompt: in the public data they often hold the answer.
"""

import re
from typing import Any

from medr1.data.records import Record
from medr1.errors import MedR1Error

INSTRUCTION = {
    "think": "Reason inside <think></think>, then write one option inside <answer></answer>.",
    "no-think": "Write one option inside <answer></answer>.",
    "think-after": "Write one option inside <answer></answer>, then explain inside <think></think>.",
}
"""Of a question with options, by prompt mode."""
OPEN_INSTRUCTION = {mode: text.replace("one option", "a short answer") for mode, text in INSTRUCTION.items()}
"""Of an open question. One that is answered by yes or no is asked like any other: which kind it is follows from the
right answer, and the right answer has no part in a prompt."""
MODES = tuple(INSTRUCTION)


def build_messages(record: Record, mode: str) -> list[dict[str, Any]]:
    """One user turn: an image slot for each image, then the text.

    Raises:
        MedR1Error: the mode is not one of MODES, or the record's text holds a chat control token, which a
            tokenizer would take for a real one (a false image slot, a false end of turn).
    """
    check_mode(mode)
    options = [
        f"{letter}) {' '.join(option.split())}"  # one line an option, whatever the data holds
        for letter, option in zip(record.letters, record.options, strict=True)
    ]
    instruction = (OPEN_INSTRUCTION if record.is_open else INSTRUCTION)[mode]
    text = "\n".join([record.question, *options, "", instruction])
    if control := re.search(r"<\|\w+\|>", text):
        raise MedR1Error(f"record {record.id}: its text holds the control token {control[0]}; remove it from the data")
    content: list[dict[str, Any]] = [{"type": "image"} for _ in record.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def check_mode(mode: str) -> None:
    """Raise MedR1Error unless the mode is one of MODES."""
    if mode not in MODES:
        raise MedR1Error(f"unknown prompt mode {mode!r}; choose one of {', '.join(MODES)}")
