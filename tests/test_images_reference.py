"""References, selectors, redaction, paths that lead out, and records without a readable image."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_vlms import FAMILIES, tiny_vlm

from medr1.cli import app
from medr1.data.images import (
    content_digest,
    expand_reference,
    file_of,
    group_of,
    kind_of,
    load_image,
    read_image,
    resolve_inside,
)
from medr1.data.images.reference import Reference
from medr1.data.parts import leave_out_unreadable
from medr1.data.records import Record, read_jsonl
from medr1.data.splits import split_by_group
from medr1.errors import MedR1Error
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import load_vlm
from medr1.report.checks.images import image_findings, look_at


def picture(path: Path, value: int = 200, size: tuple[int, int] = (10, 6)) -> Path:
    Image.new("RGB", size, (value,) * 3).save(path, "PNG")
    return path


def error_of(reference: Path | str) -> str:
    with pytest.raises(MedR1Error) as error:
        read_image(reference)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_reference_is_a_file_and_a_selector(tmp_path: Path) -> None:
    parsed = Reference.parse(f"{tmp_path}/scan.dcm#frame=12&window=40,400")
    assert parsed.path == tmp_path / "scan.dcm"
    assert parsed.selector == {"frame": "12", "window": "40,400"}
    assert str(parsed) == f"{tmp_path}/scan.dcm#frame=12&window=40,400"
    assert file_of("a#1.png") == Path("a#1.png")  # no key=value: part of the name
    assert file_of("a#b=c.png#frame=1") == Path("a#b=c.png")
    for bad in ("a.png#frame=1&frame=2", "a.png#frame="):
        with pytest.raises(MedR1Error, match="frame"):
            Reference.parse(bad)


def test_a_file_that_is_there_wins_over_a_selector(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 10)
    picture(tmp_path / "a.png#frame=1", 20)
    assert load_image(tmp_path / "a.png#frame=1").getpixel((0, 0)) == (20, 20, 20)
    (tmp_path / "a.png#frame=1").unlink()
    assert load_image(tmp_path / "a.png#frame=1").getpixel((0, 0)) == (10, 10, 10)


def test_wrong_selectors_list_the_right_ones(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    assert error_of(f"{path}#window=lung").endswith("'window' selects nothing in a picture; use frame, redact")
    assert error_of(f"{path}#frame=2").endswith("frame is '2'; give a whole number from 1 to 1")
    assert error_of(f"{path}#frame=one").endswith("frame is 'one'; give a whole number from 1 to 1")
    assert "no such image file" in error_of(tmp_path / "b.png#frame=1")


def test_redaction_blackens_exactly_the_given_areas(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 200, (10, 6))
    image = np.asarray(load_image(f"{path}#redact=top:2;bottom:1;left:1;5,3,2,1"))[..., 0]
    expected = np.full((6, 10), 200)
    expected[:2] = expected[5:] = expected[:, :1] = expected[3, 5:7] = 0
    assert image.tolist() == expected.tolist()
    assert (np.asarray(load_image(f"{path}#redact=right:10")) == 0).all()
    assert read_image(f"{path}#redact=top:2").decisions["redacted"] == "top:2"
    for miss in ("top:7", "9,0,2,1", "0,0,0,1", "top:0", "left:11"):  # an area that misses is noticed
        assert "give areas inside its 10 x 6 pixels" in error_of(f"{path}#redact={miss}")
    assert "top:N" in error_of(f"{path}#redact=everything")


def test_frames_of_a_picture(tmp_path: Path) -> None:
    pages = [Image.new("L", (4, 4), value) for value in (10, 20, 30, 40, 50)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert read_image(tmp_path / "a.tif").decisions["frame"] == "1 of 5"
    assert load_image(tmp_path / "a.tif#frame=4").getpixel((0, 0)) == (40, 40, 40)
    names = [path.name for path in expand_reference(f"{tmp_path}/a.tif#frames=2&redact=top:1")]
    assert names == ["a.tif#redact=top:1&frame=2", "a.tif#redact=top:1&frame=4"]
    # The middles of 1, 3, 5 equal parts of 5 frames.
    assert [path.name[-1] for path in expand_reference(tmp_path / "a.tif#frames=1")] == ["3"]
    assert [path.name[-1] for path in expand_reference(tmp_path / "a.tif#frames=3")] == ["1", "3", "5"]
    assert [path.name[-1] for path in expand_reference(tmp_path / "a.tif#frames=5")] == ["1", "2", "3", "4", "5"]
    assert expand_reference(tmp_path / "missing.png") == [tmp_path / "missing.png"]  # nothing to expand, nothing read
    for wrong in ("frames=6", "frames=0", "slices=2", "frames=2&frame=1"):
        with pytest.raises(MedR1Error, match=r"frame|slices"):
            expand_reference(f"{tmp_path}/a.tif#{wrong}")


def test_what_a_camera_wrote_stays_behind(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = "ZZMARKER", "ZZMARKER"  # description and artist
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "a.jpg", exif=exif, comment="ZZMARKER", xmp=b"<x>ZZMARKER</x>")
    assert (tmp_path / "a.jpg").read_bytes().count(b"ZZMARKER") == 4
    loaded = load_image(tmp_path / "a.jpg")
    for kind in ("png", "webp", "jpg"):
        loaded.save(tmp_path / f"b.{kind}")
        assert b"ZZMARKER" not in (tmp_path / f"b.{kind}").read_bytes()


def test_no_processor_meets_an_image_that_it_refuses(tmp_path: Path) -> None:
    assert "2010 x 10 pixels are more than 200 times as long as wide" in error_of(
        picture(tmp_path / "a.png", size=(2010, 10))
    )
    allowed = [picture(tmp_path / f"{w}x{h}.png", size=(w, h)) for w, h in ((1, 1), (200, 1), (3, 600), (2000, 20))]
    for family in FAMILIES:
        processor = tiny_vlm(family).processor.image_processor
        for path in allowed:
            assert processor([load_image(path)], return_tensors="pt")["pixel_values"].numel() > 0


def test_content_digest(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    assert content_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    picture(tmp_path / "b.png")
    same = {content_digest(tmp_path / f"{name}.png#frame=1") for name in "ab"}
    assert len(same) == 1 and content_digest(path) not in same  # by content and selector, not by name
    assert content_digest(f"{path}#frame=1&redact=top:1") == content_digest(f"{path}#redact=top:1&frame=1")


def test_paths_that_lead_out(tmp_path: Path) -> None:
    root, secret = tmp_path / "data", picture(tmp_path / "secret.png")
    root.mkdir()
    (root / "link.png").symlink_to(secret)
    (root / "folder").symlink_to(tmp_path)
    picture(root / "fine.png")
    (root / "alias.png").symlink_to(root / "fine.png")
    for good in ("fine.png", "alias.png", "fine.png#frame=1", "absent/a.png"):
        assert resolve_inside(root, good) == root / good
    bad = ("", "../secret.png", "a/../../secret.png", str(secret), "link.png", "link.png#frame=1", "folder/secret.png")
    for path in (*bad, "fine.png\0"):
        with pytest.raises(ValueError, match="image path"):
            resolve_inside(root, path)


def test_groups_of_pictures_go_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDR1_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDR1_SALT", raising=False)
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    group = group_of(first)
    assert group.startswith("file-") and group == group_of(second) == group_of(f"{first}#frame=1")
    salt = tmp_path / "cache" / "salt"
    assert salt.stat().st_mode & 0o777 == 0o600
    assert list(salt.parent.iterdir()) == [salt]
    salt.write_text("")
    with pytest.raises(MedR1Error, match="is empty"):
        group_of(first)
    monkeypatch.setenv("MEDR1_SALT", "another")
    assert group_of(first) != group


def record(number: int, image: Path) -> Record:
    return Record(
        id=f"r{number}",
        images=(image,),
        question="?",
        options=("a", "b"),
        answer="A",
        modality="CT",
        question_type=None,
        source="s",
        group=f"g{number}",
    )


def test_frames_of_one_file_stay_on_one_side_of_a_split(tmp_path: Path) -> None:
    records = [record(number, tmp_path / f"{number // 4}.dcm#frame={number % 4 + 1}") for number in range(40)]
    train, test = split_by_group(records, 0.25, seed=0)
    files = [{file_of(one.images[0]) for one in part} for part in (train, test)]
    assert len(train) + len(test) == 40 and files[0].isdisjoint(files[1])


def test_unreadable_images_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    records = [record(0, good), record(1, bad), record(2, tmp_path / "absent.png"), record(3, good), record(4, bad)]
    assert [one.id for one in leave_out_unreadable(records, tmp_path / "out.jsonl")] == ["r0", "r3"]
    listing = tmp_path / "out.skipped.jsonl"
    rows = read_jsonl(listing)
    assert [(row["id"], row["image"]) for row in rows] == [
        ("r1", str(bad)),
        ("r2", str(tmp_path / "absent.png")),
        ("r4", str(bad)),
    ]
    assert "cannot be decoded" in rows[0]["reason"] and "no such image file" in rows[1]["reason"]
    assert f"3 of 5 records left out: an image cannot be read; see {listing}" in capsys.readouterr().err
    assert leave_out_unreadable(records[:1], tmp_path / "out.jsonl") == records[:1]
    assert not listing.exists()  # of the present run there is nothing to list
    with pytest.raises(MedR1Error, match="of all 1 records an image cannot be read"):
        leave_out_unreadable(records[1:2], tmp_path / "run")


def test_warnings_are_counted_by_data_check_and_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are no reason to stop, and none to say nothing."""
    for number, values in enumerate(([[0, 200]], [[0, 3]], [[0, 5]], [[9, 9]])):
        Image.fromarray(np.array(values, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    records = [record(number, tmp_path / f"{number}.png") for number in range(4)]
    pictures = look_at([one.images[0] for one in records])
    assert image_findings(pictures, records, None, tmp_path)["warnings"] == [
        {"warning": "nearly black", "num": 2, "first": "1.png"},
        {"warning": "all of it is one colour", "num": 1, "first": "3.png"},
    ]
    capsys.readouterr()
    for _ in range(2):  # once, however many evaluations read them
        evaluate(load_vlm("tiny"), records, mode="no-think", out=tmp_path / "rows.jsonl", max_new_tokens=1)
    told = capsys.readouterr().err.replace("\n", "")
    line = (
        f"3 of 4 images are read with a warning: nearly black (2, first {tmp_path / '1.png'}); "
        f"all of it is one colour (1, first {tmp_path / '3.png'})"
    )
    assert told.count(line) == 1


def test_eval_and_train_go_on_without_unreadable_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medr1.data.phantoms import write_phantoms

    write_phantoms(tmp_path / "data", num_images=32, seed=0)
    images = sorted((tmp_path / "data" / "Images").rglob("*.png"))
    images[0].write_bytes(b"no picture")
    images[1].unlink()

    def run(*arguments: str) -> None:
        app([*arguments, "--data", str(tmp_path / "data"), "--mode", "no-think"], standalone_mode=False)

    evaluate = ("eval", "--part", "all", "--max-new-tokens", "2", "--out", str(tmp_path / "rows.jsonl"))
    with pytest.raises(MedR1Error, match="no such image"):
        run(*evaluate)
    run(*evaluate, "--skip-unreadable")
    skipped = {row["id"] for row in read_jsonl(tmp_path / "rows.skipped.jsonl")}
    answered = {row["id"] for row in read_jsonl(tmp_path / "rows.jsonl")}
    assert len(skipped) == 10 and len(answered) == 150 and skipped.isdisjoint(answered)  # five questions an image

    train = ("train", "--model", "tiny", "--method", "sft", "--steps", "1", "--out", str(tmp_path / "run"))
    run(*train, "--skip-unreadable")
    assert {row["id"] for row in read_jsonl(tmp_path / "run.skipped.jsonl")} == skipped
    assert kind_of(images[0]) == "picture"
