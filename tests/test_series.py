"""A folder of DICOM files as one series: the order of its slices, what is taken of it, and that it says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medr1.ask.ask import DICOM_MODALITIES, caption
from medr1.data.datasets import load_records
from medr1.data.images import content_digest, contents_of, expand_reference, read_image
from medr1.data.records import MODALITIES
from medr1.data.splits import joined, split_by_group
from medr1.errors import MedR1Error

pydicom = pytest.importorskip("pydicom", reason="needs the extra medr1[images]")

DIRECTIONS = [1, 0, 0, 0, 1, 0]


def write_slice(path: Path, grey: int, **fields: Any) -> None:
    """A CT slice of 8 x 8 pixels, all of one grey value but for one."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    made = Dataset()
    made.file_meta = meta
    made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, "1.2.3"
    made.PatientName, made.Modality = "Doe^Jane", "CT"
    made.Rows = made.Columns = 8
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.RescaleSlope, made.RescaleIntercept = 1, 0
    made.WindowCenter, made.WindowWidth = 50, 100
    pixels = np.full((8, 8), grey, "<u2")
    pixels[0, 0] = 0
    made.PixelData = pixels.tobytes()
    for name, value in {"SeriesInstanceUID": "1.2.3.4", **fields}.items():
        setattr(made, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)


def greys(folder: Path, num: int) -> list[int]:
    """The grey of each slice, as the reader orders them."""
    found = [read_image(f"{folder}#slice={place}").image.getpixel((4, 4))[0] for place in range(1, num + 1)]
    return [round(value * 99 / 255) for value in found]  # the window is from 0 to 99


def test_slices_lie_as_in_the_body(tmp_path: Path) -> None:
    """By place where all state one, whatever names and numbers say; else by number; else by name."""
    for number, z in enumerate((30.0, -10.0, 10.0)):
        common = {"InstanceNumber": number, "ImageOrientationPatient": DIRECTIONS}
        write_slice(tmp_path / "placed" / f"{number}.dcm", 20 + number, ImagePositionPatient=[5, 5, z], **common)
        write_slice(tmp_path / "numbered" / f"{9 - number}.dcm", 20 + number, InstanceNumber=number + 1)
        write_slice(tmp_path / "named" / "below" / f"{9 - number}.dcm", 20 + number)
    assert greys(tmp_path / "placed", 3) == [21, 22, 20]
    assert greys(tmp_path / "numbered", 3) == [20, 21, 22]
    assert greys(tmp_path / "named", 3) == [22, 21, 20]  # also in a folder below
    warned = {name: read_image(tmp_path / name).decisions["warnings"] for name in ("placed", "numbered", "named")}
    assert warned["placed"] == [] and "order of their numbers" in warned["numbered"][0]
    assert "order of their file names" in warned["named"][0]


def test_the_middle_or_n_slices_of_the_largest_series(tmp_path: Path) -> None:
    for number in range(8):
        write_slice(tmp_path / f"{number}.dcm", 20 + number, InstanceNumber=number, ImageOrientationPatient=DIRECTIONS,
                    ImagePositionPatient=[0, 0, number])  # fmt: skip
    for number in range(2):
        write_slice(tmp_path / f"scout{number}.dcm", 90, SeriesInstanceUID="1.2.9", InstanceNumber=number)
    (tmp_path / "notes.txt").write_text("no image")
    reading = read_image(tmp_path)
    assert reading.decisions["slice"] == "5 of 8"
    assert reading.decisions["warnings"] == ["its folder holds 2 series; this is of the largest, not of the other 2"]
    assert caption(reading) == (
        "CT by the DICOM header; slice 5 of 8; window of the file: black at 0, white at 100; 8 x 8 pixels"
    )
    windowed = read_image(f"{tmp_path}#slice=1&window=brain")
    assert "slice 1 of 8; brain window: black at 0, white at 80" in caption(windowed)
    names = [str(each) for each in expand_reference(f"{tmp_path}#slices=4&window=brain")]
    assert [name.removeprefix(str(tmp_path)) for name in names] == [
        f"#window=brain&slice={place}" for place in (2, 4, 6, 8)
    ]  # the middles of four equal parts
    for reference, remedy in ((f"{tmp_path}#slice=9", "from 1 to 8"), (f"{tmp_path}#slices=9", "from 1 to 8")):
        with pytest.raises(MedR1Error, match=remedy):
            read_image(expand_reference(reference)[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedR1Error, match="holds no DICOM image; name an image file, or the folder"):
        read_image(tmp_path / "empty")


def test_slices_that_cannot_be_read_are_counted_and_listed(tmp_path: Path) -> None:
    """Whatever is left of them; what was never an image is none of them."""
    for number in range(4):
        write_slice(tmp_path / f"{number}.dcm", 20 + number, InstanceNumber=number, ImageOrientationPatient=DIRECTIONS,
                    ImagePositionPatient=[0, 0, number])  # fmt: skip
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "index.html").write_text("<html>")
    write_slice(tmp_path / "report.dcm", 0, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    report = pydicom.dcmread(tmp_path / "report.dcm")
    del report.Rows, report.Columns, report.PixelData
    report.save_as(tmp_path / "report.dcm")
    reading = read_image(tmp_path)
    assert (reading.decisions["left_out"], reading.decisions["warnings"]) == ([], [])
    whole = (tmp_path / "0.dcm").read_bytes()
    (tmp_path / "below").mkdir()
    for name, content in {
        "cut.dcm": bytes(128) + b"DICM" + bytes(20),
        "below/cut": whole[: whole.index(b"\x28\x00\x10\x00")],
        "empty.dcm": b"",
        "page.ima": b"<html>",
    }.items():
        (tmp_path / name).write_bytes(content)
        left_out = read_image(tmp_path).decisions["left_out"]
        assert name in left_out
    assert left_out == ["below/cut", "cut.dcm", "empty.dcm", "page.ima"]
    reading = read_image(f"{tmp_path}#slice=1")
    assert reading.decisions["slice"] == "1 of 4"
    assert reading.decisions["warnings"] == ["4 files of its folder cannot be read and are left out"]
    for number in range(4):
        (tmp_path / f"{number}.dcm").unlink()
    with pytest.raises(MedR1Error, match=r"holds no DICOM image that can be read \(4 cannot\)"):
        read_image(tmp_path)


def test_slices_without_a_series_are_told_and_those_of_two_patients_kept_apart(tmp_path: Path) -> None:
    for number in range(3):
        write_slice(tmp_path / f"a{number}.dcm", 20, SeriesInstanceUID="", PatientID="P1", InstanceNumber=number)
    write_slice(tmp_path / "b.dcm", 90, SeriesInstanceUID="", PatientID="P2", InstanceNumber=1)
    reading = read_image(tmp_path)
    assert reading.decisions["slice"] == "2 of 3"
    assert "its folder holds 2 series; this is of the largest, not of the other 1" in reading.decisions["warnings"]
    unnamed = "no header says which series a slice is of: they are taken as one"
    assert unnamed in reading.decisions["warnings"] and "P1" not in str(reading.decisions)
    (tmp_path / "named").mkdir()
    write_slice(tmp_path / "named" / "a.dcm", 20)
    write_slice(tmp_path / "named" / "b.dcm", 30)
    assert unnamed not in read_image(tmp_path / "named").decisions["warnings"]


def test_a_folder_in_a_table_is_the_files_of_its_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who was imaged, and which pictures are the same, is known of a slice whatever names it."""
    monkeypatch.setenv("MEDR1_CACHE", str(tmp_path / "cache"))
    data, rows = tmp_path / "data", ["image,question,option_a,option_b,answer"]
    for patient in range(12):
        for place in range(3):
            position = {"ImageOrientationPatient": DIRECTIONS, "ImagePositionPatient": [0, 0, place]}
            whose = {"PatientID": f"P{patient}", "StudyInstanceUID": f"1.2.{patient + 1}"}
            write_slice(data / f"p{patient}" / f"{2 - place}.dcm", 20 + patient, **position, **whose)
        rows += [f"p{patient}/0.dcm,Which?,a,b,A", f"p{patient}#slice=2,Which one?,a,b,B", f"p{patient},What?,a,b,A"]
    (data / "table.csv").write_text("\n".join([*rows, "p0#slices=3&window=brain,All?,a,b,A"]))
    records = load_records(data)
    assert records[0].images == (data / "p0" / "0.dcm",)
    assert records[1].images == records[2].images == (data / "p0" / "1.dcm",)  # the second, and the middle one
    assert records[-1].images == tuple(Path(f"{data}/p0/{number}.dcm#window=brain") for number in (2, 1, 0))
    assert len(contents_of(image for record in records for image in record.images)) == 2 * 12 + 3
    train, test = split_by_group(joined(records), 0.4, seed=0)
    sides = [{image.parent for record in part for image in record.images} for part in (train, test)]
    assert all(sides) and sides[0].isdisjoint(sides[1])

    (data / "p0" / "3.dcm").symlink_to(tmp_path / "secret.dcm")
    write_slice(tmp_path / "secret.dcm", 90, ImageOrientationPatient=DIRECTIONS, ImagePositionPatient=[0, 0, 9],
                PatientID="P0", StudyInstanceUID="1.2.1")  # fmt: skip
    (data / "empty").mkdir()
    refused: list[str] = []
    (data / "table.csv").write_text("\n".join([*rows, "p0#slice=4,Out?,a,b,A", "empty,None?,a,b,A"]))
    assert len(load_records(data, refused=refused)) == 36
    assert "leads out of the data folder" in refused[0] and "holds no DICOM image" in refused[1]
    with pytest.raises(MedR1Error, match=r"p1#slice=2: is a folder; name the file of one of its slices"):
        content_digest(f"{data / 'p1'}#slice=2")


def test_a_changed_folder_is_read_anew(tmp_path: Path) -> None:
    write_slice(tmp_path / "a.dcm", 20, InstanceNumber=1)
    assert "slice" not in caption(read_image(tmp_path))  # one alone needs no number
    write_slice(tmp_path / "b.dcm", 30, InstanceNumber=2)
    assert read_image(tmp_path).decisions["slice"] == "2 of 2"


def test_modalities_of_headers_are_ours() -> None:
    assert set(DICOM_MODALITIES.values()) <= set(MODALITIES)
