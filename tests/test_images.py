"""Every pixel format to RGB with known values, and every broken file to one line."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medr1.data.images import MAX_PIXELS, load_image
from medr1.errors import MedR1Error


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif", "webp"])
def test_common_formats(tmp_path: Path, suffix: str) -> None:
    values = pixels(
        saved(
            Image.new("RGB", (5, 3), (255, 0, 0)),
            tmp_path / f"a.{suffix}",
            **({"lossless": True} if suffix == "webp" else {}),
        )
    )
    assert values.shape == (3, 5, 3)
    assert (values == [255, 0, 0]).all()


def test_the_name_does_not_matter_but_the_content(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (4, 4), "blue"), tmp_path / "a.png")
    path.rename(tmp_path / "A.JPG")
    assert (pixels(tmp_path / "A.JPG") == [0, 0, 255]).all()


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (200, 0, 0, 128)])
    # The third: 200 * 128/255 + 255 * 127/255 = 227.4 and 255 * 127/255 = 127.
    assert pixels(saved(image, tmp_path / "a.png")).tolist() == [[[255] * 3, [0] * 3, [227, 127, 127]]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pixels(saved(grey, tmp_path / "b.png")).tolist() == [[[255] * 3]]


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert pixels(saved(image, tmp_path / "a.png")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(saved(image, tmp_path / "b.png", transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]


def test_cmyk_and_grey(tmp_path: Path) -> None:
    red = pixels(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100))
    assert (abs(red.astype(int) - [255, 0, 0]) < 6).all()
    assert pixels(saved(Image.new("L", (1, 1), 77), tmp_path / "b.png")).tolist() == [[[77] * 3]]
    assert pixels(saved(Image.new("1", (1, 1), 1), tmp_path / "c.png")).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[1000, 2000, 3000, 6100]], dtype=np.uint16)  # clipped, all would be 255
    # (v - 1000) * 255 / 5100
    expected = [[[0] * 3, [50] * 3, [100] * 3, [255] * 3]]
    assert pixels(saved(Image.fromarray(values), tmp_path / f"a.{suffix}")).tolist() == expected


def test_other_number_types(tmp_path: Path) -> None:
    signed = Image.fromarray(np.array([[-1000, 0, 1000]], dtype=np.int32))
    assert pixels(saved(signed, tmp_path / "a.tif")).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert pixels(saved(floats, tmp_path / "b.tif")).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    constant = Image.fromarray(np.full((2, 2), 500, dtype=np.uint16))
    assert (pixels(saved(constant, tmp_path / "c.png")) == 0).all()


def test_exif_turns_the_image_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert load_image(saved(image, tmp_path / "a.jpg", exif=exif)).size == (2, 4)


def error_of(path: Path) -> str:
    with pytest.raises(MedR1Error) as error:
        load_image(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_broken_files(tmp_path: Path) -> None:
    assert "no such image file" in error_of(tmp_path / "a.png")
    assert "holds no DICOM image" in error_of(tmp_path)
    for content, remedy in {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n": "pointer of Git LFS and not the image",
        b"\n<!DOCTYPE html><html>404</html>": "a page or drawing in HTML",
        b"\x1f\x8b\x08" + bytes(20): "packed by gzip); unpack it",
        b"PK\3\4" + bytes(20): "a zip archive); unpack it",
        b"%PDF-1.7": "a PDF); save the picture",
        b"\0\0\0\x18ftypheic" + bytes(20): "convert it to PNG",
        b"NRRD0004\n": "convert it to NIfTI",
        b'{"error": "x"}': "(cannot identify image file); fetch it again",
    }.items():
        (tmp_path / "a.jpg").write_bytes(content)
        told = error_of(tmp_path / "a.jpg")
        assert remedy in told and told.count("a.jpg") == 1
    path = tmp_path / "b.png"
    path.write_bytes(b"")
    assert "is empty" in error_of(path)
    path.write_bytes(b"this is text")
    assert "cannot be decoded" in error_of(path)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Pillow would start Ghostscript
    assert "cannot be decoded" in error_of(path)
    os.mkfifo(tmp_path / "fifo.png")
    assert "no such image file" in error_of(tmp_path / "fifo.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_cut_off_files(tmp_path: Path, suffix: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = saved(noise, tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be decoded" in error_of(path)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_000, 11_000, 60_000])  # above our limit, Pillow's warning, Pillow's limit
def test_decompression_bombs(tmp_path: Path, side: int) -> None:
    assert side * side > MAX_PIXELS
    path = tmp_path / "a.png"
    path.write_bytes(png_of_size(side, side))
    assert "pixels" in error_of(path)


@settings(max_examples=60)
@given(
    place=st.integers(0, 10_000),
    value=st.integers(0, 255),
    kind=st.sampled_from(["png", "jpg", "tif", "gif"]),
)
def test_a_changed_byte_gives_an_image_or_one_line(tmp_path_factory, place: int, value: int, kind: str) -> None:
    path = saved(Image.linear_gradient("L").resize((16, 16)), tmp_path_factory.mktemp("fuzz") / f"a.{kind}")
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    try:
        assert load_image(path).mode == "RGB"
    except MedR1Error as error:
        assert "\n" not in str(error)


def test_all_real_images(shared: Path) -> None:
    files = sorted((shared / "data" / "real" / "Images").rglob("*.*"))
    for file in files[::25]:
        assert max(load_image(file).size) <= 224
