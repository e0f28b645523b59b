"""A second reading of what the extractor could not settle, through a real HTTP server on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_remote import Server, environment, text_of  # noqa: F401  (environment: a fixture of its module)

from medr1.cli import main
from medr1.data.records import Record, read_jsonl, write_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.metrics import summarise
from medr1.evaluation.reader import read_again, reader_letter, reader_messages, with_reader
from medr1.evaluation.run import Row
from medr1.evaluation.scoring import score

REPLIES = ["<answer>A</answer>", "Either A or B", "hm, dark", "A", "I cannot tell", "B, or A?"]


class Reader(Server):
    """Says B of every reply, but "none" of one with "dark" in it."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        (turn,) = body["messages"]
        assert isinstance(turn["content"], str)  # no image
        letter = "none" if "dark" in turn["content"] else "B"
        message = {"role": "assistant", "content": f"<think>A?</think><answer>{letter}</answer>"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


@pytest.fixture
def reader() -> Iterator[Reader]:
    server = Reader()
    yield server
    server.stop()


def rows() -> list[Row]:
    made = []
    for number, reply in enumerate(REPLIES):
        record = Record(
            id=str(number), images=(), question="Which?", options=("CT", "MRI"), answer="B", modality="CT",
            question_type=None, source="s", group=str(number),
        )  # fmt: skip
        fields = {"key": f"k{number}", "reply": reply, "gold": "B", "mode": "no-think", "model": "m", "finish": "stop"}
        about = record.model_dump(include={"id", "modality", "question_type", "source", "group", "question", "options"})
        made.append({**fields, **about, "condition": "image", "chance": 0.5, "tokens": 3, "images": []})
    return score(made)


def test_unsettled_rows_are_read_once_and_told_apart(reader: Reader, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    before = rows()
    write_jsonl(out, before)
    after = read_again(reader.name, before, out)
    assert [row.get("reader", {}).get("letter", "-") for row in after] == ["-", "B", None, "-", "-", "B"]
    assert [{**row, "reader": 0} for row in after] == [{**row, "reader": 0} for row in before]
    assert json.loads(out.read_text().splitlines()[1])["reader"]["said"].endswith("<answer>B</answer>")
    assert summarise(after) == summarise(before)  # never in the accuracy
    # 2 of 6 right with the reader; nothing was right before it
    told = with_reader(after)
    assert told and (told["accuracy"], told["n"], told["read"], told["settled"]) == (pytest.approx(2 / 6), 6, 3, 2)
    assert with_reader(before) is None
    assert len(reader.asked) == 3
    assert read_again(reader.name, read_jsonl(out), out) == read_jsonl(out) and len(reader.asked) == 3
    assert [row["correct"] for row in score(after)] == [False] * 6


def test_none_is_no_option_whatever_one_is_called() -> None:
    options = ("Nodule", "None")
    for said in ("<answer>none</answer>", "<think>B?</think><answer> None. </answer>", "<answer>**none**</answer>"):
        assert reader_letter(said, options) is None
    for said in ("<answer>B</answer>", "<answer>B) None</answer>", "B"):
        assert reader_letter(said, options) == "B"


def test_a_failing_reader_loses_nothing(reader: Reader, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    write_jsonl(out, rows())
    reader.fault = lambda number: (500, {"error": {"message": "broken"}}, {}) if number == 2 else None
    with pytest.raises(MedR1Error, match="broken"):
        read_again(reader.name, rows(), out, concurrency=1)
    assert sum("reader" in row for row in read_jsonl(out)) == 1
    reader.fault = lambda number: None
    assert sum("reader" in row for row in read_again(reader.name, read_jsonl(out), out)) == 3
    assert len(reader.asked) == 4


def test_a_mute_reader_has_read_nothing(reader: Reader, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    reader.fault = lambda number: (200, {"choices": []}, {})
    with pytest.raises(MedR1Error, match="answers nothing at record 1"):
        read_again(reader.name, rows(), out)
    assert not any("reader" in row for row in read_jsonl(out))
    reader.fault = lambda number: (200, {"choices": []}, {}) if number == len(reader.asked) == 4 else None
    read = [
        row["reader"]["letter"]
        for row in read_again(reader.name, read_jsonl(out), out, concurrency=1)
        if "reader" in row
    ]
    assert read == [None, None, "B"]


def test_a_reader_sees_question_options_and_reply_alone() -> None:
    (turn,) = reader_messages(rows()[1])
    assert "Question: Which?\nA) CT\nB) MRI\n\nReply:\nEither A or B" in turn["content"]


def test_the_command_names_the_reader(
    reader: Reader, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"

    def evaluate(name: str) -> int | str | None:
        arguments = ["--mode", "no-think", "--max-new-tokens", "3", "--limit", "4", "--set", "data.num_phantoms=40"]
        monkeypatch.setattr("sys.argv", ["medr1", "eval", *arguments, "--out", str(out), "--reader", name, "--json"])
        try:
            main()
        except SystemExit as stop:
            return stop.code
        return 0

    assert not evaluate(reader.name)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    unsettled = sum(row["outcome"] in ("unparsed", "ambiguous") for row in read_jsonl(out))
    assert unsettled == len(reader.asked) == (told["reader"] or {"read": 0})["read"]
    assert evaluate("gpt") == 1
    assert "--reader gpt: is not openai:MODEL@URL" in capsys.readouterr().err
