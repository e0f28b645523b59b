"""What commands print where nothing is there to be averaged."""

from pathlib import Path

import pytest
from test_report import make_rows

from medr1.cli.printing import print_checkpoints
from medr1.evaluation.metrics import summarise


def test_checkpoints_asked_of_what_their_run_trained_on_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """None of these answers is in an accuracy; a traceback ended the command once all had been asked."""
    asked = {"base": make_rows(8), "checkpoint-1": make_rows(18, seen_by_run="trained on")}
    summaries = [{"name": name, "step": step, **summarise(rows)} for step, (name, rows) in enumerate(asked.items())]
    print_checkpoints(summaries, False, cut_at=9, out=Path("rows"))
    base, trained = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("│")]
    assert base[1::2][:3] == ["base", "0", "40.0"] and trained[1::2][:4] == ["checkpoint-1", "1", "–", "–"]
