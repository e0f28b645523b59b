"""The client of OpenAI-compatible servers: key, messages with their images, and a failure in one line."""

import base64
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from medr1.errors import MedR1Error

try:
    import openai
except ImportError as error:
    raise MedR1Error("a model behind a server needs the openai client; pip install 'medr1[remote]'") from error

TIMEOUT = 600.0
"""Seconds that one request may take, the server's own queue included."""


NO_KEY = "EMPTY"
"""What is sent as the key where OPENAI_API_KEY is not set; local servers take any."""


def api_key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise MedR1Error("OPENAI_API_KEY: holds a character that no key has; set it anew")
    return key


def api_messages(messages: Sequence[dict[str, Any]], images: Iterable[Image.Image]) -> list[dict[str, Any]]:
    """`build_messages` in the API's form: each image slot holds its image, as a PNG in a data URI."""
    rest = iter(images)
    return [
        {
            "role": turn["role"],
            "content": [part if part["type"] == "text" else _image_part(next(rest)) for part in turn["content"]],
        }
        for turn in messages
    ]


def _image_part(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def reason_of(error: openai.APIError) -> str:
    """What the server or the network said, in one line."""
    text = str(error.__cause__ or error)
    if " - " not in text and error.body:  # the client shows a message of the usual form only
        text += f" - {error.body}"
    return " ".join(text.split())[:300]
