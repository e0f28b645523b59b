"""The prompt's exact text, and what must never be in it."""

from pathlib import Path

import pytest

from medr1.data.datasets import load_records
from medr1.data.prompts import INSTRUCTION, MODES, build_messages
from medr1.data.records import Record
from medr1.errors import MedR1Error

RECORD = Record(
    id="secret_id",
    images=(Path("Images/src/melanoma/1.jpg"), Path("Images/src/melanoma/2.jpg")),
    question="What is shown?",
    options=("Naevus", "Wart\nB) trick  text"),
    answer="A",
    modality="Dermoscopy",
    question_type="Disease Diagnosis",
    source="src",
    group="lesion_1",
)


def test_text() -> None:
    (message,) = build_messages(RECORD, "no-think")
    assert message == {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "image"},
            {
                "type": "text",
                "text": "What is shown?\nA) Naevus\nB) Wart B) trick text\n\n"
                "Write one option inside <answer></answer>.",
            },
        ],
    }


def test_modes() -> None:
    assert MODES == ("think", "no-think", "think-after")
    texts = [build_messages(RECORD, mode)[0]["content"][-1]["text"] for mode in MODES]
    assert len(set(texts)) == 3
    assert all(text.endswith(INSTRUCTION[mode]) for text, mode in zip(texts, MODES, strict=True))
    with pytest.raises(MedR1Error, match="unknown prompt mode 'deep'; choose one of think, no-think, think-after"):
        build_messages(RECORD, "deep")


def test_nothing_but_question_and_options(shared: Path) -> None:
    """In most public diagnosis rows the path names the answer: no path, id, source or group may be told."""
    text = str(build_messages(RECORD, "think"))
    for secret in ("secret_id", "Images", "melanoma", ".jpg", "src", "lesion_1", "Dermoscopy"):
        assert secret not in text
    for record in load_records(shared / "data" / "real")[::50]:
        text = build_messages(record, "think")[0]["content"][-1]["text"]
        options = [f"{letter}) {option}" for letter, option in zip(record.letters, record.options, strict=True)]
        assert text == "\n".join([record.question, *options, "", INSTRUCTION["think"]])


def test_control_tokens_are_refused() -> None:
    bad = RECORD.model_copy(update={"question": "What <|image_pad|> is it?"})
    with pytest.raises(MedR1Error, match=r"record secret_id: its text holds the control token <\|image_pad\|>"):
        build_messages(bad, "think")
