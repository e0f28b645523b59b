"""The one exception that reaches a user."""

from collections.abc import Iterator
from contextlib import contextmanager


class MedR1Error(Exception):
    """A user's mistake or bad input: one line that names the file, the record and the remedy.

    The command line prints the message and exits with status 1; nothing else in the package is caught there.
    """


class NotFiniteError(MedR1Error):
    """A model computed something that is not a finite number, so that nothing that follows from it means anything."""


@contextmanager
def first_alone() -> Iterator[None]:
    """Of failures of tasks that ran at the same time the first is raised, and not the group: it says enough."""
    try:
        yield
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
