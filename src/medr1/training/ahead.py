"""One step ahead: while a step trains, a server samples the next one, by weights that are one update old.

Beside the training runs HTTP alone. Prompts are encoded and replies decoded by the thread that trains, since a
tokenizer's padding is a state of it. Replies are awaited before the weights change, so that they can be held against
those that the server was given, and nothing is under way at a checkpoint.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

from medr1.data.records import Record
from medr1.policy.encoding import PromptBatch
from medr1.policy.rollouts_vllm import Reply, VLLMServer


class Ahead:
    """The completions of the step to come.

    Args:
        order: begins the order of records; it is the same each time.
        batch: records of a step.
    """

    asked: "tuple[list[Record], PromptBatch, Future[list[Reply]]] | None" = None
    """What this process asked last: records, their prompts, and the replies to come."""
    replies: Sequence[Reply] = ()
    """Those to the whole step, once all processes have theirs; none where there is no step to come."""
    weights_step = 0
    """Updates that the weights had had which these are sampled by."""

    def __init__(self, server: VLLMServer, order: Callable[[], Iterator[int]], batch: int) -> None:
        self.server, self.order, self.batch = server, order, batch
        self.rest, self.step = order(), 0

    def indices(self, step: int) -> list[int]:
        """Of a step's records; steps are counted from 0, and asked one after the other."""
        self.rest, self.step = islice(self.rest, (step - self.step) * self.batch, None), step + 1
        return list(islice(self.rest, self.batch))

    def begin(self, records: list[Record], prompts: PromptBatch, settings: dict[str, Any]) -> None:
        """Ask the server in a thread that keeps no process from ending; `settings` of `VLLMServer.ask`."""
        replies: Future[list[Reply]] = Future()

        def ask() -> None:
            try:
                replies.set_result(self.server.ask(records, prompts, **settings))
            except BaseException as error:  # raised where the replies are awaited
                replies.set_exception(error)

        self.asked = records, prompts, replies
        threading.Thread(target=ask, daemon=True).start()

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON."""
        return {"weights_step": self.weights_step, "replies": self.replies}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from where a `state` was taken."""
        self.weights_step, self.replies = state["weights_step"], state["replies"]
