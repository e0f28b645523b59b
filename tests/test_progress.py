"""What a run says while it runs: plain lines in a log file, one line that stays one on a terminal of any width."""

import io
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from medr1.training import progress
from medr1.training.progress import TrainingProgress, _between, _short, duration

LINE = {
    "loss": 5e-8,
    "reward": 0.93,
    "reward_accuracy": 0.875,
    "format_rate": 1.0,
    "kl": 0.0123,
    "completion_tokens": 23.4,
}


def train(shows: TrainingProgress, steps: int) -> None:
    """As the Trainer calls it."""
    state = SimpleNamespace(global_step=0, max_steps=steps)
    control = SimpleNamespace(should_evaluate=False)
    shows.on_train_begin(None, state, control)
    for step in range(1, steps + 1):
        state.global_step = step
        shows.on_step_end(None, state, control)
        shows.on_log(None, state, control, logs=LINE)
    shows.on_log(None, state, control, logs={"eval_accuracy": 0.61, "eval_ci_low": 0.55, "eval_ci_high": 0.67})
    shows.stop()


def test_a_log_file_gets_plain_lines() -> None:
    shows, file = TrainingProgress(), io.StringIO()
    shows.console = Console(file=file, soft_wrap=True)
    train(shows, 120)
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()
    assert len(lines) == 1 + 24 + 1
    assert lines[0].startswith(
        "step 1/120  reward 0.930  accuracy 0.875  format 1.000  loss 0  KL 0.0123  tokens 23.4  "
    )
    assert lines[0].endswith(" left") and lines[1].startswith("step 5/120 ")
    assert lines[-1] == "step 120: held-out accuracy 61.0 % (55.0 to 67.0)"


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_a_terminal_gets_one_line_with_the_steps_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    made = Console

    def console(**settings: object) -> Console:
        return made(file=file, force_terminal=True, width=width)

    monkeypatch.setattr(progress, "Console", console)
    train(TrainingProgress(), 1000)
    painted = [part for part in file.getvalue().split("\r") if "/1000" in part]
    assert painted and all("reward 0.930" in part for part in painted[2:])
    assert "\x1b[1A\x1b[2K\x1b[1A" not in file.getvalue(), "two lines were painted over"


def test_another_process_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    shows, file = TrainingProgress(), io.StringIO()
    shows.console = Console(file=file, force_terminal=True)
    train(shows, 3)
    assert not file.getvalue()


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (50, 1), (51, 2), (120, 5), (600, 20), (17_800, 100)])
def test_steps_between_lines(steps: int, expected: int) -> None:
    assert _between(steps) == expected
    assert math.ceil(steps / expected) <= 50 or expected == 100


def test_numbers_in_a_few_characters() -> None:
    assert [_short(value) for value in (0, -5e-8, 5e-8, 0.0123, 0.93, 23.44, -3)] == [
        *("0", "0", "0", "0.0123", "0.930", "23.4", "-3.0")
    ]
    assert [duration(seconds) for seconds in (7, 100, 7500)] == ["7 s", "2 min", "2 h 5 min"]
