"""What the code stream of a JPEG says of itself, before anything is decoded."""

import struct
from typing import NamedTuple

_JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
"""Second byte of the markers that start a frame (ITU-T T.81 table B.1; F7: JPEG-LS)."""


class Declared(NamedTuple):
    """Of an image in a code stream."""

    rows: int
    columns: int
    bits: int
    """Of a sample; of the deepest, where they differ."""


def declared(code: bytes) -> Declared | None:
    """What a JPEG, JPEG-LS or JPEG 2000 code stream (bare or in a JP2 file) declares.

    None for others, such as RLE, and for one that is broken.
    """
    try:
        start = code.find(b"\xff\x4f\xff\x51", 0, 1 << 16)
        if start == 0 or (start > 0 and code[4:8] == b"jP  "):
            # ISO/IEC 15444-1 A.5.1: size of the reference grid less its offset; bits less one and sign of each sample
            width, height, left, top = struct.unpack_from(">IIII", code, start + 8)
            (samples,) = struct.unpack_from(">H", code, start + 40)
            depths = code[start + 42 : start + 42 + 3 * samples : 3]
            return Declared(height - top, width - left, max(depth & 0x7F for depth in depths) + 1)
        place = 2
        while code[:2] == b"\xff\xd8" and code[place] == 0xFF:
            if code[place + 1] in _JPEG_FRAMES:
                bits, rows, columns = struct.unpack_from(">BHH", code, place + 4)
                return Declared(rows, columns, bits)
            place += 1 if code[place + 1] == 0xFF else 2 + struct.unpack_from(">H", code, place + 2)[0]
    except (struct.error, IndexError, ValueError):
        pass
    return None
