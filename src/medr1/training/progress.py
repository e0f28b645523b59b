"""What a training run says while it runs: one line that moves on a terminal, and plain lines elsewhere.

A log file gets a line every so many steps and no control characters. Only process 0 speaks; all numbers are in
log.jsonl.
"""

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback

from medr1.processes import is_first

SHOWN = {
    "reward": "reward",
    "reward_accuracy": "accuracy",
    "format_rate": "format",
    "loss": "loss",
    "kl": "KL",
    "completion_tokens": "tokens",
}
"""Numbers of a log line that are shown, and their names on the line."""
LINES = 50
"""About so many plain lines a run, with at most MAX_BETWEEN steps between two."""
MAX_BETWEEN = 100


class TrainingProgress(TrainerCallback):
    """Shows the steps, the newest numbers, and the time that is left, on stderr.

    `stop` must be called however training ends: it leaves the terminal's last line.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.numbers = ""
        self.began = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step
        if not is_first() or not self.console.is_terminal:
            return

        def kept() -> Column:  # what stays whole where a terminal is narrow
            return Column(no_wrap=True)

        columns = (
            BarColumn(bar_width=10, table_column=kept()),
            MofNCompleteColumn(table_column=kept()),
            _Numbers(),
            TimeRemainingColumn(table_column=kept()),
        )
        self.bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, numbers="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is None:
            return
        self.bar.update(self.task, completed=state.global_step, numbers=self.numbers)
        if control.should_evaluate:  # which has a bar of its own
            self.bar.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.numbers = "  ".join(f"{name} {_short(logs[key])}" for key, name in SHOWN.items() if key in logs)
            if self.bar is not None:
                self.bar.update(self.task, numbers=self.numbers)
            elif state.global_step % _between(state.max_steps) == 0 or state.global_step in (1, state.max_steps):
                self._say(f"step {state.global_step}/{state.max_steps}  {self.numbers}{self._left(state)}")
        for name, words in (("eval", "held-out accuracy"), ("eval_open", "held-out accuracy on open questions")):
            if f"{name}_accuracy" in logs:
                accuracy, low, high = (100 * logs[f"{name}_{part}"] for part in ("accuracy", "ci_low", "ci_high"))
                self._say(f"step {state.global_step}: {words} {accuracy:.1f} % ({low:.1f} to {high:.1f})")

        if "looking_reliance" in logs:
            parts = ("looking_reliance", "looking_reliance_low", "looking_reliance_high", "looking_sensitivity")
            reliance, low, high, changed = (100 * logs[part] for part in parts)
            self._say(
                f"step {state.global_step}: the image adds {reliance:+.1f} points of held-out accuracy over another one"
                f" ({low:+.1f} to {high:+.1f}), and {changed:.0f} % of answers change with it"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the moving line away; the terminal is on a new line."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _say(self, line: str) -> None:
        if is_first():
            (self.bar.console if self.bar else self.console).print(line, highlight=False, markup=False)

    def _left(self, state: Any) -> str:
        done, to_do = state.global_step - self.first_step, state.max_steps - state.global_step
        if not done or not to_do:
            return ""
        seconds = (time.monotonic() - self.began) / done
        return f"  {seconds:.2g} s a step, {duration(seconds * to_do)} left"


class _Numbers(ProgressColumn):
    """The newest numbers, cut at the end where the terminal is narrow."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["numbers"], no_wrap=True, overflow="ellipsis")


def _between(steps: int) -> int:
    """Steps between two plain lines: 1, 2 or 5 times a power of ten."""
    wanted = max(1.0, steps / LINES)
    power = 10 ** math.floor(math.log10(wanted))
    return min(MAX_BETWEEN, next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted))


def _short(value: float) -> str:
    """A number in a few characters; what rounds to nothing is 0, and a loss of 5e-08 is that."""
    if value == 0 or abs(value) < 5e-5:
        return "0"
    if abs(value) < 0.1:
        return f"{value:.4f}"
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """A time in words: "40 s", "3 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
