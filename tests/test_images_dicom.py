"""DICOM: every file that pydicom carries, pixels by hand, any depth against the plain definition, identity."""

import io
import json
import logging
import math
import struct
import traceback
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from image_files import error_of, grey
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from medr1.data.images import Reading, expand_reference, group_of, kind_of, load_image, read_image
from medr1.data.images.display import by_table, windowed
from medr1.data.images.limits import MAX_PIXELS
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import load_vlm
from medr1.report.run import report_from_files

TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"


@pytest.fixture(autouse=True)
def _salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDR1_SALT", "salt")  # and nothing is written into the user's cache


def dicom(path: Path, pixels: np.ndarray, *, bits: int = 16, **elements: Any) -> Path:
    """A file with these pixels, (rows, columns) or (frames, rows, columns) or (rows, columns, 3), and elements."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = elements.pop("syntax", uid.ExplicitVRLittleEndian)
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.CTImageStorage, "1.2.3"
    dataset.Modality = "CT"
    colour = pixels.shape[-1] == 3
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    if pixels.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(pixels)
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def lut(entries: list[int], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "OW", struct.pack(f"<{len(entries)}H", *entries))
    return item


# ---- files that pydicom carries


IMAGES = {
    "693_J2KI": (512, 512),
    "CT_small": (128, 128),
    "ExplVR_BigEnd": (80, 60),
    "GDCMJ2K_TextGBR": (400, 400),
    "J2K_pixelrep_mismatch": (512, 512),
    "JPEG-lossy": (256, 1024),
    "JPEG2000": (256, 1024),
    "JPEGLSNearLossless_08": (10, 45),
    "JPEGLSNearLossless_16": (10, 50),
    "JPGExtended": (256, 1024),
    "examples_jpeg2k": (640, 480),
    "examples_overlay": (484, 300),
    "examples_palette": (800, 350),
    "examples_rgb_color": (320, 240),
    "examples_ybr_color": (320, 240),
    "image_dfl": (512, 512),
    "liver_1frame": (512, 512),
    "liver_expb_1frame": (512, 512),
    "SC_rgb_jpeg_dcmd": (256, 256),
    "SC_rgb_jpeg_app14_dcmd": (256, 256),
    "SC_jpeg_no_color_transform": (256, 256),
    "SC_jpeg_no_color_transform_2": (256, 256),
    "SC_rgb_small_odd": (3, 3),
    "SC_rgb_small_odd_big_endian": (3, 3),
    "SC_rgb_small_odd_jpeg": (3, 3),
    "SC_ybr_full_422_uncompressed": (100, 100),
}
NO_IMAGE = ("rtplan", "rtstruct", "reportsi", "test-SR", "waveform", "priv_SQ", "UN_sequence")
BROKEN = {
    "MR_truncated": "it is cut off",
    "JPEG2000-embedded-sequence-delimiter": "differ in size",  # its code stream says 3,722,445,056 columns
    "SC_rgb_jpeg": "its PixelData is not compressed",  # its length is defined
    "badVR": "NumberOfFrames is not one number",  # a number of frames that is none
    "nested_priv_SQ": "its header lacks Rows",
    "no_meta": "cannot identify image file",  # a stray byte before the first element
}


def test_every_file_of_pydicom_gives_an_image_or_one_clear_line() -> None:
    told = {}
    files = [path for path in sorted(TEST_FILES.rglob("*")) if path.is_file() and path.suffix != ".py"]
    for path in files:
        try:
            reading = read_image(path)
            told[path.relative_to(TEST_FILES).as_posix()] = reading.image.size
            assert json.loads(json.dumps(reading.decisions)) == reading.decisions
        except MedR1Error as error:
            assert "\n" not in str(error) and str(path) in str(error)
            told[path.relative_to(TEST_FILES).as_posix()] = str(error)
    assert len(files) > 150
    for name, size in IMAGES.items():
        assert told[f"{name}.dcm"] == size
    for name, answer in told.items():
        stem = name.rsplit("/")[-1].removesuffix(".dcm")
        if stem.startswith(("MR_small", "SC_rgb_rle", "SC_rgb_dcmtk", "rtdose")):
            assert answer == {"MR": (64, 64), "SC": (100, 100), "rt": (10, 10)}[stem[:2]], name
        elif stem.startswith("DICOMDIR"):
            assert "an index of other files" in str(answer)
        elif stem.startswith(NO_IMAGE):
            assert "holds no image" in str(answer) or "cannot identify" in str(answer), name
        elif stem in BROKEN:
            assert BROKEN[stem] in str(answer)


def test_the_same_picture_in_every_transfer_syntax() -> None:
    plain = grey(TEST_FILES / "MR_small.dcm")
    for name in ("bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded", "RLE"):
        assert (grey(TEST_FILES / f"MR_small_{name}.dcm") == plain).all(), name
    dose = grey(TEST_FILES / "rtdose_1frame.dcm")
    assert (dose == grey(TEST_FILES / "rtdose_expb_1frame.dcm")).all()
    assert (dose == grey(TEST_FILES / "rtdose_rle_1frame.dcm")).all()
    colour = np.asarray(load_image(TEST_FILES / "SC_rgb_rle.dcm"))
    for name in ("SC_rgb_rle_16bit", "SC_rgb_rle_32bit", "SC_rgb_jpeg_gdcm", "SC_rgb_rle_2frame"):
        other = np.asarray(load_image(TEST_FILES / f"{name}.dcm#frame=1"))
        assert (other == colour).all(), name
    for path in TEST_FILES.glob("SC_rgb_*dcmtk*.dcm"):  # lossy, one to a few grey levels off, chroma subsampled
        difference = np.abs(np.asarray(load_image(path)).astype(int) - colour)
        assert np.median(difference) <= 2, path.name


def test_stripes_of_pure_colour_come_out_as_they_went_in() -> None:
    # Rows of ten: red, green, blue, then their half, black, greys and white (pydicom's README says how it was made).
    expected = {5: (255, 0, 0), 15: (255, 128, 128), 25: (0, 255, 0), 35: (128, 255, 128), 45: (0, 0, 255)}
    expected |= {55: (128, 128, 255), 65: (0, 0, 0), 75: (64, 64, 64), 85: (192, 192, 192), 95: (255, 255, 255)}
    for name in ("SC_rgb_rle", "SC_ybr_full_422_uncompressed", "SC_rgb_dcmtk_+eb+cr", "SC_rgb_dcmtk_+eb+cy+np"):
        image = load_image(TEST_FILES / f"{name}.dcm")
        for row, colour in expected.items():
            found = image.getpixel((50, row))
            assert isinstance(found, tuple) and all(abs(a - b) <= 5 for a, b in zip(found, colour, strict=True)), name


def test_ct_small_in_hounsfield_units_by_hand() -> None:
    path = TEST_FILES / "CT_small.dcm"
    stored = pydicom.dcmread(path).pixel_array  # slope 1, intercept -1024, no window in the file
    places = ((0, 0), (100, 60), (70, 40), (40, 64))
    assert [int(stored[place]) - 1024 for place in places] == [-849, -21, 31, 255]
    soft = grey(f"{path}#window=soft")  # LINEAR: ((x - 49.5) / 399 + 0.5) * 255 = 82.44 and 115.68; edges -150, 249
    assert [int(soft[place]) for place in places] == [0, 82, 116, 255]
    lung = grey(f"{path}#window=lung")  # ((x + 600.5) / 1499 + 0.5) * 255 = 85.23, 226.08, 234.93; upper edge 149
    assert [int(lung[place]) for place in places] == [85, 226, 235, 255]
    assert read_image(f"{path}#window=soft").decisions["window"] == "soft: centre 50, width 400"


def test_mr_small_through_its_own_window_by_hand() -> None:
    stored = pydicom.dcmread(TEST_FILES / "MR_small.dcm").pixel_array  # centre 600, width 1600, no rescale
    places = ((0, 0), (31, 31), (40, 12))
    assert [int(stored[place]) for place in places] == [905, 206, 291]
    image = grey(TEST_FILES / "MR_small.dcm")  # ((x - 599.5) / 1599 + 0.5) * 255 = 176.22, 64.75, 78.30
    assert [int(image[place]) for place in places] == [176, 65, 78]


def test_12_bit_jpeg() -> None:
    reading = read_image(TEST_FILES / "JPGExtended.dcm#window=132,265")  # 0 to 264 with LINEAR: (x - 131.5) / 264 + 0.5
    assert np.asarray(reading.image).min() == 0 and np.asarray(reading.image).max() == 255
    lossy, other = (grey(TEST_FILES / f"{name}.dcm#window=132,265").astype(int) for name in ("JPGExtended", "JPEG2000"))
    assert np.corrcoef(lossy.ravel(), other.ravel())[0, 1] > 0.95  # two lossy codings of one picture


def test_12_bit_jpeg_of_signed_pixels(tmp_path: Path) -> None:
    """-1000 is coded as 4096 - 1000 = 3096."""
    import imagecodecs

    values = np.repeat([[-1000] * 8 + [1000] * 8], 16, 0).astype(np.int16)
    coded = imagecodecs.jpeg8_encode((values & 4095).astype(np.uint16), level=100, bitspersample=12)
    dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", values, bits=12))
    dataset.file_meta.TransferSyntaxUID = uid.JPEGExtended12Bit
    dataset.PixelData = encapsulate([coded])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm")
    shown = grey(f"{tmp_path / 'a.dcm'}#window=0,4000")  # ((x + 0.5) / 3999 + 0.5) * 255 = 63.8 and 191.3
    assert np.abs(shown.astype(int) - np.where(values < 0, 64, 191)).max() <= 1


# ---- synthetic files against the plain definition


def reference_grey(values: np.ndarray, function: str, center: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2 word by word, a pixel at a time, with output 0 to 255."""
    out = np.empty(values.shape)
    for place, x in np.ndenumerate(values.astype(np.float64)):
        if function == "SIGMOID":
            exponent = -4 * (x - center) / width
            out[place] = 0 if exponent > 700 else 255 / (1 + math.exp(exponent))
        elif function == "LINEAR":
            if x <= center - 0.5 - (width - 1) / 2:
                out[place] = 0
            elif x > center - 0.5 + (width - 1) / 2:
                out[place] = 255
            else:
                out[place] = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
        elif x <= center - width / 2:
            out[place] = 0
        elif x > center + width / 2:
            out[place] = 255
        else:
            out[place] = ((x - center) / width + 0.5) * 255
    return out


@settings(max_examples=150)
@given(data=st.data())
def test_any_depth_sign_window_and_polarity(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    allocated = data.draw(st.sampled_from([8, 16]))
    bits = data.draw(st.integers(2, allocated))
    signed = data.draw(st.booleans())
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    values = np.array(data.draw(st.lists(st.integers(low, high), min_size=12, max_size=12))).reshape(3, 4)
    stored = values.astype(f"{'i' if signed else 'u'}{allocated // 8}")
    # Bits above the stored ones may hold anything, such as an overlay.
    junk = data.draw(st.integers(0, (1 << allocated - bits) - 1)) << bits
    unsigned = stored.view(f"u{allocated // 8}")
    pixels = ((unsigned & ((1 << bits) - 1)) | junk).astype(unsigned.dtype).view(stored.dtype)
    slope = data.draw(st.sampled_from([None, 1.0, 0.5, 2.25, -1.0]))
    intercept = data.draw(st.sampled_from([0.0, -1024.0, 3.5]))
    function = data.draw(st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID"]))
    center = data.draw(st.integers(low, high)) + data.draw(st.sampled_from([0.0, 0.5]))
    width = data.draw(st.sampled_from([1, 2, 10, 400, 5000]))
    polarity = data.draw(st.sampled_from(["MONOCHROME1", "MONOCHROME2"]))
    shape = data.draw(st.sampled_from([None, "IDENTITY", "INVERSE"]))
    syntax = data.draw(st.sampled_from([uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian]))
    elements: dict[str, Any] = {"WindowCenter": center, "WindowWidth": width, "PhotometricInterpretation": polarity}
    elements |= {} if slope is None else {"RescaleSlope": slope, "RescaleIntercept": intercept}
    elements |= {} if function is None else {"VOILUTFunction": function}
    elements |= {} if shape is None else {"PresentationLUTShape": shape}
    path = dicom(tmp_path_factory.mktemp("any") / "a.dcm", pixels, bits=bits, syntax=syntax, **elements)

    rescaled = values if slope is None else values * slope + intercept
    expected = np.rint(reference_grey(rescaled, function or "LINEAR", center, width))
    if polarity == "MONOCHROME1" or shape == "INVERSE":
        expected = 255 - expected
    # Where rounding meets a half, one float operation more or less may decide.
    assert (np.abs(grey(path).astype(int) - expected) <= 1).all()
    assert (grey(path) == expected).mean() > 0.9 or len(set(values.ravel())) < 4


@given(
    st.sampled_from([np.int8, np.uint8, np.int16, np.uint16, np.int32]).flatmap(
        lambda kind: arrays(
            kind, (9, 90), elements=st.integers(np.iinfo(kind).min, np.iinfo(kind).max) | st.integers(0, 9)
        )
    )
)
def test_the_table_is_the_function(stored: np.ndarray) -> None:
    def function(values: np.ndarray) -> np.ndarray:
        return windowed(values * 1.5 - 3, 40, 400)

    assert (by_table(stored, function) == function(stored)).all()


def test_no_window_full_range_or_percentiles(tmp_path: Path) -> None:
    ramp = np.arange(1000, dtype=np.uint16).reshape(20, 50)
    ramp[0, 0] = 60000  # a hot pixel
    reading = read_image(dicom(tmp_path / "a.dcm", ramp))
    low, high = np.percentile(ramp, [0.5, 99.5])
    expected = np.rint(255 * np.clip((ramp - low) / (high - low), 0, 1))
    assert (np.asarray(reading.image)[..., 0] == expected).all()
    assert reading.decisions["window"] == f"none in the file; {low:g} to {high:g} (percentiles 0.5 and 99.5)"
    padded = ramp.copy()
    padded[10:] = 65535
    with_padding = read_image(dicom(tmp_path / "b.dcm", padded, PixelPaddingValue=65535))
    low, high = np.percentile(ramp[:10], [0.5, 99.5])
    assert f"{low:g} to {high:g} (percentiles" in with_padding.decisions["window"]  # of what is no padding
    # A mask: both percentiles are 0.
    mask = np.zeros((40, 40), dtype=np.uint16)
    mask[3, 4] = 7
    assert grey(dicom(tmp_path / "c.dcm", mask))[3, 4] == 255
    # 8 bits are shown as they are, and so is what is FOR PRESENTATION: 12 bits, v * 255 / 4095.
    eight = np.arange(100, 130, dtype=np.uint8).reshape(5, 6)
    assert (grey(dicom(tmp_path / "d.dcm", eight, bits=8)) == eight).all()
    twelve = np.array([[0, 1000, 2000, 4095]], dtype=np.uint16)
    ready = {"Modality": "MG", "PresentationIntentType": "FOR PRESENTATION", "PhotometricInterpretation": "MONOCHROME1"}
    path = dicom(tmp_path / "e.dcm", twelve, bits=12, **ready, PresentationLUTShape="INVERSE")
    assert grey(path).tolist() == [[255, 193, 130, 0]]  # 255 - (0, 62.27, 124.54, 255), inverted once, not twice


def test_a_rescale_that_changes_nothing_changes_nothing(tmp_path: Path) -> None:
    eight = np.arange(100, 130, dtype=np.uint8).reshape(5, 6)
    reading = read_image(dicom(tmp_path / "a.dcm", eight, bits=8, RescaleSlope=1, RescaleIntercept=0))
    assert (np.asarray(reading.image)[..., 0] == eight).all()
    assert reading.decisions["window"] == "none in the file; all 8 bits, 0 to 255"
    other = read_image(dicom(tmp_path / "b.dcm", eight, bits=8, RescaleSlope=2, RescaleIntercept=0))
    assert "percentiles" in other.decisions["window"]


@pytest.mark.parametrize(("kind", "code", "padding"), [("i2", "US", 63536), ("u2", "SS", -2000)])
def test_padding_has_the_sign_of_the_pixels(tmp_path: Path, kind: str, code: str, padding: int) -> None:
    """63536 and -2000 are the same 16 bits."""
    values = np.tile(np.arange(24, 64), (40, 1)).astype(np.int16)
    values[:20] = -2000
    path = dicom(tmp_path / "a.dcm", values.astype(kind))
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", code, padding)
    dataset.save_as(path)
    assert "; 24 to 63 (percentiles" in read_image(path).decisions["window"]


def test_a_table_that_begins_below_zero_though_no_pixel_does(tmp_path: Path) -> None:
    """Stored without a sign, in Hounsfield units by the intercept; in implicit VR the table's -1024 reads as 64512."""
    stored = np.array([[0, 1, 2, 3]], dtype=np.uint16)
    table = lut([0, 85, 170, 255], 0, 8)
    table.LUTDescriptor = [4, 64512, 8]
    for syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian):
        rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
        path = dicom(tmp_path / "a.dcm", stored, syntax=syntax, VOILUTSequence=Sequence([table]), **rescale)
        assert grey(path).tolist() == [[0, 85, 170, 255]]
    high = lut([0, 255], 40000, 8)  # values from 0 on, though stored ones have a sign: 40000 is meant
    lifted = {"RescaleSlope": 1, "RescaleIntercept": 32768, "VOILUTSequence": Sequence([high])}
    path = dicom(tmp_path / "b.dcm", np.array([[7231, 7233]], dtype=np.int16), **lifted)
    assert grey(path).tolist() == [[0, 255]]


def test_several_windows_and_luts(tmp_path: Path) -> None:
    values = np.array([[0, 100, 200, 300]], dtype=np.uint16)
    path = dicom(tmp_path / "a.dcm", values, WindowCenter=[100, 250], WindowWidth=[201, 101])
    assert grey(path).tolist() == [[1, 128, 255, 255]]  # (x - 99.5) / 200 + 0.5: 0.0025, 0.5025, 1.0025
    assert read_image(path).decisions["window"] == "centre 100, width 201 (LINEAR), 1 of 2 in the file"
    assert grey(f"{path}#window=2").tolist() == [[0, 0, 1, 255]]  # (x - 249.5) / 100 + 0.5: 0.005 at 200
    assert grey(f"{path}#window=150,300").tolist() == [[0, 85, 171, 255]]  # (x - 149.5) / 299 + 0.5
    assert "window is '3'; give a whole number from 1 to 2" in error_of(f"{path}#window=3")
    assert "lung, mediastinum" in error_of(f"{path}#window=lungs")
    assert "are not Hounsfield units of a CT" in error_of(f"{path}#window=lung")  # a CT without a rescale
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    assert read_image(f"{dicom(tmp_path / 'b.dcm', values, **rescale)}#window=bone").image
    for other in ({"Modality": "MR"}, {"RescaleType": "OD"}):
        assert "Hounsfield" in error_of(f"{dicom(tmp_path / 'c.dcm', values, **rescale, **other)}#window=bone")
    # A VOI LUT goes before windows; below and above it its first and last entry. 12 bits: v * 255 / 4095.
    voi = Sequence([lut([0, 1000, 4095], 99, 12)])
    path = dicom(tmp_path / "d.dcm", values, VOILUTSequence=voi, WindowCenter=100, WindowWidth=201)
    assert grey(path).tolist() == [[0, 62, 255, 255]]
    assert read_image(path).decisions["window"] == "VOI LUT, 1 of 2 in the file"
    assert grey(f"{path}#window=2").tolist() == [[1, 128, 255, 255]]
    # A modality LUT comes before the window: 0, 100, 200, 300 become 7, 7, 100, 5000.
    modality = Sequence([lut([7, 100, 5000], 199, 16)])
    path = dicom(tmp_path / "e.dcm", values, ModalityLUTSequence=modality, WindowCenter=100, WindowWidth=201)
    assert grey(path).tolist() == [[10, 10, 128, 255]]  # 7, 7, 100, 5000: (7 - 99.5) / 200 + 0.5 = 0.0375


def test_windows_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    values = np.arange(400, dtype=np.uint16).reshape(20, 20)
    reading = read_image(dicom(tmp_path / "a.dcm", values, WindowCenter=10, WindowWidth=0))
    assert reading.decisions["warnings"] == [
        "a window of the file was left out: the window's width is too small or no number"
    ]
    assert "percentiles" in reading.decisions["window"]
    strange = read_image(dicom(tmp_path / "b.dcm", values, WindowCenter=10, WindowWidth=5, VOILUTFunction="CUBIC"))
    assert strange.decisions["warnings"] == ["a window of the file was left out: the window's function is unknown"]
    beside = read_image(dicom(tmp_path / "c.dcm", values, WindowCenter=9000, WindowWidth=5))
    assert beside.decisions["warnings"] == ["all of it came out in one grey: choose another window"]


def test_palette_and_other_colours(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, entries in {"Red": [0, 255, 0, 10], "Green": [0, 0, 255, 20], "Blue": [0, 0, 0, 30]}.items():
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = struct.pack("<4H", *(entry << 8 for entry in entries))
    expected = [[[0, 0, 0], [255, 0, 0], [0, 255, 0], [10, 20, 30]]]
    path = dicom(tmp_path / "a.dcm", indices, bits=8, **palette)
    assert np.asarray(load_image(path)).tolist() == expected
    assert "this image has colours" in error_of(f"{path}#window=40,400")
    for colour, entries in {"Red": [0, 255, 0, 10], "Green": [0, 0, 255, 20], "Blue": [0, 0, 0, 30]}.items():
        palette[f"{colour}PaletteColorLookupTableData"] = struct.pack("<4H", *entries)  # 8 bits in 16, a common fault
    assert np.asarray(load_image(dicom(tmp_path / "b.dcm", indices, bits=8, **palette))).tolist() == expected
    # YBR_FULL, PS3.3 C.7.6.3.1.2: (76, 85, 255) is red up to rounding.
    ybr = np.array([[[76, 85, 255], [0, 128, 128], [255, 128, 128]]], dtype=np.uint8)
    red, black, white = np.asarray(
        load_image(dicom(tmp_path / "c.dcm", ybr, bits=8, PhotometricInterpretation="YBR_FULL"))
    )[0]
    assert (np.abs(red.astype(int) - [255, 0, 0]) <= 2).all() and not black.any() and (white == 255).all()
    deep = np.array([[[0, 32768, 65535]]], dtype=np.uint16)
    assert np.asarray(load_image(dicom(tmp_path / "d.dcm", deep))).tolist() == [[[0, 128, 255]]]
    assert "kind of colour" in error_of(dicom(tmp_path / "e.dcm", ybr, bits=8, PhotometricInterpretation="HSV"))


def test_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.stack([np.full((4, 5), 10 * number, dtype=np.uint8) for number in range(9)])
    path = dicom(tmp_path / "a.dcm", frames, bits=8)
    reading = read_image(path)
    assert reading.decisions["frame"] == "5 of 9" and reading.image.getpixel((0, 0)) == (40, 40, 40)
    assert load_image(f"{path}#frame=9").getpixel((0, 0)) == (80, 80, 80)
    assert "frame is '10'; give a whole number from 1 to 9" in error_of(f"{path}#frame=10")
    assert [one.name for one in expand_reference(f"{path}#frames=3")] == [f"a.dcm#frame={k}" for k in (2, 5, 8)]
    # Only that frame's pixels are read, of 200 MB here.
    large = tmp_path / "b.dcm"
    dicom(large, frames[:1].repeat(1, 0), bits=8, NumberOfFrames=10_000_000)
    content = large.read_bytes()
    with large.open("wb") as file:  # a sparse file
        file.write(content[:-20])
        file.truncate(len(content) - 20 + 200_000_000)
        file.seek(-20 * 5_000_000 + file.seek(0, io.SEEK_END) // 1)
        file.write(b"\x07" * 20)
    length = content.index(b"\xe0\x7f\x10\x00OB") + 8
    with large.open("r+b") as file:
        file.seek(length)
        file.write(struct.pack("<I", 200_000_000))
    tracemalloc.start()
    assert grey(large).tolist() == [[7] * 5] * 4
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_functional_groups_of_an_enhanced_file(tmp_path: Path) -> None:
    def group(name: str, **elements: Any) -> Dataset:
        inner, outer = Dataset(), Dataset()
        for keyword, value in elements.items():
            setattr(inner, keyword, value)
        setattr(outer, name, Sequence([inner]))
        return outer

    frames = np.full((3, 2, 2), 100, dtype=np.uint16)
    frames[:, 0, 0] = 0
    own = [group("FrameVOILUTSequence", WindowCenter=center, WindowWidth=401) for center in (200, 400, 300)]
    shared = group("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=100, RescaleType="HU")
    path = dicom(
        tmp_path / "a.dcm",
        frames,
        PerFrameFunctionalGroupsSequence=Sequence(own),
        SharedFunctionalGroupsSequence=Sequence([shared]),
    )
    # 0 and 100 rescaled are 100 and 300; (x - 199.5) / 400 + 0.5 = 0.25125 and 0.75125.
    assert grey(f"{path}#frame=1").tolist() == [[64, 192], [192, 192]]
    assert grey(f"{path}#frame=2").tolist() == [[0, 64], [64, 64]]  # of centre 400: -0.24875 and 0.25125
    assert read_image(path).decisions["window"].startswith("centre 400")
    assert read_image(path).decisions["rescale"] == "slope 2, intercept 100 (Hounsfield units)"


def test_pixels_become_square(tmp_path: Path) -> None:
    values = np.tile(np.arange(10, dtype=np.uint8) * 20, (6, 1))
    reading = read_image(dicom(tmp_path / "a.dcm", values, bits=8, PixelSpacing=[2.0, 1.0]))
    assert reading.image.size == (10, 12) and (np.asarray(reading.image)[:, :, 0] == values[:1]).all()
    assert reading.decisions["aspect"] == "pixels 2 high, 1 wide: 10 x 6 became 10 x 12"
    assert read_image(dicom(tmp_path / "b.dcm", values, bits=8, PixelAspectRatio=[1, 3])).image.size == (30, 6)
    assert read_image(dicom(tmp_path / "c.dcm", values, bits=8, PixelSpacing=[0.7, 0.7])).image.size == (10, 6)


def test_burnt_in_text_is_warned_of(tmp_path: Path) -> None:
    values = np.diag([200, 0]).astype(np.uint8)
    signs = {
        "ultrasound": {"Modality": "US"},
        "angiography": {"Modality": "XA"},
        "secondary capture": {"Modality": "OT", "SOPClassUID": uid.SecondaryCaptureImageStorage},
        "BurnedInAnnotation YES": {"BurnedInAnnotation": "YES"},
        "DERIVED, SECONDARY": {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]},
    }
    for sign, elements in signs.items():
        warning = read_image(dicom(tmp_path / "a.dcm", values, bits=8, **elements)).decisions["warnings"]
        assert len(warning) == 1 and f"({sign})" in warning[0]
    calm = dicom(tmp_path / "b.dcm", values, bits=8, ImageType=["ORIGINAL", "PRIMARY"], BurnedInAnnotation="NO")
    assert read_image(calm).decisions["warnings"] == []


# ---- bad files


def test_headers_that_lie(tmp_path: Path) -> None:
    values = np.zeros((8, 8), dtype=np.uint16)
    assert "above the limit" in error_of(dicom(tmp_path / "a.dcm", values, Rows=65535, Columns=65535))
    assert MAX_PIXELS < 65535 * 65535
    assert "cut off" in error_of(dicom(tmp_path / "b.dcm", values, Rows=4000))
    assert "cut off" in error_of(dicom(tmp_path / "c.dcm", values, NumberOfFrames=1_000_000))
    assert "highest is number 15" in error_of(dicom(tmp_path / "d.dcm", values, bits=12, HighBit=15))
    whole = dicom(tmp_path / "e.dcm", values).read_bytes()
    for length in (140, 200, len(whole) - 60):
        (tmp_path / "f.dcm").write_bytes(whole[:length])
        error_of(tmp_path / "f.dcm")


def test_colours_that_are_not_halved(tmp_path: Path) -> None:
    """YBR_FULL_422 has two colours for four samples of brightness: 4 x 4 pixels take 32 bytes and not 48."""
    colours = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for syntax in (uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian):
        path = dicom(tmp_path / "a.dcm", colours, bits=8, syntax=syntax, PhotometricInterpretation="YBR_FULL_422")
        assert "PixelData holds 48 bytes where its header tells of 32: its colours are whole" in error_of(path)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian])
def test_more_pixels_than_the_header_says_are_told(tmp_path: Path, syntax: str) -> None:
    frames = np.arange(100, 196, dtype=np.uint8).reshape(6, 4, 4)

    def told(pixels: np.ndarray, **elements: Any) -> list[str]:
        return read_image(dicom(tmp_path / "a.dcm", pixels, bits=8, syntax=syntax, **elements)).decisions["warnings"]

    longer = "PixelData is longer than its header says: {} bytes where its header tells of 16, so this may be wrong, or"
    assert told(frames) == []
    (warning,) = told(frames, NumberOfFrames=1)
    assert warning.startswith(longer.format(96))
    (warning,) = told(frames[0].astype(np.uint16), BitsAllocated=8)
    assert warning.startswith(longer.format(32))
    assert told(frames[0, :3, :1]) == []  # 3 bytes, padded to 4


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.RLELossless])
def test_more_compressed_frames_than_the_header_says_are_told(tmp_path: Path, syntax: str, with_table: bool) -> None:
    from PIL import Image

    frames = np.arange(4 * 256).reshape(4, 16, 16).astype(np.uint8)
    dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", frames, bits=8))
    if syntax == uid.RLELossless:
        dataset.compress(syntax)
        coded = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=4))
    else:
        files = [io.BytesIO() for _ in frames]
        kind, options = ("JPEG", {}) if syntax == uid.JPEGBaseline8Bit else ("JPEG2000", {"no_jp2": True})
        for frame, file in zip(frames, files, strict=True):
            Image.fromarray(frame).save(file, kind, **options)
        coded = [file.getvalue() for file in files]
    dataset.file_meta.TransferSyntaxUID = syntax
    for number, expected in ((4, []), (1, ["it holds more frames than its header says: 4 where that tells of 1"])):
        dataset.NumberOfFrames = number
        dataset.PixelData = encapsulate(coded, has_bot=with_table)
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(tmp_path / "a.dcm")
        assert read_image(f"{tmp_path / 'a.dcm'}#frame=1").decisions["warnings"] == expected
    dataset.PixelData = encapsulate(coded[:1], fragments_per_frame=3, has_bot=with_table)  # one frame in three parts
    dataset["PixelData"].is_undefined_length = True
    if syntax != uid.RLELossless:
        dataset.save_as(tmp_path / "a.dcm")
        assert read_image(tmp_path / "a.dcm").decisions["warnings"] == []


NATIVE = (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian)
TAKEN = {
    "SamplesPerPixel": (1, 3),
    "PhotometricInterpretation": ("MONOCHROME2", "RGB"),
    "BitsAllocated": (16, 8),
    "BitsStored": (16, 8),
    "PixelRepresentation": (0, 0),
    "PlanarConfiguration": (None, 0),
    "HighBit": (None, None),
}


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("is_colour", [False, True])
@pytest.mark.parametrize("is_empty", [False, True])
def test_what_the_header_lacks_is_taken_and_told(tmp_path: Path, syntax: str, is_colour: bool, is_empty: bool) -> None:
    grey_values, colours = np.arange(64, dtype=np.uint16).reshape(8, 8), np.arange(192, dtype=np.uint8)
    values = colours.reshape(8, 8, 3) if is_colour else grey_values
    whole = dicom(tmp_path / "a.dcm", values, bits=8 if is_colour else 16, syntax=syntax)
    expected = np.asarray(load_image(whole))

    def without(*keywords: str) -> Path:
        dataset = pydicom.dcmread(whole)
        for keyword in keywords:
            if keyword in dataset and is_empty:
                dataset[keyword].value = None
            elif keyword in dataset:
                delattr(dataset, keyword)
        dataset.save_as(tmp_path / "b.dcm")
        return tmp_path / "b.dcm"

    for keyword, taken in TAKEN.items():
        reading = read_image(without(keyword))
        assert (np.asarray(reading.image) == expected).all(), keyword
        told = taken[is_colour]
        assert reading.decisions["warnings"] == (
            [] if told is None else [f"its header lacks {keyword}: taken as {told}"]
        )
    for keyword, *others in (
        ["Rows"],
        ["Columns"],
        ["BitsAllocated", "BitsStored"],
        ["SamplesPerPixel", "PhotometricInterpretation"],
    ):
        assert f"its header lacks {keyword}" in error_of(without(keyword, *others))


def test_compressed_colours_of_an_unknown_kind_are_not_guessed(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(TEST_FILES / "SC_rgb_jpeg_dcmtk.dcm")
    expected = load_image(TEST_FILES / "SC_rgb_jpeg_dcmtk.dcm")
    del dataset.PlanarConfiguration, dataset.PixelRepresentation, dataset.BitsStored, dataset.SamplesPerPixel
    dataset.save_as(tmp_path / "a.dcm")
    assert (np.asarray(load_image(tmp_path / "a.dcm")) == np.asarray(expected)).all()
    dataset.SamplesPerPixel = 3
    del dataset.PhotometricInterpretation
    dataset.save_as(tmp_path / "a.dcm")
    assert "its header lacks PhotometricInterpretation" in error_of(tmp_path / "a.dcm")


def test_a_file_without_pixels_is_called_that(tmp_path: Path) -> None:
    whole = dicom(tmp_path / "a.dcm", np.zeros((8, 8), dtype=np.uint16))
    dataset = pydicom.dcmread(whole)
    dataset.PixelData = b""
    dataset.save_as(tmp_path / "b.dcm")
    assert "PixelData is empty" in error_of(tmp_path / "b.dcm")
    dataset.PixelData = b"\0" * 10
    dataset.add_new(0xFFFCFFFC, "OB", b"\0" * 300)  # padding after it: the file is long enough
    dataset.save_as(tmp_path / "b.dcm")
    assert "PixelData holds 10 bytes where its header tells of 128" in error_of(tmp_path / "b.dcm")
    for syntax in NATIVE:
        dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", np.zeros((8, 8), dtype=np.uint16), syntax=syntax))
        del dataset.PixelData
        dataset.save_as(tmp_path / "c.dcm")
        told = error_of(tmp_path / "c.dcm")
        assert "a header alone, no PixelData (CT Image Storage)" in told and "cut off" not in told
        del dataset.Rows
        dataset.SOPClassUID = uid.BasicTextSRStorage
        dataset.save_as(tmp_path / "c.dcm")
        assert "holds no image, for it has no PixelData (Basic Text SR Storage)" in error_of(tmp_path / "c.dcm")


@pytest.mark.parametrize(
    ("keyword", "kind", "value"),
    [
        ("NumberOfFrames", "IS", "many"),
        ("NumberOfFrames", "IS", "1.5"),
        ("NumberOfFrames", "IS", "-3"),
        ("SamplesPerPixel", "US", 2),
        ("BitsAllocated", "US", 12),
        ("BitsStored", "US", 20),
        ("PixelRepresentation", "US", 7),
        ("PhotometricInterpretation", "CS", "ODD"),
        ("Rows", "US", 0),
        ("WindowCenter", "DS", "middle"),
        ("RescaleSlope", "DS", "steep"),
        ("PixelSpacing", "DS", "wide"),
    ],
)
def test_an_impossible_element_is_named(tmp_path: Path, keyword: str, kind: str, value: Any) -> None:
    path = dicom(tmp_path / "a.dcm", np.arange(64, dtype=np.uint16).reshape(8, 8), WindowWidth=5)
    dataset = pydicom.dcmread(path)
    if keyword == "BitsStored":
        del dataset.HighBit
    dataset[keyword] = pydicom.DataElement(keyword, "US" if kind == "US" else "LO", value)
    dataset.save_as(path, implicit_vr=False, little_endian=True)
    if kind != "US":
        content, at = path.read_bytes(), struct.pack("<HH", dataset[keyword].tag.group, dataset[keyword].tag.element)
        path.write_bytes(content.replace(at + b"LO", at + kind.encode(), 1))
    told = error_of(path)
    assert (keyword if keyword != "SamplesPerPixel" else "header tells of") in told
    assert "Error" not in told


@pytest.mark.parametrize("blank", [np.nan, np.inf])
@pytest.mark.parametrize(("keyword", "kind"), [("FloatPixelData", np.float32), ("DoubleFloatPixelData", np.float64)])
def test_float_pixels_that_are_no_numbers(tmp_path: Path, keyword: str, kind: type, blank: float) -> None:
    """Some are told, through a window too; nothing else is one line."""
    values = np.linspace(0, 1, 64, dtype=kind).reshape(8, 8)
    path = dicom(tmp_path / "a.dcm", np.zeros((8, 8), dtype=np.uint16))
    dataset = pydicom.dcmread(path)
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    dataset.BitsAllocated = 8 * values.itemsize
    for number in (0, 1, 64):
        values.flat[:number] = blank
        setattr(dataset, keyword, values.tobytes())
        dataset.save_as(path)
        for reference in (path, f"{path}#window=5,10"):
            if number == 64:
                assert "a.dcm" in error_of(reference) and "every value is undefined" in error_of(reference)
            else:
                told = read_image(reference).decisions["warnings"]
                assert ("undefined or infinite values are black or white" in told) == bool(number), reference


def test_what_a_broken_element_is_called(tmp_path: Path) -> None:
    """The element and not a kind of error of Python's."""
    whole = dicom(tmp_path / "a.dcm", np.arange(64, dtype=np.uint8).reshape(8, 8), bits=8)
    dataset = pydicom.dcmread(whole)
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    dataset.save_as(tmp_path / "b.dcm")
    assert "its header lacks RedPaletteColorLookupTableDescriptor" in error_of(tmp_path / "b.dcm")
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [64, 0, 16])
    table.add_new("LUTData", "US", [1, 2, 3])
    dataset = pydicom.dcmread(whole)
    dataset.VOILUTSequence = [table]
    dataset.save_as(tmp_path / "c.dcm")
    assert "LUTData is missing or has a value that it cannot have" in error_of(tmp_path / "c.dcm")
    content = whole.read_bytes()
    (tmp_path / "d.dcm").write_bytes(content[: content.index(b"\x28\x00\x10\x00")])  # within the header of an image
    assert "no PixelData (CT Image Storage); fetch it again" in error_of(tmp_path / "d.dcm")


def test_a_palette_of_12_bits_in_entries_of_16(tmp_path: Path) -> None:
    tables = {f"{name}PaletteColorLookupTableDescriptor": [4, 0, 16] for name in ("Red", "Green", "Blue")}
    for entries, shown, warned in (([0, 1000, 2000, 4080], 255, True), ([0, 257, 514, 3855], 15, False)):
        data = np.array(entries, "<u2").tobytes()
        tables |= {f"{name}PaletteColorLookupTableData": data for name in ("Red", "Green", "Blue")}
        stored = np.array([[0, 1, 2, 3]], dtype=np.uint8)
        reading = read_image(
            dicom(tmp_path / "a.dcm", stored, bits=8, PhotometricInterpretation="PALETTE COLOR", **tables)
        )
        assert reading.image.getpixel((3, 0)) == (shown,) * 3
        assert ("taken as 12 bits" in str(reading.decisions["warnings"])) == warned


def test_12_bits_that_the_header_calls_16(tmp_path: Path) -> None:
    """As colours they are taken for what they are; as grey values for display they are nearly black, and told."""
    colours = np.array([[[0, 2048, 4095], [4095, 0, 0]]], dtype=np.uint16)
    reading = read_image(dicom(tmp_path / "a.dcm", colours))
    assert np.asarray(reading.image).tolist() == [[[0, 128, 255], [255, 0, 0]]]
    assert reading.decisions["warnings"] == ["no colour is above 4095: taken as 12 bits in words of 16"]
    values = np.array([[0, 4095]], dtype=np.uint16)
    ready = {"PresentationIntentType": "FOR PRESENTATION"}
    table = {"VOILUTSequence": Sequence([lut([0, 4095], 4094, 16)])}
    for elements in (ready, table):  # 4095 / 65535 * 255 = 15.93
        (told,) = read_image(dicom(tmp_path / "b.dcm", values, **elements)).decisions["warnings"]
        assert told == "nearly black: nothing in it is brighter than 16 of 255"
        inverted = dicom(tmp_path / "c.dcm", values, PhotometricInterpretation="MONOCHROME1", **elements)
        (told,) = read_image(inverted).decisions["warnings"]
        assert told == "nearly white: nothing in it is darker than 239 of 255"


def test_compressed_pixels_that_lie_about_their_size(tmp_path: Path) -> None:
    from PIL import Image

    values = np.zeros((16, 16), dtype=np.uint8)
    for kind, syntax in (("JPEG", uid.JPEGBaseline8Bit), ("JPEG2000", uid.JPEG2000Lossless)):
        file = io.BytesIO()
        Image.new("L", (400, 300)).save(file, kind, **({"no_jp2": True} if kind == "JPEG2000" else {}))
        for size, says in (((16, 16), "differ in size"), ((300, 400), None)):
            path = dicom(tmp_path / "a.dcm", values, bits=8)
            dataset = pydicom.dcmread(path)
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.Rows, dataset.Columns = size
            dataset.PixelData = encapsulate([file.getvalue()])
            dataset["PixelData"].is_undefined_length = True
            dataset.save_as(path)
            if says:
                assert says in error_of(path)
            else:
                assert load_image(path).size == (400, 300)


def test_a_deflated_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = TEST_FILES / "image_dfl.dcm"
    assert load_image(path).size == (512, 512)
    monkeypatch.setattr("medr1.data.images.dicom.MAX_BYTES", 100_000)  # its 262,144 pixels are more
    assert "inflates to more than" in error_of(path)
    assert "medr1" not in traceback.format_exc()


def test_transfer_syntaxes_that_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((4, 4), dtype=np.uint8)
    path = dicom(tmp_path / "a.dcm", values, bits=8)
    for syntax, says in ((uid.MPEG2MPML, "MPEG2 Main Profile"), ("1.2.3.4.5.6", "an unknown transfer syntax")):
        dataset = pydicom.dcmread(path)
        dataset.PixelData = encapsulate([b"\0" * 16])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / "b.dcm", implicit_vr=False, little_endian=True)
        assert says in error_of(tmp_path / "b.dcm") and "does not read; convert it" in error_of(tmp_path / "b.dcm")
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", property(lambda self: False))
    message = error_of(TEST_FILES / "MR_small_jp2klossless.dcm")
    assert "JPEG 2000 Image Compression (Lossless Only), which needs a decoder; pip install 'medr1[images]'" in message


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    assert error_of(TEST_FILES / "MR_small.dcm").endswith("needs pydicom; pip install 'medr1[images]'")


@settings(max_examples=150)
@given(
    place=st.integers(0, 1700), value=st.integers(0, 255), name=st.sampled_from(["MR_small", "SC_rgb_rle", "JPEG2000"])
)
def test_a_changed_byte_gives_an_image_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, name: str
) -> None:
    content = bytearray((TEST_FILES / f"{name}.dcm").read_bytes())
    content[place % len(content)] = value
    path = tmp_path_factory.mktemp("fuzz") / "a.dcm"
    path.write_bytes(content)
    try:
        assert read_image(path).image.mode == "RGB"
    except MedR1Error as error:
        assert "\n" not in str(error)


# ---- identity


MARK = "ZZMARKER"


def marked(path: Path, **elements: Any) -> Path:
    """A readable image whose every other element, of every text kind, private ones and sequences too, is a marker."""
    dicom(path, np.arange(64, dtype=np.uint16).reshape(8, 8), RescaleSlope=1, RescaleIntercept=-1024)
    dataset = pydicom.dcmread(path)
    text = {"PN": f"{MARK}^A", "LO": MARK, "SH": MARK, "ST": MARK, "LT": MARK, "UT": MARK, "UC": MARK, "AE": MARK}
    text |= {"CS": MARK, "UI": "1.2.826.77777", "DA": "19777777", "TM": "070707.777777", "DT": "19777777070707"}
    text |= {"AS": "077Y", "UR": f"http://{MARK}"}
    seen = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tag, (kind, _, _, retired, keyword) in pydicom.datadict.DicomDictionary.items():
            shown = (
                keyword in pydicom.dataset.Dataset() or tag in dataset or tag >> 16 in (0, 2, 0x0028, 0x7FE0, 0x5400)
            )
            if kind in text and not retired and not shown and keyword not in ("PresentationLUTShape", "Modality"):
                dataset.add_new(tag, kind, text[kind])
                seen += 1
        block = dataset.private_block(0x0041, MARK, create=True)
        block.add_new(0x01, "LO", MARK)
        item = Dataset()
        item.PatientName = f"{MARK}^B"
        block.add_new(0x02, "SQ", Sequence([item]))
        dataset.RequestAttributesSequence = Sequence([item])
        dataset.WindowCenterWidthExplanation = MARK
        dataset.LossyImageCompressionMethod = MARK
        dataset.RescaleType = MARK
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path, enforce_file_format=True)
    assert seen > 700
    assert path.read_bytes().count(MARK.encode()) > 400
    return path


SPOILT: list[dict[str, Any]] = [
    {},
    {"Rows": 7000},
    {"PhotometricInterpretation": MARK},
    {"VOILUTFunction": MARK, "WindowCenter": 5, "WindowWidth": 9},
    {"PresentationLUTShape": MARK, "PresentationIntentType": MARK, "BurnedInAnnotation": MARK},
    {"Modality": f"{MARK} 1"},
    {"ImageType": [MARK, MARK]},
    {"BitsStored": 99},
    {"SamplesPerPixel": 3},
]


@pytest.mark.parametrize("elements", SPOILT)
def test_identity_never_leaks(
    elements: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = marked(tmp_path / "a.dcm", **elements)
    capfd.readouterr()  # pydicom told while it wrote
    caplog.clear()
    everything = [_all_that_is_told(path, caplog), _all_that_is_told(f"{path}#window=9", caplog)]
    content = path.read_bytes()
    for length in (len(content) // 2, len(content) - 40):
        (tmp_path / "b.dcm").write_bytes(content[:length])
        everything.append(_all_that_is_told(tmp_path / "b.dcm", caplog))
    captured = capfd.readouterr()
    everything += [captured.out, captured.err, caplog.text]
    for told in everything:
        for mark in (MARK, "77777", "070707", "077Y"):
            assert mark not in told


@pytest.mark.parametrize(
    "keyword", ["RescaleSlope", "WindowCenter", "PixelSpacing", "NumberOfFrames", "PixelAspectRatio"]
)
def test_identity_in_place_of_a_number_never_leaks(
    keyword: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = dicom(tmp_path / "a.dcm", np.zeros((8, 8), dtype=np.uint16), **{keyword: "1234567" + "8"})
    path.write_bytes(path.read_bytes().replace(b"12345678", MARK.encode()))
    assert MARK not in _all_that_is_told(path, caplog)
    assert MARK not in str(capfd.readouterr()) + caplog.text


def _all_that_is_told(reference: Path | str, caplog: pytest.LogCaptureFixture) -> str:
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = []
        try:
            reading: Reading = read_image(reference)
            told += [repr(reading.decisions), repr(reading), repr(reading.image.info)]
        except MedR1Error as error:
            told += ["".join(traceback.format_exception(error)), repr(error)]
        try:
            told += [group_of(reference)]
        except MedR1Error as error:
            told += ["".join(traceback.format_exception(error))]
    return " ".join([*told, *(str(warning.message) for warning in caught)])


def test_identity_reaches_neither_prompt_nor_rows_nor_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = marked(tmp_path / "a.dcm")
    records = [
        Record(
            id=f"r{number}",
            images=(path,),
            question="Which modality?",
            options=("CT", "MRI"),
            answer="A",
            modality="CT",
            question_type="Modality Recognition",
            source="s",
            group=group_of(path),
        )
        for number in range(2)
    ]
    capfd.readouterr()
    caplog.clear()
    vlm = load_vlm("tiny")
    for name in ("base", "trained"):
        evaluate(vlm, records, mode="no-think", out=tmp_path / f"{name}.jsonl", max_new_tokens=8)
    report_from_files(
        tmp_path / "base.jsonl", tmp_path / "trained.jsonl", run=None, controls=[], out=tmp_path / "r.html"
    )
    told = str(capfd.readouterr()) + caplog.text
    for file in ("base.jsonl", "trained.jsonl", "r.html"):
        told += (tmp_path / file).read_text()
    assert "patient-" in told and "data:image/webp" in told
    assert MARK not in told and "19777777" not in told


def test_groups_by_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((2, 2), dtype=np.uint8)
    patients = ["P1", "P1", "P2", "", ""]
    studies = ["1.2.1", "1.2.2", "1.2.3", "1.2.4", ""]
    paths = [
        dicom(tmp_path / f"{number}.dcm", values, bits=8, PatientID=patient, StudyInstanceUID=study)
        for number, (patient, study) in enumerate(zip(patients, studies, strict=True))
    ]
    groups = [group_of(path) for path in paths]
    assert groups[0] == group_of(f"{paths[0]}#frame=1") == groups[1]
    assert [group.split("-")[0] for group in groups] == ["patient", "patient", "patient", "study", "file"]
    assert len(set(groups)) == 4
    assert groups[0] == "patient-" + __import__("hmac").new(b"salt", b"P1", "sha256").hexdigest()[:16]
    monkeypatch.setenv("MEDR1_SALT", "pepper")
    assert group_of(paths[0]) != groups[0]


def test_content_decides(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((TEST_FILES / "MR_small.dcm").read_bytes())
    assert read_image(tmp_path / "a.png").decisions["kind"] == "DICOM"
    bare = (TEST_FILES / "CT_small.dcm").read_bytes()[132:]
    length = struct.unpack("<I", bare[8:12])[0]
    (tmp_path / "b").write_bytes(bare[12 + length :])  # neither preamble nor file meta information
    assert kind_of(tmp_path / "b") == "dicom"
    assert (grey(tmp_path / "b") == grey(TEST_FILES / "CT_small.dcm")).all()
    (tmp_path / "c.dcm").write_bytes(zlib.compress(b"no DICOM"))
    assert "cannot identify image file" in error_of(tmp_path / "c.dcm")
    assert (TEST_FILES / "CT_small.dcm").read_bytes()[:4] == b"II*\0"  # DICOM whose preamble is a TIFF header
    assert kind_of(TEST_FILES / "CT_small.dcm") == "dicom"
