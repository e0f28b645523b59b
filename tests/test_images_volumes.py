"""NIfTI slices the right way round, whole slides, TIFFs that Pillow refuses."""

import gzip
import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import skimage
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import error_of, grey
from PIL import Image

from medr1.data.images import expand_reference, group_of, load_image, read_image
from medr1.errors import MedR1Error

NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"
SKIMAGE = Path(skimage.__file__).parent / "data"


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> Path:
    volume = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        volume.header[key] = value
    nibabel.save(volume, path)
    return path


# ---- NIfTI


def test_radiological_display(tmp_path: Path) -> None:
    values = np.zeros((5, 6, 7), dtype=np.uint8)  # RAS: x to the right, y to the front, z to the head
    values[4, 2, 3] = 100  # a mark on the patient's right
    values[2, 5, 3] = 150  # in front
    values[2, 2, 6] = 200  # at the top
    path = nifti(tmp_path / "a.nii", values)
    axial = grey(f"{path}#slice=4&window=128,256")  # 7 wide would not do: rows are y, columns x
    assert axial.shape == (6, 5)
    assert axial[3, 0] == 100 and axial[0, 2] == 149  # right at the left, front at the top
    coronal = grey(f"{path}#axis=coronal&slice=3&window=128,256")
    assert coronal.shape == (7, 5)
    assert coronal[3, 0] == 100 and coronal[0, 2] == 199  # (200 - 128) / 256 + 0.5 is 0.78125, times 255 is 199.2
    sagittal = grey(f"{path}#axis=sagittal&slice=3&window=128,256")
    assert sagittal.shape == (7, 6)
    assert sagittal[3, 0] == 149 and sagittal[0, 3] == 199  # nose to the left
    decisions = read_image(path).decisions
    assert decisions["slice"] == "axial 4 of 7" and decisions["kind"] == "NIfTI"


@settings(max_examples=40)
@given(data=st.data())
def test_any_orientation_shows_the_same_slice(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = (4, 5, 6)
    seed = data.draw(st.integers(0, 100))
    canonical = np.random.default_rng(seed).integers(-500, 500, shape).astype(np.int16)
    axes = data.draw(st.permutations([0, 1, 2]))
    flips = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    orientation = nibabel.orientations.axcodes2ornt(
        ["LPI"[axis] if flip else "RAS"[axis] for axis, flip in zip(axes, flips, strict=True)]
    )
    other = nibabel.Nifti1Image(canonical, np.diag([2, 2, 2, 1])).as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), orientation)
    )
    other.header.set_slope_inter(0.5, 10)
    folder = tmp_path_factory.mktemp("any")
    path = folder / data.draw(st.sampled_from(["a.nii", "a.nii.gz"]))
    nibabel.Nifti1Image(np.asarray(other.dataobj).astype(np.int16), other.affine).to_filename(path)
    axis = data.draw(st.sampled_from(["sagittal", "coronal", "axial"]))
    number = {"sagittal": 0, "coronal": 1, "axial": 2}[axis]
    place = data.draw(st.integers(1, shape[number]))
    whole = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()  # the plain way: all voxels, turned
    plane = np.flip(np.take(whole, place - 1, number)).T
    expected = np.rint(255 * np.clip(plane / 600 + 0.5, 0, 1))
    assert (grey(f"{path}#axis={axis}&slice={place}&window=0,600") == expected).all()
    assert (whole == canonical).all()


def test_scale_spacing_and_undefined_voxels(tmp_path: Path) -> None:
    values = np.zeros((4, 4, 3), dtype=np.float32)
    values[0, 0, 1], values[1, 1, 1], values[2, 2, 1] = np.nan, np.inf, 100
    reading = read_image(f"{nifti(tmp_path / 'a.nii', values)}#window=50,100")
    assert reading.decisions["warnings"] == ["undefined or infinite values are black or white"]
    assert np.asarray(reading.image)[::-1, ::-1, 0].diagonal().tolist() == [0, 255, 255, 0]
    spaced = nifti(tmp_path / "b.nii", np.ones((10, 20, 5), dtype=np.int16), np.diag([1.0, 1.0, 3.0, 1.0]))
    assert load_image(spaced).size == (10, 20)
    assert load_image(f"{spaced}#axis=coronal").size == (10, 15)
    assert load_image(f"{spaced}#axis=sagittal").size == (20, 15)
    scaled = nibabel.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    scaled.header.set_slope_inter(2, -7)  # a header as written: values on disk stay, 0..7 mean -7..7
    content = bytearray(scaled.to_bytes())
    struct.pack_into("<ff", content, 112, 2.0, -7.0)
    struct.pack_into("<8h", content, 352, *range(8))
    (tmp_path / "c.nii").write_bytes(content)
    # On disk x runs fastest; slice 2 holds 4 to 7, which mean 1, 3, 5, 7: v / 20 + 0.5, right to left, front to back.
    assert grey(f"{tmp_path / 'c.nii'}#slice=2&window=0,20").tolist() == [[217, 191], [166, 140]]


def test_the_affine_matrix_says_how_large_voxels_are(tmp_path: Path) -> None:
    """Not the pixdim beside it, which says nothing of which way the axes run."""
    stretched, square = np.diag([1.0, 3.0, 1.0, 1.0]), np.eye(4)
    for shape in ((10, 10, 4), (10, 10, 4, 2)):
        path = nifti(tmp_path / "a.nii", np.random.default_rng(0).integers(0, 99, shape).astype(np.int16), stretched)
        assert read_image(path).decisions["warnings"] == []
        content = bytearray(path.read_bytes())
        struct.pack_into("<3f", content, 80, 1, 1, 1)  # pixdim[1:4]
        path.write_bytes(content)
        reading = read_image(path)
        assert reading.image.size == (10, 30)
        assert reading.decisions["warnings"] == [
            "its affine matrix and its pixdim tell of voxels of different sides: the matrix is taken"
        ]
        struct.pack_into("<hh", content, 252, 0, 0)  # qform_code and sform_code: pixdim is all there is
        path.write_bytes(content)
        assert load_image(path).size == (10, 10)
    flat = nifti(tmp_path / "b.nii", np.arange(100, dtype=np.int16).reshape(10, 10), square)
    assert read_image(flat).decisions["warnings"] == []


def test_several_volumes_expansion_and_real_files() -> None:
    reading = read_image(NIBABEL / "functional.nii")
    assert reading.decisions["volume"] == "1 of 20" and reading.image.size == (17, 21)
    first = nibabel.as_closest_canonical(nibabel.load(NIBABEL / "functional.nii")).get_fdata()[:, :, 1, 0]
    low, high = np.percentile(first, [0.5, 99.5])
    assert (
        np.asarray(reading.image)[..., 0] == np.rint(255 * np.clip((np.flip(first).T - low) / (high - low), 0, 1))
    ).all()
    for name, size in {
        "anatomical.nii": (33, 41),
        "example4d.nii.gz": (128, 96),
        "example_nifti2.nii.gz": (32, 20),
        "reoriented_anat_moved.nii": (21, 26),
        "standard.nii.gz": (4, 15),  # 3 mm high, 1 mm wide
    }.items():
        assert load_image(NIBABEL / name).size == size
    names = [path.name for path in expand_reference(f"{NIBABEL / 'anatomical.nii'}#slices=4&axis=sagittal")]
    assert names == [f"anatomical.nii#axis=sagittal&slice={place}" for place in (5, 13, 21, 29)]  # of 33: 4.1, 12.4, …
    assert "0 of" not in str(expand_reference(f"{NIBABEL / 'anatomical.nii'}#slices=25"))
    with pytest.raises(MedR1Error, match="slices is '26'; give a whole number from 1 to 25"):
        expand_reference(f"{NIBABEL / 'anatomical.nii'}#slices=26")
    for selector, says in {
        "axis=top": "give sagittal, coronal, axial",
        "slice=0": "from 1 to 25",
        "window=2": "CENTRE,WIDTH",
        "window=5,0": "CENTRE,WIDTH",
        "frame=1": "use axis, slice, window, redact",
    }.items():
        assert says in error_of(f"{NIBABEL / 'anatomical.nii'}#{selector}")
    lung = read_image(f"{NIBABEL / 'anatomical.nii'}#window=lung").decisions
    assert "Hounsfield" in lung["warnings"][0] and lung["window"] == "lung: centre -600, width 1500"


def test_only_the_slice_is_read(tmp_path: Path) -> None:
    small = nifti(tmp_path / "a.nii", np.zeros((512, 512, 2), dtype=np.int16)).read_bytes()
    content = bytearray(small[:352])
    struct.pack_into("<h", content, 46, 400)  # dim[3]
    with (tmp_path / "a.nii").open("wb") as file:  # 210 MB, of which the disk holds nothing
        file.write(content)
        file.truncate(352 + 512 * 512 * 400 * 2)
        file.seek(352 + 512 * 512 * 299 * 2)
        file.write(b"\x07\x00" * 512 * 512)
    tracemalloc.start()
    assert (grey(f"{tmp_path / 'a.nii'}#slice=300&window=7,2") == 128).all()
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_bad_volumes(tmp_path: Path) -> None:
    assert "pair" in error_of(NIBABEL / "nifti1.hdr")
    assert "CIFTI" in error_of(NIBABEL / "row_major.dconn.nii")
    whole = (NIBABEL / "anatomical.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(whole[: len(whole) // 2])
    assert "cut off" in error_of(tmp_path / "a.nii")
    packed = gzip.compress(whole)
    (tmp_path / "b.nii.gz").write_bytes(packed[: len(packed) // 2])
    assert "cannot be read as NIfTI" in error_of(tmp_path / "b.nii.gz")
    thick = nifti(tmp_path / "g.nii", np.ones((9, 9, 9), dtype=np.int16), np.diag([1, 1e-9, 1, 1]))
    assert "mend the header" in error_of(thick)
    for shape in ((30000, 30000, 30000), (2, 2, 32767)):  # a bomb, and a file that only says that it is long
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.int16)
        header["dim"][:4] = [3, *shape]
        header["magic"], header["vox_offset"] = b"n+1", 352
        header["pixdim"][1:4] = 1
        for name in ("c.nii", "c.nii.gz"):
            content = header.binaryblock + b"\0" * 100
            (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
            assert ("above the limits" in error_of(tmp_path / name)) == (shape[0] == 30000)
    thin = nibabel.Nifti1Image(np.ones(9, dtype=np.int16), np.eye(4))
    nibabel.save(thin, tmp_path / "d.nii")
    assert "no picture: 9 values of type int16" in error_of(tmp_path / "d.nii")
    (tmp_path / "e.nii.gz").write_bytes(gzip.compress(b"no volume"))
    assert "cannot identify image file" in error_of(tmp_path / "e.nii.gz")
    unplaced = bytearray(nifti(tmp_path / "f.nii", np.arange(27, dtype=np.int16).reshape(3, 3, 3)).read_bytes())
    struct.pack_into("<hh", unplaced, 252, 0, 0)  # qform_code and sform_code
    (tmp_path / "f.nii").write_bytes(unplaced)
    assert "left and right may be exchanged" in read_image(tmp_path / "f.nii").decisions["warnings"][0]


@settings(max_examples=60)
@given(place=st.integers(0, 380), value=st.integers(0, 255))
def test_a_changed_byte_of_a_header(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    content = bytearray((NIBABEL / "anatomical.nii").read_bytes())
    content[place] = value
    path = tmp_path_factory.mktemp("fuzz") / "a.nii"
    path.write_bytes(content)
    try:
        assert read_image(path).image.mode == "RGB"
    except MedR1Error as error:
        assert "\n" not in str(error)


def test_a_flat_image_is_the_slice_that_it_is(shared: Path, tmp_path: Path) -> None:
    """Without a third axis, or with one that is a single layer thick, wherever that lies in space."""
    given = shared / "findings" / "inputs" / "two-dimensional.nii"
    assert read_image(given).image.size == nibabel.load(given).shape
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    flat = grey(f"{nifti(tmp_path / 'a.nii', values)}#window=0,510")
    assert flat.tolist() == grey(f"{nifti(tmp_path / 'b.nii', values[..., None])}#window=0,510").tolist()
    assert sorted(flat.flatten()) == [round(127.5 + value / 2) for value in range(12)]
    coronal = nifti(tmp_path / "c.nii", values[:, None])
    assert read_image(coronal).decisions["slice"] == "coronal 1 of 1" and load_image(coronal).size == (3, 4)
    upright = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # its second axis is up
    assert read_image(nifti(tmp_path / "d.nii", values, upright)).decisions["slice"] == "coronal 1 of 1"
    assert [path.name for path in expand_reference(f"{tmp_path / 'd.nii'}#slices=1")] == ["d.nii#slice=1"]
    deep = read_image(nifti(tmp_path / "e.nii", np.ones((3, 4, 5, 1, 3, 2), dtype=np.float32)))
    assert deep.decisions["volume"] == "1 of 6" and deep.decisions["warnings"] == ["all of it is one colour"]


def test_voxels_that_begin_inside_the_header(tmp_path: Path) -> None:
    """nibabel reads the header's bytes as voxels."""
    content = nifti(tmp_path / "a.nii", np.arange(1000, dtype=np.int16).reshape(10, 10, 10)).read_bytes()
    for start in (0, 100):
        (tmp_path / "b.nii").write_bytes(content[:108] + struct.pack("<f", start) + content[112:])
        told = error_of(tmp_path / "b.nii")
        assert "inside the header of 352: mend vox_offset" in told or "vox offset 100 too low" in told
    (tmp_path / "c.nii").write_bytes(content[:42] + struct.pack("<h", -10) + content[44:])
    assert "no picture: -10 x 10 x 10 values" in error_of(tmp_path / "c.nii")
    (tmp_path / "d.nii").write_bytes(content[:-1])
    assert "it is cut off: its header tells of more voxels" in error_of(tmp_path / "d.nii")


def test_coloured_and_complex_voxels(tmp_path: Path) -> None:
    for parts in ("RGB", "RGBA"):
        values = np.zeros((3, 2, 1), dtype=[(part, np.uint8) for part in parts])
        values["R"][2, 1], values["B"][0, 0] = 200, 90
        path = nifti(tmp_path / "a.nii", values)
        image = load_image(path)  # right at the left, front at the top
        assert image.getpixel((0, 0)) == (200, 0, 0) and image.getpixel((2, 1)) == (0, 0, 90)
        assert "none: this volume has colours" in error_of(f"{path}#window=5,5")
    path = nifti(tmp_path / "b.nii", np.array([[[3 + 4j]], [[0]]], dtype=np.complex64).reshape(2, 1, 1))
    assert grey(path).tolist() == [[0, 255]]
    assert read_image(path).decisions["values"] == "magnitude of complex values"


@pytest.mark.parametrize("blank", [np.nan, np.inf, -np.inf])
def test_a_slice_without_a_number_is_one_line(shared: Path, tmp_path: Path, blank: float) -> None:
    assert "every value is undefined" in error_of(shared / "findings" / "inputs" / "blank-slice.nii")
    values = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    values[:, :, 1] = blank
    path = nifti(tmp_path / "a.nii", values)
    with pytest.raises(MedR1Error, match=r"a\.nii#axis=axial&slice=2: every value is undefined or infinite"):
        load_image(path)
    with pytest.raises(MedR1Error, match="every value is undefined"):
        load_image(f"{path}#window=5,5")
    assert read_image(f"{path}#slice=1").decisions["warnings"] == []
    assert "undefined" in read_image(f"{path}#axis=coronal").decisions["warnings"][0]
    wide = nifti(tmp_path / "b.nii", np.array([-1.7e308, 0, 1.7e308]).reshape(3, 1, 1))  # its range is no float64
    assert grey(wide).tolist() == [[255, 128, 0]]


# ---- slides


def slide(path: Path, *, vendor: str = "Aperio Image Library v11\r\n4096x3072", side: int = 4096) -> np.ndarray:
    """A pyramid of three levels as a scanner writes it; level 0 has a red mark of 256 pixels at x = 1024, y = 512."""
    full = np.full((side * 3 // 4, side, 3), 230, dtype=np.uint8)
    full[512:768, 1024:1280] = (255, 0, 0)
    options: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "compression": "deflate", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(full, description=vendor, **options)
        for level in (1, 2):
            file.write(full[:: 4**level, :: 4**level], description=vendor, subfiletype=1, **options)
    return full


def test_overview_and_tiles_of_a_slide(tmp_path: Path) -> None:
    full = slide(tmp_path / "a.svs")
    reading = read_image(tmp_path / "a.svs")
    assert reading.image.size == (1024, 768) and reading.decisions["level"] == "1 of 0 to 2"
    assert reading.decisions["slide"] == "4096 x 3072 pixels" and reading.decisions["overview"] == "1024 x 768"
    assert (np.asarray(reading.image) == full[::4, ::4]).all()
    tile = read_image(f"{tmp_path / 'a.svs'}#x=1000&y=500&size=300x100")
    assert (np.asarray(tile.image) == full[500:600, 1000:1300]).all()
    assert tile.decisions["tile"] == "300 x 100 at 1000, 500"
    small = load_image(f"{tmp_path / 'a.svs'}#level=1&x=1024&y=512&size=64")
    assert (np.asarray(small) == (255, 0, 0)).all()
    edge = load_image(f"{tmp_path / 'a.svs'}#x=4000&y=3000&size=500")
    assert edge.size == (96, 72)  # cut at the slide's edge
    for selector, says in {
        "level=3": "from 0 to 2",
        "x=4096": "from 0 to 4095",
        "size=0": "SIDE or WIDTHxHEIGHT",
        "slice=1": "use level, x, y, size, redact",
    }.items():
        assert says in error_of(f"{tmp_path / 'a.svs'}#{selector}")


def test_a_slide_without_small_levels_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    big = np.lib.stride_tricks.as_strided(np.zeros(1, dtype=np.uint8), (10240, 10240), (0, 0))
    tifffile.imwrite(path, big, tile=(1024, 1024), photometric="minisblack", compression="deflate")
    assert "above the limit of 80000000; select a tile" in error_of(path)
    assert load_image(f"{path}#x=9000&y=9000&size=256").size == (256, 256)
    # OpenSlide wants tiles; the others go through tifffile, by level.
    pages = tmp_path / "b.ome.tif"
    with tifffile.TiffWriter(pages) as file:
        file.write(big, subifds=1, photometric="minisblack", compression="deflate", rowsperstrip=1024)
        half = np.full((5120, 5120), 90, dtype=np.uint8)
        file.write(half, subfiletype=1, photometric="minisblack", compression="deflate", rowsperstrip=1024)
    reading = read_image(pages)
    assert reading.image.size == (1024, 1024) and (np.asarray(reading.image) == 90).all()
    assert load_image(f"{pages}#level=1&x=5120&y=0&size=9000x20").size == (2560, 20)
    assert "has too many pixels for this kind of TIFF" in error_of(f"{pages}#level=0&size=10")


@pytest.mark.parametrize("colour", ["miniswhite", "palette"])
def test_a_slide_of_strips_in_other_colours_is_refused(tmp_path: Path, colour: str) -> None:
    """OpenSlide, which knows them, wants tiles."""
    big = np.lib.stride_tricks.as_strided(np.zeros(1, dtype=np.uint8), (10240, 10240), (0, 0))
    table = {"colormap": np.zeros((3, 256), dtype=np.uint16)} if colour == "palette" else {}
    options: dict[str, Any] = {"photometric": colour, "compression": "deflate", "rowsperstrip": 1024, **table}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        file.write(big, subifds=1, **options)
        file.write(np.full((1024, 1024), 90, dtype=np.uint8), subfiletype=1, **options)
    assert f"colours of kind {colour.upper()} are not supported" in error_of(tmp_path / "a.ome.tif")


def test_a_slide_in_dicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = np.full((1000, 1500, 3), 230, dtype=np.uint8)
    full[300:600, 400:800] = (255, 0, 0)
    path, tiles = tmp_path / "a.dcm", []
    for y, x in np.ndindex(4, 6):
        tile = np.full((256, 256, 3), 255, dtype=np.uint8)
        part = full[256 * y : 256 * (y + 1), 256 * x : 256 * (x + 1)]
        tile[: part.shape[0], : part.shape[1]] = part
        file = io.BytesIO()
        Image.fromarray(tile).save(file, "JPEG", quality=95, subsampling=0)
        tiles.append(file.getvalue())
    dataset, spacing, measures, path_item = (pydicom.Dataset() for _ in range(4))
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    spacing.PixelSpacing, spacing.SliceThickness, path_item.OpticalPathIdentifier = [0.001, 0.001], 0.001, "1"
    measures.PixelMeasuresSequence = pydicom.Sequence([spacing])
    for keyword, value in {
        "SOPClassUID": pydicom.uid.VLWholeSlideMicroscopyImageStorage,
        "SOPInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": "1.2.3.5",
        "StudyInstanceUID": "1.2.3.6",
        "FrameOfReferenceUID": "1.2.3.7",
        "PatientID": "ZZMARKER",
        "Modality": "SM",
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "DimensionOrganizationType": "TILED_FULL",
        "TotalPixelMatrixColumns": 1500,
        "TotalPixelMatrixRows": 1000,
        "TotalPixelMatrixFocalPlanes": 1,
        "NumberOfOpticalPaths": 1,
        "Rows": 256,
        "Columns": 256,
        "NumberOfFrames": 24,
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "YBR_FULL_422",
        "PlanarConfiguration": 0,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "SharedFunctionalGroupsSequence": pydicom.Sequence([measures]),
        "OpticalPathSequence": pydicom.Sequence([path_item]),
        "PixelData": pydicom.encaps.encapsulate(tiles),
    }.items():
        setattr(dataset, keyword, value)
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    reading = read_image(path)
    assert reading.decisions["kind"] == "slide" and reading.image.size == (1024, 683)
    tile = np.asarray(load_image(f"{path}#x=350&y=250&size=200x100")).astype(int)
    assert (np.abs(tile[:40, :40] - 230) <= 4).all() and (np.abs(tile[60:, 60:] - (255, 0, 0)) <= 4).all()
    monkeypatch.setenv("MEDR1_SALT", "salt")
    assert group_of(path).startswith("patient-")
    path.write_bytes(path.read_bytes()[:3000])
    message = error_of(path)
    assert "ZZMARKER" not in message


def test_a_broken_slide(tmp_path: Path) -> None:
    slide(tmp_path / "a.svs", side=1024)
    content = (tmp_path / "a.svs").read_bytes()
    for length in (8, 200, len(content) // 2):
        (tmp_path / "b.svs").write_bytes(content[:length])
        error_of(tmp_path / "b.svs")


# ---- pictures that Pillow does not read


@pytest.mark.parametrize("options", [{"compression": "lzw", "predictor": 2}, {"compression": "deflate"}, {}])
def test_16_bit_colour_keeps_its_upper_8(tmp_path: Path, options: dict[str, Any]) -> None:
    colour = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb", **options)
    assert (np.asarray(load_image(tmp_path / "a.tif")) == colour >> 8).all()
    tifffile.imwrite(
        tmp_path / "b.tif", np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate", **options
    )
    assert (np.asarray(load_image(tmp_path / "b.tif")) == colour >> 8).all()


@pytest.mark.parametrize("kind", ["uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"compression": "deflate", "predictor": True}])
def test_grey_tiff_of_any_number_type(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    values = np.array([[1000, 2000, 3000, 6100]], dtype=kind).repeat(4, 0)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", **options)
    assert grey(tmp_path / "a.tif")[0].tolist() == [0, 50, 100, 255]  # (v - 1000) * 255 / 5100
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="miniswhite", **options)
    assert grey(tmp_path / "b.tif")[0].tolist() == [255, 205, 155, 0]


def test_pages_of_a_compressed_stack(tmp_path: Path) -> None:
    stack = np.stack([np.full((8, 8, 3), value, dtype=np.uint16) for value in (0, 25600, 65535)])
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="rgb", compression="zstd")
    assert load_image(f"{tmp_path / 'a.tif'}#frame=2").getpixel((0, 0)) == (100, 100, 100)
    assert [path.name for path in expand_reference(f"{tmp_path / 'a.tif'}#frames=3")][2] == "a.tif#frame=3"
    assert "from 1 to 3" in error_of(f"{tmp_path / 'a.tif'}#frame=4")


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"byteorder": ">"},
    {"compression": "zlib"},
    {"compression": "zlib", "byteorder": ">"},
    {"compression": "lzw", "predictor": True},
    {"compression": "zstd", "byteorder": ">", "tile": (16, 16)},
    {"bigtiff": True},
    {"rowsperstrip": 5, "bigtiff": True, "byteorder": ">"},
]


@pytest.mark.parametrize(
    "kind", ["uint8", "int8", "uint16", "int16", "uint32", "int64", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_sample_format_and_layout_of_tiff(tmp_path: Path, kind: str, layout: dict[str, Any]) -> None:
    """Grey, transparent grey, colour and transparent colour, interleaved or plane by plane, by the plain definition."""
    if layout.get("predictor") and kind == "int64":
        layout = {"compression": "lzw"}
    path = tmp_path / "a.tif"
    rng = np.random.default_rng(0)
    low = -100 if np.dtype(kind).kind == "i" else 0
    values = rng.integers(low, 101 if low else 251, (20, 17, 4)).astype(kind)
    values[0, 0], values[0, 1] = low, 100 if low else 250
    values[..., 3] = np.where(rng.random((20, 17)) < 0.5, 0, 100 if low else 250)
    top = float(values.max())

    def eight(part: np.ndarray) -> np.ndarray:
        """By the smallest and largest value where it is no unsigned byte, or a float colour of a byte's range."""
        if kind == "uint8" or (part.ndim == 3 and not low):
            return part.astype(np.uint8)
        return np.rint((part.astype(float) - low) / (top - low) * 255).astype(np.uint8)

    for white_is_zero in (False, True):
        tifffile.imwrite(path, values[..., 0], photometric="miniswhite" if white_is_zero else "minisblack", **layout)
        expected = eight(values[..., 0])
        assert (grey(path) == (255 - expected if white_is_zero else expected)).all()
    for planes in ("contig", "separate"):
        order = (lambda part: part) if planes == "contig" else (lambda part: np.moveaxis(part, -1, 0))
        options: dict[str, Any] = {"photometric": "rgb", "planarconfig": planes, **layout}
        tifffile.imwrite(path, order(values[..., :3]), **options)
        assert (np.asarray(load_image(path)) == eight(values[..., :3])).all(), planes
        if low or kind.startswith("float"):
            continue  # alpha is unsigned
        tifffile.imwrite(path, order(values), extrasamples=["unassalpha"], **options)
        clear = values[..., 3] == 0
        shown = np.asarray(load_image(path)).astype(int)
        assert (shown[clear] == 255).all()
        if kind != "uint8":  # an alpha of 250 in words of 16 bits is 250 of 255
            share = 250 / 255
            assert np.abs(shown - (eight(values[..., :3]) * share + 255 * (1 - share)))[~clear].max() <= 1
        tifffile.imwrite(
            path, order(values[..., [0, 3]]), extrasamples=["unassalpha"], **options | {"photometric": "minisblack"}
        )
        assert (grey(path)[clear] == 255).all()
        tifffile.imwrite(path, order(values), extrasamples=["unspecified"], **options)
        assert (np.asarray(load_image(path)) == eight(values[..., :3])).all(), "a fourth sample that is no alpha"


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_few_bits_and_palettes_of_tiff(tmp_path: Path, bits: int) -> None:
    """Written by hand: nobody's writer makes samples of 2, 4 and 12 bits."""
    top = 2**bits - 1
    row = [0, top, top // 2, top]
    packed = int("".join(f"{value:0{bits}b}" for value in row).ljust(-(-4 * bits // 8) * 8, "0"), 2)
    pixels = packed.to_bytes(-(-4 * bits // 8), "big")

    def tiff(photometric: int, colours: list[int] | None = None) -> Path:
        entries = [
            (256, 4, 4),
            (257, 4, 1),
            (258, 3, bits),
            (259, 3, 1),
            (262, 3, photometric),
            (273, 4, 8),
            (277, 3, 1),
        ]
        entries += [(278, 4, 1), (279, 4, len(pixels))]
        start = 8 + len(pixels) + len(pixels) % 2
        table = struct.pack(f"<{len(colours or [])}H", *(colours or []))
        counted = [(tag, kind, 1, value) for tag, kind, value in entries]
        counted += [(320, 3, len(colours), start)] if colours else []
        content = struct.pack("<2sHI", b"II", 42, start + len(table)) + pixels.ljust(start - 8, b"\0") + table
        content += struct.pack("<H", len(counted)) + b"".join(struct.pack("<HHII", *entry) for entry in counted)
        (tmp_path / "a.tif").write_bytes(content + b"\0" * 4)
        return tmp_path / "a.tif"

    shown = [0, 255, round(255 * (top // 2) / top), 255]
    assert grey(tiff(1))[0].tolist() == shown
    assert grey(tiff(0))[0].tolist() == [255 - value for value in shown]
    if bits in (4, 1):
        for unit in (1, 256):  # some writers put 8-bit colours into the palette's entries of 16
            table = [unit * (entry * 9 % 256) for entry in range(3 * 2**bits)]
            image = load_image(tiff(3, table))
            assert image.getpixel((1, 0)) == tuple(table[part * 2**bits + top] // unit for part in range(3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "suffix", ["jpg", "png", "webp", "tif", "16.png", "rgba.png", "grey16.png", "16.tif", "float.tif"]
)
def test_orientation_is_kept_on_every_way(tmp_path: Path, orientation: int, suffix: str) -> None:
    """By the EXIF standard: what stands at the top left of the upright image, and its size."""
    grid = np.repeat(np.repeat(np.array([[0, 1, 2], [3, 4, 5]]) * 40, 8, 0), 8, 1)
    upright = {
        1: grid,
        2: grid[:, ::-1],
        3: grid[::-1, ::-1],
        4: grid[::-1],
        5: grid.T,
        6: np.rot90(grid, -1),
        7: grid[::-1, ::-1].T,
        8: np.rot90(grid),
    }[orientation]
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    eight = grid.astype(np.uint8)
    if suffix in ("16.tif", "float.tif"):
        values = grid.astype(np.float32 if suffix == "float.tif" else np.uint16)
        tifffile.imwrite(path, values, photometric="minisblack", extratags=[(274, 3, 1, orientation, True)])
        upright = upright / 200 * 255
    elif suffix == "grey16.png":
        Image.fromarray(grid.astype(np.uint16)).save(path, exif=exif)
        upright = upright / 200 * 255
    elif suffix == "16.png":
        content = imagecodecs.png_encode(np.stack([grid.astype(np.uint16) * 257] * 3, -1))
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:33] + chunk + content[33:])
    elif suffix == "rgba.png":
        Image.fromarray(np.stack([eight, eight, eight, np.full_like(eight, 255)], -1)).save(path, exif=exif)
    else:
        Image.fromarray(np.stack([eight] * 3, -1)).save(path, exif=exif)
    reading = read_image(path)
    shown = np.asarray(reading.image)[..., 0].astype(float)
    assert shown.shape == upright.shape
    assert np.abs(shown - upright)[4::8, 4::8].max() < 12


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "16.png"])
def test_a_broken_orientation_tag_is_no_broken_picture(tmp_path: Path, suffix: str) -> None:
    path, broken = tmp_path / f"a.{suffix}", b"Exif\0\0II*\0\x08"  # it ends within the place of its first list
    if suffix == "16.png":
        content = imagecodecs.png_encode(np.full((4, 6, 3), 70 * 257, dtype=np.uint16))
        chunk = b"eXIf" + broken.removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:33] + chunk + content[33:])
    else:
        Image.new("RGB", (6, 4), (70, 70, 70)).save(path, exif=broken)
    image = load_image(path)
    assert image.size == (6, 4) and abs(image.getpixel((3, 2))[0] - 70) <= 2


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_channels_that_are_not_shown_are_told(tmp_path: Path, kind: str) -> None:
    """Of a grey picture with further channels that the file does not say anything of."""
    values = np.arange(48, dtype=kind).reshape(4, 4, 3)
    tifffile.imwrite(
        tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig", extrasamples=["unspecified"] * 2
    )
    reading = read_image(tmp_path / "a.tif")
    assert reading.decisions["warnings"] == ["not all channels are shown: of 3 the first 1"]
    assert (np.diff(np.asarray(reading.image)[..., 0].ravel().astype(int)) > 0).all()


def test_12_bits_in_words_of_16_are_seen(shared: Path, tmp_path: Path) -> None:
    inputs = shared / "findings" / "inputs"
    grey_alpha, colour = read_image(inputs / "grey-alpha-12-in-16.png"), read_image(inputs / "colour-12-in-16.png")
    assert max(grey_alpha.image.getextrema()[0]) == 255 and max(colour.image.getextrema()[0]) > 240
    assert colour.decisions["warnings"] == ["no colour is above 4095: taken as 12 bits in words of 16"]
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, 4)).astype(np.uint16)
    values[..., 3] = 4095
    values[0, 0] = 4095
    colours, whole = np.ascontiguousarray(values[..., :3]), {"level": 0, "reversible": True}
    for name, content in {
        "a.png": imagecodecs.png_encode(colours),
        "b.png": imagecodecs.png_encode(values),
        "c.jp2": imagecodecs.jpeg2k_encode(colours, codecformat="jp2", **whole),
        "d.j2k": imagecodecs.jpeg2k_encode(colours, codecformat="j2k", bitspersample=12, **whole),
    }.items():
        (tmp_path / name).write_bytes(content)
        reading = read_image(tmp_path / name)
        assert np.abs(np.asarray(reading.image).astype(int) - np.rint(colours * (255 / 4095))).max() <= 1, name
        assert (reading.decisions["warnings"] == []) == (name == "d.j2k"), "which declares its 12 bits"
    full = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    (tmp_path / "e.png").write_bytes(imagecodecs.png_encode(full))
    assert (np.asarray(load_image(tmp_path / "e.png")) == full >> 8).all()
    tifffile.imwrite(tmp_path / "f.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    assert (np.asarray(load_image(tmp_path / "f.tif")) == np.asarray(load_image(tmp_path / "b.png"))).all()


def test_12_bits_in_palettes_and_netpbm(tmp_path: Path) -> None:
    """Also where Pillow takes the upper 8 of 16; 8 bits that were drawn out to 16 stay as dark as they are."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for step, brightest, warned in ((16, 255, True), (1, 255, False), (257, 255, False)):
        table = np.stack([np.arange(256) * step] * 3).astype(np.uint16)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="palette", colormap=table)
        reading = read_image(tmp_path / "a.tif")
        assert max(reading.image.getextrema()[0]) == brightest
        assert ("taken as 12 bits" in str(reading.decisions["warnings"])) == warned
    dark = np.stack([np.arange(256) // 16 * 257] * 3).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="palette", colormap=dark)
    assert max(load_image(tmp_path / "a.tif").getextrema()[0]) == 15
    colours = np.random.default_rng(0).integers(0, 4096, (9, 7, 3))
    for largest in (4095, 65535):
        (tmp_path / "b.ppm").write_bytes(b"P6\n7 9\n%d\n" % largest + colours.astype(">u2").tobytes())
        reading = read_image(tmp_path / "b.ppm")
        assert np.abs(np.asarray(reading.image) - colours * (255 / 4095)).max() <= 1
        assert ("taken as 12 bits" in str(reading.decisions["warnings"])) == (largest == 65535)
    (tmp_path / "b.ppm").write_bytes((tmp_path / "b.ppm").read_bytes()[:-50])
    assert "b.ppm: cannot be decoded as an image" in error_of(tmp_path / "b.ppm")


def test_a_jpeg_of_12_bits(tmp_path: Path) -> None:
    values = np.repeat(np.arange(64, dtype=np.uint16)[None] * 60, 64, 0)
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg8_encode(values, level=98, bitspersample=12))
    assert np.abs(grey(tmp_path / "a.jpg")[0].astype(float) - np.linspace(0, 255, 64)).max() < 4


def test_what_cannot_be_seen_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").decisions["warnings"] == ["all of it is one colour"]
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[1:3] = 2
    Image.fromarray(mask).save(tmp_path / "b.png")
    (told,) = read_image(tmp_path / "b.png").decisions["warnings"]
    assert told == "nearly black: nothing in it is brighter than 2 of 255"
    for number, value in enumerate((np.nan, np.inf)):
        tifffile.imwrite(tmp_path / f"{number}.tif", np.full((3, 3), value, dtype=np.float32))
        assert "every value is undefined" in error_of(tmp_path / f"{number}.tif")
        partly = np.array([[0, 50, value], [100, 200, 0]], dtype=np.float32)
        tifffile.imwrite(tmp_path / "c.tif", partly)
        reading = read_image(tmp_path / "c.tif")
        assert "undefined or infinite" in reading.decisions["warnings"][0]
        assert np.asarray(reading.image)[..., 0].tolist() == [[0, 64, 255 if value == np.inf else 0], [128, 255, 0]]
    tifffile.imwrite(tmp_path / "d.tif", np.array([[3 + 4j, 0]], dtype=np.complex64))
    assert grey(tmp_path / "d.tif").tolist() == [[255, 0]]


def test_cielab_as_srgb(tmp_path: Path) -> None:
    """L* = 53.2, a* = 80.1, b* = 67.2 is pure red (sRGB, D65); by the profiles' D50 within a few steps of it."""
    Image.new("LAB", (4, 4), (round(53.2 * 2.55), 80 + 128, 67 + 128)).save(tmp_path / "a.tif")
    assert np.abs(np.asarray(load_image(tmp_path / "a.tif"))[0, 0].astype(int) - (255, 0, 0)).max() < 30


def test_cmyk_as_adobe_writes_it(tmp_path: Path) -> None:
    """Photoshop stores CMYK in JPEG inverted and says so by an APP14 marker; so does Pillow when it writes."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert (np.abs(np.asarray(load_image(tmp_path / "a.jpg")).astype(int) - (255, 0, 0)) < 6).all()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "b.tif")
    assert (np.asarray(load_image(tmp_path / "b.tif")) == (255, 0, 0)).all()


def test_every_picture_of_scikit_image() -> None:
    files = [path for path in sorted(SKIMAGE.glob("*")) if path.suffix in (".png", ".jpg", ".tif", ".gif", ".bmp")]
    assert len(files) > 20
    for path in files:
        reading = read_image(path)
        plain = skimage.io.imread(path)
        if plain.dtype == np.uint8 and plain.ndim == 3 and plain.shape[2] == 3:
            assert np.abs(np.asarray(reading.image).astype(int) - plain).max() <= 2, path.name
        elif plain.dtype == np.uint8 and plain.ndim == 2:
            assert (np.asarray(reading.image)[..., 0] == plain).all(), path.name
