"""Whether those who sample for a run hold the policy's weights: by log-probs of the same tokens, once a step."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medr1.data.records import Record
from medr1.errors import MedR1Error

MAX_MISMATCH = 0.5
"""Mean difference of log-probs (nats a token) above which nobody can hold the policy; bfloat16 gives 0.01."""
USUAL_STEPS = 5
"""Steps whose median difference is what is usual for a run: sampler and policy are hardly apart then, stale or not."""
MAX_GROWTH = 4.0
"""Times the usual difference above which a sampler is taken to hold older weights. Users of another trainer reported a
server that had stopped reading them: 0.201 in place of 0.015, thirteen times."""
TOP = 20
"""Most likely tokens of a place that an engine tells; more than vLLM gives unless it is told to."""
LEAST_MISMATCH = 0.02
"""Nats a token that are never taken for that, so that two float32 computations, 1e-6 apart, may come to differ."""


class Watch:
    """What differences a run has seen."""

    remedies = (
        "serve the recipe's model, with --logprobs-mode processed_logprobs",
        "start the server anew and run the same command, which goes on from the last checkpoint",
    )
    """Where the first steps are far off already, and where later ones are."""

    def __init__(self) -> None:
        self.usual: list[float] = []
        """Those of the run's first steps."""

    def remember(self, mismatches: list[float]) -> None:
        """What the steps of a run had before it was resumed, in order."""
        self.usual = mismatches[:USUAL_STEPS]

    def check(self, mismatches: Mapping[str, float]) -> None:
        """See that each sampler has the policy's weights; once a step.

        Args:
            mismatches: of each that sampled, by its name: mean |log π - log μ| of its tokens, in nats.

        Raises:
            MedR1Error: one of them is more than MAX_MISMATCH, or than MAX_GROWTH times the median of the run's first
                USUAL_STEPS; before there are as many, times what the best of the step has.
        """
        for name, mismatch in mismatches.items():
            if not mismatch <= MAX_MISMATCH:
                raise MedR1Error(
                    f"{name}: its log-probs are {mismatch:.2g} nats a token off the policy's, with the weights pushed;"
                    f" {self.remedies[0]}"
                )
        if known := len(self.usual) == USUAL_STEPS:
            usual, known_from = statistics.median(self.usual), "were {:.2g} in the first steps"
        else:
            usual, known_from = min(mismatches.values()), "another server's are {:.2g} off"
        for name, mismatch in mismatches.items():
            if mismatch > max(LEAST_MISMATCH, MAX_GROWTH * usual):
                raise MedR1Error(
                    f"{name}: its log-probs are {mismatch:.2g} nats a token off the policy's, and"
                    f" {known_from.format(usual)}, as if it had older weights; {self.remedies[1]}"
                )
        if not known:
            self.usual.append(statistics.fmean(mismatches.values()))


@dataclass(frozen=True)
class Greedy:
    """What an engine makes of one prompt, taking the most likely token each time."""

    prompt_ids: list[int]
    """As it has read the prompt, images included."""
    tokens: list[int]
    """Of its reply, the stop token included."""
    logps: list[float]
    tops: list[dict[int, float]]
    """Log-probs of the most likely tokens at each place."""


def check_prompt(
    name: str,
    record: Record,
    theirs: Sequence[int] | None,
    ours: list[int],
    remedy: str = "serve the recipe's model with its own chat template and image sizes",
) -> None:
    """That vLLM has read a record's prompt as we do.

    Raises:
        MedR1Error: it has not.
    """
    if theirs != ours:
        count = "no ids" if theirs is None else f"{len(theirs)} tokens"
        raise MedR1Error(
            f"{name}: reads the prompt of record {record.id} otherwise than medr1 ({count} there, {len(ours)} here);"
            f" {remedy}"
        )
