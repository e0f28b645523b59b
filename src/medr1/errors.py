"""The one exception that reaches a user."""


class MedR1Error(Exception):
    """A user's mistake or bad input: one line that names the file, the record and the remedy.

    The command line prints the message and exits with status 1; nothing else in the package is caught there.
    """


class NotFiniteError(MedR1Error):
    """A model computed something that is not a finite number, so that nothing that follows from it means anything."""
