"""Where medr1 keeps what it makes once for a user: phantoms, embedded images, the salt, what image files hold."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """What medr1 keeps for a user; MEDR1_CACHE moves it. It need not exist."""
    return Path(os.environ.get("MEDR1_CACHE", Path.home() / ".cache" / "medr1"))
