"""Guesses of the tokens that a completion will go on with, so that one call of the model can check several.

What a policy writes repeats what it has written: within a group all completions describe one image, and from step to
step most phrases stay. So a plain count of which token followed the last tokens guesses well, and costs a look into
a dictionary. Speculative decoding (arXiv:2211.17192) accepts a guess with a probability that keeps the distribution;
here the draws are fixed before sampling (`rollouts.sample`), and a guess is right if it is the token that the draw
takes: what comes out is token for token what plain decoding gives, whatever is guessed.

A guess is made only where it is likely to pay: how often guesses of its kind were right so far is counted, and a call
of few rows, whose time is mostly overhead, may guess more boldly than one of many. All of it is a function of the
completions so far, never of the clock, so that a resumed run guesses alike.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

CONTEXT = 4
"""The longest context, in tokens."""
MAX_GUESSES = 8
"""Tokens that are guessed for a row and call, at most."""
FREE_TOKENS = 128
"""A call costs about as much as so many tokens in it: with n rows a guess must be right with chance n / (n + this)."""
WINDOW = 2**17
"""Tokens of the newest completions that are counted; what the policy wrote long ago it may no longer write."""
_START = -1
"""Stands before the first token."""

Kind = tuple[int, int, int, int]
"""Of a guess: where it was counted (0 the run, 1 the group), length of the context, share of the count (eighths), how
often the context was seen (powers of two, at most 16)."""


class Guess(NamedTuple):
    """A token that a row may go on with."""

    chance: float
    """That it is right, if all before it is; in [0, 1]."""
    token: int
    kind: Kind


class Counts:
    """How often each token followed each context of 1 to CONTEXT tokens."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], dict[int, int]] = {}
        self._likeliest: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def add(self, sequence: Sequence[int], start: int = 0, times: int = 1) -> None:
        """Count the tokens of `sequence` from `start` on, each after what stands before it; times = -1 takes back."""
        padded = (_START, *sequence)
        for end in range(start + 1, len(padded)):
            token = padded[end]
            for first in range(max(0, end - CONTEXT), end):
                context = padded[first:end]
                counts = self._after.get(context)
                if counts is None:
                    counts = self._after[context] = {}
                counts[token] = counts.get(token, 0) + times
                if not counts[token]:
                    del counts[token]
                    if not counts:
                        del self._after[context]
                self._likeliest.pop(context, None)

    def likeliest(self, context: tuple[int, ...]) -> tuple[int, int, int] | None:
        """(token, its count, count of the context); of equal ones the smallest token. None for a new context."""
        found = self._likeliest.get(context)
        if found is None and (counts := self._after.get(context)):
            most = max(counts.values())
            token = min(token for token, count in counts.items() if count == most)
            found = self._likeliest[context] = token, most, sum(counts.values())
        return found


class Drafts:
    """What a run (or an evaluation) has written, and how good guesses from it were.

    Example:
        drafts = Drafts()
        first = sample(vlm, prompts, num_completions=8, max_new_tokens=64, seed=0, drafts=drafts)
        drafts.learn(first.tokens, first.guesses)  # the next call decodes several tokens a call
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._window: deque[list[int]] = deque()
        self._tokens = 0
        self.right: Counter[Kind] = Counter()
        self.made: Counter[Kind] = Counter()

    def learn(
        self, completions: Iterable[Sequence[int]], guesses: Mapping[tuple[Kind, bool], int] = MappingProxyType({})
    ) -> None:
        """Count completions (token ids, the stop token included) and how guesses of each kind fared (how many were
        right, and wrong); the oldest completions leave the window."""
        for completion in completions:
            self._window.append(list(completion))
            self._tokens += len(completion)
            self.counts.add(completion)
        while self._tokens > WINDOW:
            oldest = self._window.popleft()
            self._tokens -= len(oldest)
            self.counts.add(oldest, times=-1)
        for (kind, was_right), times in guesses.items():
            self.made[kind] += times
            self.right[kind] += times * was_right

    def chance(self, kind: Kind) -> float:
        """Share of the guesses of a kind that were right, with one right and half a wrong one beforehand."""
        return (self.right[kind] + 1.0) / (self.made[kind] + 1.5)

    def state(self) -> dict[str, Any]:
        """JSON-like; `load` takes it."""
        kinds = [[list(kind), self.right[kind], made] for kind, made in sorted(self.made.items())]
        return {"completions": list(self._window), "guesses": kinds}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.__init__()  # type: ignore[misc]
        self.learn(state["completions"])
        for kind, right, made in state["guesses"]:
            self.right[tuple(kind)], self.made[tuple(kind)] = right, made


class GroupDrafts:
    """Guesses for the completions of one call of `sample`: from the run's counts, and from what each completion's own
    group (those of one prompt) has written so far.
    """

    def __init__(self, drafts: Drafts, num_groups: int) -> None:
        self._drafts = drafts
        self._groups = [Counts() for _ in range(num_groups)]
        self._guessed: dict[tuple[int, tuple[int, ...], int], list[Guess]] = {}
        """What was guessed since the last tokens came: by group, tokens before, and how many share the call."""
        self.outcomes: Counter[tuple[Kind, bool]] = Counter()
        """How many guesses of each kind were right, and wrong; of those after a wrong one nothing is known."""

    def add(self, group: int, ids: Sequence[int], start: int, guessed: Sequence[Guess], *, times: int) -> None:
        """`times` completions of a group have written `ids`, new from `start` up to the first that was not guessed."""
        self._groups[group].add(ids, start, times)
        for guess, token in zip(guessed, ids[start:], strict=False):
            self.outcomes[guess.kind, guess.token == token] += times
        self._guessed.clear()

    def guess(self, group: int, ids: Sequence[int], alive: int, limit: int) -> list[Guess]:
        """Tokens that may follow `ids`, at most `limit`, where `alive` different completions share the call."""
        before = (_START, *ids[-CONTEXT:])[-CONTEXT:]
        guessed = self._guessed.get((group, before, alive))
        if guessed is None:  # completions of a group often stand at the same words
            guessed = self._guessed[group, before, alive] = self._chain(group, before, alive)
        return guessed[:limit]

    def _chain(self, group: int, before: tuple[int, ...], alive: int) -> list[Guess]:
        needed = alive / (alive + FREE_TOKENS)
        chance = 1.0
        guessed: list[Guess] = []
        while len(guessed) < MAX_GUESSES:
            longest_first = (self._best(group, before[start:]) for start in range(len(before)))
            best = next(filter(None, longest_first), None)
            if best is None or (chance := chance * best.chance) < needed:
                break
            guessed.append(best)
            before = (*before, best.token)[-CONTEXT:]
        return guessed

    def _best(self, group: int, context: tuple[int, ...]) -> Guess | None:
        """After a context, from the run or the group, whichever is likelier right."""
        found = []
        for place, counts in enumerate((self._drafts.counts, self._groups[group])):
            if likeliest := counts.likeliest(context):
                token, count, total = likeliest
                kind = (place, len(context), 8 * count // total, min(total.bit_length(), 5))
                found.append(Guess(self._drafts.chance(kind), token, kind))
        return max(found, default=None)
