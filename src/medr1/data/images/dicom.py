"""DICOM to 8-bit RGB, in the order of PS3.3: modality LUT or rescale, VOI LUT or window, polarity, 8 bits.

Of the header only the elements below are read, and of these nothing but numbers and the standard's own words is told.
pydicom's warnings, log lines and exceptions quote values, perhaps a patient's: they are never passed on.
"""

import hashlib
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from medr1.data.images.codestream import declared
from medr1.data.images.display import (
    CT_WINDOWS,
    UNDEFINED,
    Grey,
    Values,
    bits_in_use,
    by_table,
    eight_bit_colours,
    finite_values,
    given_window,
    robust_range,
    square_pixels,
    stretched,
    windowed,
)
from medr1.data.images.limits import MAX_BYTES, MAX_PIXELS, extra
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

# fmt: off
_HEADER = [
    "SOPClassUID", "ImageType", "Modality", "BurnedInAnnotation", "PresentationIntentType", "PresentationLUTShape",
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PixelPresentation",
    "RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]
# fmt: on

_OF_TABLES = ("LUTDescriptor", "LUTData", "PixelData")
"""Further elements that may be named in a line."""

_INTEGERS = (0x7FE0, 0x0010)
_PIXELS = (_INTEGERS, (0x7FE0, 0x0009), (0x7FE0, 0x0008))
"""Tags of PixelData, DoubleFloatPixelData and FloatPixelData."""

_SAMPLES = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1, "RGB": 3}
"""Samples a pixel by kind of colour; the kinds that begin with YBR have three."""

_BURNED_IN = {
    "US": "ultrasound",
    "SC": "secondary capture",
    "XA": "angiography",
}
"""Modalities whose images often carry a name in the pixels."""

_NUMBERS = ("US", "SS", "US or SS", "IS", "DS")
"""Value representations of numbers."""

_ONE_AT_A_TIME = threading.RLock()


def read_dicom(reference: Reference) -> tuple[Image.Image, dict[str, Any]]:
    """A frame, the middle one by default; only its pixels are decoded.

    Window: the selector's, else the first VOI LUT or window of the file. A file without any keeps its full range where
    that is meant to be looked at (8 bits or fewer, FOR PRESENTATION), else see `grey.robust_range`, padding left out.
    Pixels that are not square by the header are made so.
    """
    reference.allow("DICOM file", "frame", "window")
    with _nothing_told(reference):
        header = _header(reference)
        _refuse_unsupported(reference, header)
        pixels = _pixel_element(reference, header)
        assumed = _completed(reference, header, pixels)
        _refuse_untrue(reference, header)
        frames = _num_frames(reference, header)
        frame = reference.whole("frame", frames // 2 + 1, 1, frames) - 1
        show = _Display(reference, header, frame)
        show.warnings += [f"its header lacks {name}: taken as {value}" for name, value in assumed.items()]
        stored = _stored(reference, header, frame, frames, pixels, assumed, show.warnings)
        is_grey = header.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2")
        values, decisions = show.grey(stored) if is_grey else show.colour(stored)
        image, aspect = show.square(Image.fromarray(values).convert("RGB"))
        return image, {
            "kind": "DICOM",
            "modality": show.word("Modality"),
            "transfer_syntax": header.file_meta.TransferSyntaxUID.name,
            "frame": f"{frame + 1} of {frames}",
            **decisions,
            **aspect,
            "warnings": show.warnings,
        }


def num_frames(reference: Reference) -> int:
    """Frames that the header declares."""
    with _nothing_told(reference):
        return _num_frames(reference, _header(reference))


def _num_frames(reference: Reference, header: Any) -> int:
    frames = header.get("NumberOfFrames") or 1
    if frames < 1 or frames != int(frames):
        raise _undecodable(reference, f"NumberOfFrames is {float(frames):g}")
    return int(frames)


def identifiers(path: Path) -> dict[str, str]:
    """PatientID and StudyInstanceUID as "patient" and "study", empty where absent. Only to be hashed."""
    reference = Reference(path)
    with _nothing_told(reference):
        header = _header(reference, ["PatientID", "StudyInstanceUID"])
        return {
            "patient": str(header.get("PatientID") or "").strip(),
            "study": str(header.get("StudyInstanceUID") or "").strip(),
        }


@dataclass(frozen=True)
class SliceHeader:
    """Where an image belongs. Series and owner are only to be compared, never told."""

    series: str
    """SeriesInstanceUID, empty where absent."""
    owner: str
    """SHA-256 (hex) of StudyInstanceUID and PatientID."""
    number: int | None
    """InstanceNumber."""
    normal: tuple[float, ...] | None
    """Unit vector across the slice, to three decimals."""
    along: float | None
    """Place along this normal, in mm."""


def slice_header(path: Path) -> SliceHeader | None:
    """Series, number and place of an image; None of a DICOM file that holds none, such as a report.

    Raises:
        MedR1Error: the header cannot be read, or is cut off before it says how large the image is; or pydicom is not
            installed.
    """
    reference = Reference(path)
    extra("pydicom", reference)
    tags = ["SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "Rows"]
    whose = ["StudyInstanceUID", "PatientID"]
    with _nothing_told(reference):
        header = _header(reference, [*tags, *whose, "SOPClassUID"])
        if not header.get("Rows"):
            kind = _kind_name(header)
            if kind is None or "Image Storage" in kind:
                raise _undecodable(reference, "its header lacks Rows")
            return None
        number, position = header.get("InstanceNumber"), header.get("ImagePositionPatient") or ()
        normal, along = None, None
        if len(position) == 3 and len(directions := header.get("ImageOrientationPatient") or ()) == 6:
            across = np.cross(*np.array(directions, dtype=float).reshape(2, 3))
            normal = tuple(float(one) + 0.0 for one in np.round(across, 3))
            along = round(float(across @ np.array(position, dtype=float)), 3)
        series = str(header.get("SeriesInstanceUID") or "")
        owner = hashlib.sha256(" ".join(str(header.get(keyword) or "") for keyword in whose).encode()).hexdigest()
        return SliceHeader(series, owner, None if number in (None, "") else int(number), normal, along)


def _kind_name(header: Any) -> str | None:
    """The standard's name for what the file holds, such as "CT Image Storage"; None where the header tells of none."""
    from pydicom import uid

    kind = uid.UID(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    return kind.name if kind in uid.UID_dictionary else None


@contextmanager
def _nothing_told(reference: Reference) -> Iterator[None]:
    """Neither warning nor log line nor exception of pydicom's leaves the block, since they quote the header."""
    extra("pydicom", reference)
    logger = logging.getLogger("pydicom")
    with _ONE_AT_A_TIME, warnings.catch_warnings():  # both silences are of the whole process
        warnings.simplefilter("ignore")
        disabled, logger.disabled = logger.disabled, True
        try:
            yield
        except (MedR1Error, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        # At bad bytes pydicom and its plugins raise nearly anything, also the panic of the one in Rust: no Exception.
        except BaseException as error:
            raise _undecodable(reference, _complaint(error)) from None
        finally:
            logger.disabled = disabled


def _complaint(error: BaseException) -> str:
    """What pydicom complains of, without its words: the element of the image that it names, else the kind of error."""
    from pydicom.datadict import keyword_for_tag

    tags = re.findall(r"\(([0-9A-Fa-f]{4}),\s?([0-9A-Fa-f]{4})\)", str(error))
    named = [getattr(error, "name", None), *(keyword_for_tag(int(group + number, 16)) for group, number in tags)]
    if known := [name for name in named if name in _HEADER or name in _OF_TABLES]:
        return f"{known[0]} is missing or has a value that it cannot have"
    return "an element that it needs is missing" if isinstance(error, AttributeError) else type(error).__name__


def _undecodable(reference: Reference, why: str) -> MedR1Error:
    return MedR1Error(f"{reference}: this DICOM file cannot be decoded ({why}); fetch it again or convert it to PNG")


def _header(reference: Reference, keywords: list[str] = _HEADER) -> Any:
    """The data set of these elements, with a transfer syntax; pixels stay in the file."""
    import pydicom
    from pydicom import uid
    from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_for_tag

    path = reference.path
    _refuse_inflation(reference)
    header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=keywords)
    # A broken length or type makes texts, or other elements' bytes, of a number; nothing of that is to be told.
    for tag in list(header.keys()):
        keyword = keyword_for_tag(tag)
        try:
            element = header[tag]
        except Exception:  # a number that is none, such as a frame count of "many"
            raise _undecodable(reference, f"{keyword} is no value of its kind") from None
        is_number = dictionary_VR(element.tag) in _NUMBERS and dictionary_VM(element.tag) == "1"
        if is_number and not element.is_empty and not isinstance(element.value, int | float | Decimal):
            raise _undecodable(reference, f"{keyword} is not one number")
    if "TransferSyntaxUID" not in header.file_meta:
        implicit, little = header.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return header


def _refuse_inflation(reference: Reference) -> None:
    """Raise MedR1Error if the file is a deflated data set of more than MAX_BYTES, which pydicom would inflate whole."""
    from pydicom import uid
    from pydicom.filereader import read_file_meta_info

    with reference.path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return
        meta = read_file_meta_info(reference.path)
        if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
            return
        file.seek(144 + meta.FileMetaInformationGroupLength)  # preamble, prefix, and the element of the length itself
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflater.unconsumed_tail or file.read(1 << 20):
            size += len(inflater.decompress(chunk, 1 << 24))
            if size > MAX_BYTES:
                raise MedR1Error(f"{reference}: inflates to more than {MAX_BYTES >> 30} GiB; it is broken or a bomb")


class _PixelElement(NamedTuple):
    """The first element that holds pixels."""

    tag: tuple[int, int] | None
    """None where the file has none."""
    start: int
    """Byte at which its tag begins; 0 in a data set that is inflated as a whole."""
    length: int | None
    """Of its value in bytes; None where it is not defined, as with compressed pixels."""


def _refuse_unsupported(reference: Reference, header: Any) -> None:
    """Raise MedR1Error for an index of other files, and for pixels that cannot be decoded here."""
    from pydicom import uid
    from pydicom.pixels import get_decoder

    if header.file_meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
        raise MedR1Error(f"{reference}: is a DICOMDIR, an index of other files; name one of those")
    syntax = header.file_meta.TransferSyntaxUID
    name = syntax.name if syntax in uid.UID_dictionary else "an unknown transfer syntax"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise MedR1Error(f"{reference}: its pixels are {name}, which medr1 does not read; convert it") from None
    if not decoder.is_available:
        raise MedR1Error(f"{reference}: its pixels are {name}, which needs a decoder; pip install 'medr1[images]'")


def _completed(reference: Reference, header: Any, pixels: _PixelElement) -> dict[str, Any]:
    """Fill in what the header lacks of the description of its pixels; returns what was taken, by keyword.

    Taken is what follows from the other elements, and where nothing does what viewers take: unsigned values, colours
    pixel by pixel.

    Raises:
        MedR1Error: it holds no pixels, or lacks what nothing else tells.
    """
    kind = _kind_name(header)
    name = f" ({kind})" if kind else ""
    if pixels.tag not in _PIXELS:
        is_image = "Image Storage" in name or header.get("Rows")
        advice = "fetch it again with its pixels or leave it out" if is_image else "leave it out"
        if header.get("Rows") and header.get("Columns"):
            raise MedR1Error(f"{reference}: this DICOM file has a header alone, no PixelData{name}; {advice}")
        raise MedR1Error(f"{reference}: this DICOM file holds no image, for it has no PixelData{name}; {advice}")
    if pixels.length == 0:
        raise _undecodable(reference, "its PixelData is empty")

    def lacks(keyword: str) -> bool:
        return header.get(keyword) in (None, "")

    taken: dict[str, Any] = {}

    def take(keyword: str, value: Any) -> None:
        if value is None:
            raise _undecodable(reference, f"its header lacks {keyword}")
        if lacks(keyword):
            taken[keyword] = value
            setattr(header, keyword, value)

    for keyword in ("Rows", "Columns"):
        if not header.get(keyword):
            raise _undecodable(reference, f"its header lacks {keyword}" if lacks(keyword) else f"{keyword} is 0")
    colour = str(header.get("PhotometricInterpretation") or "")
    samples = _SAMPLES.get(colour, 3 if colour.startswith("YBR") else None)
    take("SamplesPerPixel", header.get("SamplesPerPixel") or samples)
    native = not header.file_meta.TransferSyntaxUID.is_encapsulated
    take(
        "PhotometricInterpretation",
        colour or {1: "MONOCHROME2", 3: "RGB" if native else None}.get(header.SamplesPerPixel),
    )
    stored = header.get("BitsStored")
    allocated = next((bits for bits in (1, 8, 16, 32, 64) if stored and stored <= bits), None)
    take("BitsAllocated", header.get("BitsAllocated") or allocated)
    if pixels.tag == _INTEGERS:
        take("BitsStored", stored or header.BitsAllocated)
        take("PixelRepresentation", header.get("PixelRepresentation") or 0)
    if header.SamplesPerPixel > 1:
        take("PlanarConfiguration", header.get("PlanarConfiguration") or 0)
    return taken


def _pixel_element(reference: Reference, header: Any) -> _PixelElement:
    import pydicom
    from pydicom import uid

    syntax = header.file_meta.TransferSyntaxUID
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        dataset = pydicom.dcmread(reference.path)
        tag = next((tag for tag in _PIXELS if tag in dataset), None)
        return _PixelElement(tag, 0, len(dataset[tag].value) if tag else None)
    order = "<" if syntax.is_little_endian else ">"
    with reference.path.open("rb") as file:
        pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=["Rows"])
        start, head = file.tell(), file.read(12)
    if len(head) < 8:
        return _PixelElement(None, start, None)
    at = 4 if syntax.is_implicit_VR else 8
    length = struct.unpack(f"{order}I", head[at : at + 4].ljust(4, b"\xff"))[0]
    return _PixelElement(struct.unpack(f"{order}HH", head[:4]), start, None if length == 0xFFFFFFFF else length)


def _refuse_untrue(reference: Reference, header: Any) -> None:
    """Raise MedR1Error for what would come out too large, or wrong."""
    if header.Rows * header.Columns > MAX_PIXELS:
        size = f"{header.Columns} x {header.Rows}"
        raise MedR1Error(f"{reference}: {size} pixels are above the limit of {MAX_PIXELS}; shrink it")
    if header.get("HighBit") is not None and "BitsStored" in header and header.HighBit != header.BitsStored - 1:
        raise _undecodable(reference, f"{header.BitsStored} bits stored, and the highest is number {header.HighBit}")


def _stored(
    reference: Reference,
    header: Any,
    frame: int,
    frames: int,
    pixels: _PixelElement,
    assumed: dict[str, Any],
    warned: list[str],
) -> Any:
    """Pixels of one frame as they are stored, colour as RGB: (rows, columns) or (rows, columns, 3), any number type.

    More pixels than the header tells of are a warning.
    """
    import pydicom
    from pydicom import uid
    from pydicom.encaps import get_frame
    from pydicom.pixels import pixel_array
    from pydicom.pixels.utils import get_expected_length

    syntax, path = header.file_meta.TransferSyntaxUID, reference.path
    told = {re.sub(r"(?<=.)(?=[A-Z])", "_", keyword).lower(): value for keyword, value in assumed.items()}
    if not syntax.is_encapsulated:
        expected, is_deflated = get_expected_length(header), syntax == uid.DeflatedExplicitVRLittleEndian
        if not is_deflated and pixels.start + 8 + expected > path.stat().st_size:
            raise _undecodable(reference, "it is cut off: its header tells of more pixels")
        if pixels.length is not None:
            held = f"{pixels.length} bytes where its header tells of {expected}"
            if pixels.length < expected:
                raise _undecodable(reference, f"PixelData holds {held}")
            if header.PhotometricInterpretation == "YBR_FULL_422" and pixels.length >= expected // 2 * 3:
                raise _undecodable(reference, f"PixelData holds {held}: its colours are whole and no YBR_FULL_422")
            if pixels.length > expected + expected % 2:
                warned.append(f"PixelData is longer than its header says: {held}, so this may be wrong, or a part")
        if is_deflated:
            return pixel_array(pydicom.dcmread(path), index=frame, **told)
        return pixel_array(path, index=frame, transfer_syntax_uid=syntax, **told)
    if pixels.length is not None:
        raise _undecodable(reference, "its PixelData is not compressed, as its header says that it is")
    with path.open("rb") as file:
        file.seek(pixels.start + 12)
        if (coded_frames := _num_coded(file)) > frames:
            warned.append(f"it holds more frames than its header says: {coded_frames} where that tells of {frames}")
        file.seek(pixels.start + 12)
        coded = get_frame(file, frame, number_of_frames=frames)
    said = declared(coded)
    if said and (said.rows, said.columns) != (header.Rows, header.Columns):
        raise _undecodable(reference, "its header and its compressed pixels differ in size")
    if syntax == uid.JPEGExtended12Bit and header.BitsStored > 8:  # no plugin of a free licence decodes it
        values = extra("imagecodecs", reference).jpeg8_decode(coded)
        if header.PixelRepresentation == 1 and values.dtype == np.uint16:
            unused = 16 - header.BitsStored
            values = (values << unused).view(np.int16) >> unused  # the sign of what is stored, drawn out to 16 bits
        return values
    return pixel_array(path, index=frame, **told)


def _num_coded(file: BinaryIO) -> int:
    """Frames in compressed pixels, from where their offset table begins: its entries, else fragments that begin an
    image, as JPEG of any kind and RLE do; 0 where nothing tells.
    """
    from pydicom.encaps import parse_basic_offsets, parse_fragments

    if offsets := parse_basic_offsets(file):
        return len(offsets)
    heads = []
    for start in parse_fragments(file)[1]:
        file.seek(start + 8)
        heads.append(file.read(8))
    # RLE: the first segment lies behind a header of 64 bytes (PS3.5 G.5).
    return sum(head.startswith((b"\xff\xd8\xff", b"\xff\x4f\xff\x51")) or head[4:] == b"\x40\0\0\0" for head in heads)


class _Display:
    """What the header says of how one frame is to be shown: its own functional groups, the shared ones, the rest."""

    def __init__(self, reference: Reference, header: Any, frame: int) -> None:
        self.reference, self.header = reference, header
        own = header.get("PerFrameFunctionalGroupsSequence") or []
        groups = [*own[frame : frame + 1], *(header.get("SharedFunctionalGroupsSequence") or [])]
        names = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")
        self.places = [group[name][0] for group in groups for name in names if group.get(name)] + [header]
        self.is_ct = header.get("Modality") == "CT"
        self.warnings = self._warnings()

    def get(self, keyword: str) -> Any:
        """The value of an element in the first place that has one, else None."""
        return next((place[keyword].value for place in self.places if place.get(keyword) not in (None, "")), None)

    def numbers(self, keyword: str) -> list[float]:
        """All values of a numeric element."""
        value = self.get(keyword)
        try:
            return [] if value is None else [float(one) for one in (value if hasattr(value, "__iter__") else [value])]
        except ValueError:
            raise _undecodable(self.reference, f"{keyword} is no number") from None

    def colour(self, stored: Any) -> tuple[Any, dict[str, Any]]:
        """Colour of a palette or of three samples as uint8 (rows, columns, 3), and what was decided."""
        if "window" in self.reference.selector:
            raise self.reference.wrong("window", "none: this image has colours")
        kind = self.header.PhotometricInterpretation
        if kind == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut

            colours = ("Red", "Green", "Blue")
            for name in (f"{one}PaletteColorLookupTableDescriptor" for one in colours):
                if name not in self.header:
                    raise _undecodable(self.reference, f"its header lacks {name}")
            values, told = eight_bit_colours(apply_color_lut(stored, self.header)[..., :3])
            self.warnings += told
            return values, {"scale": "colours of its palette"}
        if kind not in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"):
            raise _undecodable(self.reference, "its kind of colour is not known here")
        bits = self.header.BitsStored
        if stored.dtype == np.uint16 and bits == 16 and (bits := bits_in_use(stored)) < 16:
            self.warnings.append(f"no colour is above {2**bits - 1}: taken as {bits} bits in words of 16")
        return stretched(stored, 0, 2**bits - 1), {"scale": f"0 to {2**bits - 1}"}

    def grey(self, stored: Any) -> tuple[Grey, dict[str, Any]]:
        """Grey as uint8 (rows, columns), and what was decided."""
        if stored.dtype.kind == "f" and finite_values(self.reference, stored).size < stored.size:
            self.warnings.append(UNDEFINED)
        rescale, to_values = self._modality()
        scale, to_grey = self._window(stored, to_values)
        inverted = (
            self.header.PhotometricInterpretation == "MONOCHROME1" or self.get("PresentationLUTShape") == "INVERSE"
        )

        def shown(values: Any) -> Grey:
            grey = to_grey(to_values(values))
            return 255 - grey if inverted else grey

        grey = by_table(stored, shown) if stored.dtype.kind in "iu" else shown(stored)
        if grey.min() == grey.max() and stored.min() != stored.max():
            self.warnings.append("all of it came out in one grey: choose another window")
        polarity = "inverted (MONOCHROME1 or INVERSE)" if inverted else "as stored"
        return grey, {"rescale": rescale, "window": scale, "polarity": polarity}

    def _modality(self) -> tuple[str, Callable[[Any], Values]]:
        """From stored values to the modality's own, such as Hounsfield units."""
        if lut := self.get("ModalityLUTSequence"):
            table, first, _ = _lookup_table(lut[0], self.header, self.header.get("PixelRepresentation") == 1)
            return "lookup table of the modality", lambda stored: _looked_up(stored, table, first)
        if not self.numbers("RescaleSlope") and not self.numbers("RescaleIntercept"):
            return "none", np.asarray
        slope, intercept = self._rescale
        unit = " (Hounsfield units)" if self.in_hounsfield else ""
        return f"slope {slope:g}, intercept {intercept:g}{unit}", lambda stored: stored * slope + intercept

    @property
    def _rescale(self) -> tuple[float, float]:
        """Slope and intercept, 1 and 0 where the file has none."""
        (slope, *_), (intercept, *_) = self.numbers("RescaleSlope") or [1.0], self.numbers("RescaleIntercept") or [0.0]
        return slope, intercept

    @property
    def in_hounsfield(self) -> bool:
        """Whether rescaled values are Hounsfield units: a CT that rescales and names no other unit."""
        rescaled = self.get("RescaleIntercept") is not None and not self.get("ModalityLUTSequence")
        return self.header.get("Modality") == "CT" and rescaled and self.get("RescaleType") in (None, "HU")

    def _window(self, stored: Any, to_values: Callable[[Any], Values]) -> tuple[str, Callable[[Values], Grey]]:
        """How the modality's values become grey: in words, and as a function of them."""
        if given := given_window(self.reference, numbered=True):
            center, width, words = given
            if self.reference.selector["window"] in CT_WINDOWS and not self.in_hounsfield:
                raise self.reference.wrong("window", "CENTRE,WIDTH, since these are not Hounsfield units of a CT")
            return words, lambda values: windowed(values, center, width)
        is_whole = stored.dtype.kind in "iu"
        ends = to_values(self._ends()) if is_whole else np.zeros(1)
        own = self._own_windows(is_signed=ends.min() < 0)
        if "window" in self.reference.selector and not own:
            raise self.reference.wrong(
                "window", "CENTRE,WIDTH, since the file has no window of its own that can be used"
            )
        if own:
            number = self.reference.whole("window", 1, 1, len(own))
            words, function = own[number - 1]
            return f"{words}, {number} of {len(own)} in the file", function
        bits = self.header.get("BitsStored")
        is_ready = self.header.get("PresentationIntentType") == "FOR PRESENTATION"
        if is_whole and not self.get("ModalityLUTSequence") and (is_ready or (bits <= 8 and self._rescale == (1, 0))):
            low, high = (float(value) for value in sorted(ends))
            return f"none in the file; all {bits} bits, {low:g} to {high:g}", lambda v: stretched(v, low, high)
        low, high, words = robust_range(finite_values(self.reference, to_values(self._without_padding(stored))))
        return f"none in the file; {words}", lambda values: stretched(values, low, high)

    def _ends(self) -> Values:
        """The smallest and the largest whole number that can be stored."""
        bits = self.header.BitsStored
        is_signed = self.header.get("PixelRepresentation") == 1
        return np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if is_signed else [0, 2**bits - 1])

    def _own_windows(self, *, is_signed: bool) -> list[tuple[str, Callable[[Values], Grey]]]:
        """The file's VOI LUTs, then its windows that can be computed; the others become a warning.

        Args:
            is_signed: whether values of the modality can be below 0.
        """
        windows: list[tuple[str, Callable[[Values], Grey]]] = []
        for item in self.get("VOILUTSequence") or []:
            table, first, bits = _lookup_table(item, self.header, is_signed)
            windows.append(("VOI LUT", partial(_through_voi_lut, table=table, first=first, bits=bits)))
        function = str(self.get("VOILUTFunction") or "LINEAR")
        for center, width in zip(self.numbers("WindowCenter"), self.numbers("WindowWidth"), strict=False):
            try:
                windowed(np.zeros(1), center, width, function)
            except ValueError as error:
                self.warnings.append(f"a window of the file was left out: {error}")
            else:
                words = f"centre {center:g}, width {width:g} ({function})"
                windows.append((words, partial(windowed, center=center, width=width, function=function)))
        return windows

    def _without_padding(self, stored: Any) -> Any:
        """Pixels that are none of the padding, or all where nothing is left."""
        ends = [*self.numbers("PixelPaddingValue"), *self.numbers("PixelPaddingRangeLimit")]
        if stored.dtype.kind in "iu":  # the elements may be written with another sign than the pixels have
            whole = 2**self.header.BitsAllocated
            lowest = whole // 2 if stored.dtype.kind == "i" else 0
            ends = [(end + lowest) % whole - lowest for end in ends]
        kept = stored[(stored < min(ends)) | (stored > max(ends))] if ends else stored
        return kept if kept.size else stored

    def square(self, image: Image.Image) -> tuple[Image.Image, dict[str, str]]:
        """The image with square pixels, and what was done."""
        for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
            if len(sides := self.numbers(keyword)) == 2 and all(side > 0 for side in sides):
                height, width = sides
                square = square_pixels(self.reference, image, height, width)
                if square.size == image.size:
                    break
                before, after = f"{image.width} x {image.height}", f"{square.width} x {square.height}"
                return square, {"aspect": f"pixels {height:g} high, {width:g} wide: {before} became {after}"}
        return image, {}

    def word(self, keyword: str) -> str | None:
        """A code of the standard's own kind, such as CT; None for anything else that may stand there."""
        value = str(self.header.get(keyword) or "")
        return value if re.fullmatch(r"[A-Z]{2,10}", value) else None

    def _warnings(self) -> list[str]:
        """Why a name may stand in the pixels."""
        modality, kind = self.header.get("Modality"), [str(one) for one in self.header.get("ImageType") or []]
        signs = []
        if modality in _BURNED_IN:
            signs.append(_BURNED_IN[modality])
        elif str(self.header.get("SOPClassUID")).startswith("1.2.840.10008.5.1.4.1.1.7"):
            signs.append("secondary capture")
        if self.header.get("BurnedInAnnotation") == "YES":
            signs.append("BurnedInAnnotation YES")
        signs += [word for word in ("DERIVED", "SECONDARY") if word in kind[:2]]
        if not signs:
            return []
        return [f"text may be burnt into the pixels ({', '.join(signs)}): look, and blacken it with redact="]


def _lookup_table(item: Any, header: Any, is_signed: bool) -> tuple[Values, int, int]:
    """Entries of a modality or VOI LUT, the value of the first, and bits an entry (PS3.3 C.11.1.1, C.11.2.1.1).

    Args:
        is_signed: whether values that are looked up can be below 0.
    """
    num_entries, first, bits = (int(value) for value in item.LUTDescriptor)
    num_entries = num_entries or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if header.file_meta.TransferSyntaxUID.is_little_endian else ">"
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * num_entries else f"{order}u2")
    table = np.atleast_1d(np.asarray(data, dtype=np.int64))[:num_entries]
    if len(table) < num_entries:
        raise AttributeError(f"of {num_entries} entries {len(table)} are there", name="LUTData")
    if is_signed and first >= 1 << 15:
        first -= 1 << 16  # signed, though the element may be read as unsigned
    return table, first, bits


def _looked_up(values: Values, table: Values, first: int) -> Values:
    """Entries for values; those before and after the table take its first and last."""
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]


def _through_voi_lut(values: Values, table: Values, first: int, bits: int) -> Grey:
    return stretched(_looked_up(values, table, first), 0, 2**bits - 1)
