"""A second reading, by a model behind an OpenAI-compatible server, of replies that the extractor could not settle.

    medr1 eval --model tiny --data DATA --out rows.jsonl --reader openai:Qwen/Qwen3-8B@http://localhost:8000/v1

The reader sees the question, its options and the reply, never the image, and says which option the reply chose. What it
says stands in the row beside the extractor's reading and is told apart from it: it is no reward, and no accuracy but
the one that names the reader has it. Its own words are read by the same extractor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medr1.data.answers import extract_answer
from medr1.data.records import write_jsonl
from medr1.evaluation.metrics import accuracy_table, by_kind, untrained
from medr1.evaluation.remote import Server, parse_name
from medr1.evaluation.rows import Row, record_of
from medr1.policy.client import NoCompletion, api_key, at_once, run_async

UNSETTLED = ("unparsed", "ambiguous")
"""Outcomes that are read again."""
WRITE_EVERY = 20
"""Readings between two writings of the file; the last ones are lost if the process is killed, and asked again."""
MAX_NEW_TOKENS = 1024

_QUESTION = """A model was asked a question with options and replied. Which option does the reply choose? Judge only \
what the reply says, not which option is right. Write its letter inside <answer></answer>; if the reply chooses none, \
or several, write <answer>none</answer>.

Question: {question}
{options}

Reply:
{reply}"""


def read_again(name: str, rows: Sequence[Row], out: Path, *, concurrency: int = 8) -> list[Row]:
    """Ask a reader about each row whose reply is unparsed or ambiguous, and write the rows to `out` anew.

    Rows that this reader has read are not asked about again. Questions without options are left alone.

    Args:
        name: "openai:MODEL@URL".
        rows: all rows of `out`, in the order to write them.

    Returns:
        The rows; one that was read has "reader": {model, letter (None: it names none), said (its raw text)}.

    Raises:
        MedR1Error: a malformed name, or the server fails (see `evaluate_remote`). Readings until then are kept.
    """
    model, url = parse_name(name, "--reader")
    server = Server(model, url, api_key(), MAX_NEW_TOKENS)
    kept = list(rows)
    pending = [
        place
        for place, row in enumerate(kept)
        if row["options"] and row["outcome"] in UNSETTLED and row.get("reader", {}).get("model") != model
    ]
    if not pending:
        return kept
    try:
        run_async(_ask(server, kept, pending, out, concurrency))
    finally:
        write_jsonl(out, kept)
    return kept


async def _ask(server: Server, rows: list[Row], pending: Sequence[int], out: Path, concurrency: int) -> None:
    places = iter(pending)
    done = 0
    silent: dict[int, NoCompletion] = {}

    def read(place: int, said: str) -> None:
        row = rows[place]
        letter = reader_letter(said, row["options"])
        rows[place] = {**row, "reader": {"model": server.model, "letter": letter, "said": said}}

    async with server.client() as client:

        async def work() -> None:
            nonlocal done
            for place in places:
                try:
                    reply = await server.reply(client, reader_messages(rows[place]), record_of(rows[place]))
                except NoCompletion as error:
                    silent[place] = error
                    continue
                read(place, reply["reply"])
                done += 1
                if done % WRITE_EVERY == 0:
                    write_jsonl(out, rows)

        await at_once(work, concurrency)
    server.check_answers([(record_of(rows[place]), error) for place, error in sorted(silent.items())], len(pending))
    for place in silent:
        read(place, "")


def reader_messages(row: Row) -> list[dict[str, Any]]:
    """What a reader is asked: question, options and reply, without the image."""
    record = record_of(row)
    options = "\n".join(f"{letter}) {option}" for letter, option in zip(record.letters, record.options, strict=True))
    text = _QUESTION.format(question=record.question, options=options, reply=row["reply"])
    return [{"role": "user", "content": text}]


def reader_letter(said: str, options: Sequence[str]) -> str | None:
    """The option that a reader says a reply chose; its "none" is none, also where an option is called so."""
    named = said.rpartition("<answer>")[2].partition("</answer>")[0]
    return None if named.strip(" \n.*").casefold() == "none" else extract_answer(said, options).letter


def with_reader(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Accuracy of multiple choice where the reader's letter counts for the rows that it read.

    Returns:
        accuracy, ci95, n, chance; model; read: number of rows that it was asked about; settled: in how many of these it
        named an option. None where no row was read.
    """
    choice, _ = by_kind(untrained(rows))
    read = [row for row in choice if "reader" in row and row["outcome"] in UNSETTLED]
    if not read:
        return None
    letters = {row["key"]: reader_letter(row["reader"]["said"], row["options"]) for row in read}
    judged = [
        {**row, "correct": letters[row["key"]] in record_of(row).right_letters} if row["key"] in letters else row
        for row in choice
    ]
    table = accuracy_table(judged)
    return {
        **{name: table[name] for name in ("accuracy", "ci95", "n", "chance")},
        "model": read[0]["reader"]["model"],
        "read": len(read),
        "settled": sum(letter is not None for letter in letters.values()),
    }
