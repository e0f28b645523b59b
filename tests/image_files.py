"""What the tests of medical image files share."""

from pathlib import Path

import numpy as np
import pytest

from medr1.data.images import load_image, read_image
from medr1.errors import MedR1Error


def grey(reference: Path | str) -> np.ndarray:
    """The one channel of an image that must be grey."""
    image = np.asarray(load_image(reference))
    assert (image == image[..., :1]).all()
    return image[..., 0]


def error_of(reference: Path | str) -> str:
    """The one line that refuses a file, which must name it."""
    with pytest.raises(MedR1Error) as error:
        read_image(reference)
    message = str(error.value)
    assert "\n" not in message and str(reference).partition("#")[0] in message
    return message
