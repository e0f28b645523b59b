"""Images that stand inside a table (Parquet, base64): kept as files in the user's cache, named by their content.

So a record's image is a path like any other, and one picture has one path however many rows hold it.
"""

import base64
import binascii
import hashlib
import io
from pathlib import Path
from uuid import uuid4

from PIL import Image

from medr1.data.cache import cache_folder
from medr1.errors import MedR1Error


def keep_image(content: bytes) -> Path:
    """Path of a file with these bytes, written on first use; its stem is their SHA-256.

    Raises:
        ValueError: they are no picture.
        MedR1Error: the cache cannot be written.
    """
    digest = hashlib.sha256(content).hexdigest()
    folder = cache_folder() / "images" / digest[:2]
    if found := next(folder.glob(f"{digest}.*"), None):
        return found
    try:
        with Image.open(io.BytesIO(content)) as image:  # reads the header alone
            path = folder / f"{digest}.{(image.format or 'img').lower()}"
    except Exception as error:
        raise ValueError("the image in the row cannot be decoded; fetch the table again") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{uuid4().hex}"  # for whom the umask says; a file of mkstemp is private
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be written ({error.strerror}); free space or set MEDR1_CACHE") from error
    return path


def from_base64(text: str) -> bytes:
    """The bytes that a base64 text stands for.

    Raises:
        ValueError: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the image is no base64 text ({error})") from error
