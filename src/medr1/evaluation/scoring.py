"""Replies that are stored, read and scored: what the extractor of this version makes of them."""

import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from medr1.evaluation.calibration import with_confidence
from medr1.evaluation.rows import Row, read_reply

AT_ONCE = 2_000
"""Rows that are handed to a process at a time; with fewer for each it would start for nothing."""


def score(rows: Iterable[Row], processes: int = 1) -> list[Row]:
    """The same rows with outcome, letter, correct, format_ok and confidence read anew from the stored replies.

    Rows of open questions also get text (what was answered, None without an answer) and token_f1 (see
    `medr1.data.answers`); in them `correct` says whether the answer is the same text or the same yes or no.

    Args:
        processes: at most so many read, of many rows; they are started anew, so that a script that asks for several
            needs `if __name__ == "__main__":`.
    """
    rows = list(rows)
    processes = min(processes, len(rows) // AT_ONCE)
    if processes < 2:
        read = [read_reply(row) for row in rows]
    else:
        ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is heard here
        pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=signal.signal, initargs=ignored)
        with pool:
            read = list(pool.map(read_reply, rows, chunksize=AT_ONCE))
    return [with_confidence({**row, **fields}) for row, fields in zip(rows, read, strict=True)]
