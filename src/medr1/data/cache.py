"""Where medr1 keeps what it makes once for a user: phantoms, embedded images, the salt, what image files hold."""

import os
from pathlib import Path

from medr1.errors import MedR1Error


def cache_folder() -> Path:
    """What medr1 keeps for a user; MEDR1_CACHE moves it. It need not exist.

    Raises:
        MedR1Error: MEDR1_CACHE is not set, and the user has no home.
    """
    if given := os.environ.get("MEDR1_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "medr1"
    except RuntimeError as error:
        raise MedR1Error("this user has no home folder to keep a cache in; set MEDR1_CACHE to a folder") from error
