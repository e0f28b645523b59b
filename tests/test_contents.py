"""Digests of images: right whatever is done to files, computed once, and a cache that can be lost at any time."""

import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medr1.data.cache import cache_folder
from medr1.data.images import contents, contents_of, load_image
from medr1.data.images.contents import FILE, Content


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 4, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images an hour old: a, its byte copy, the same pixels as BMP, and three others."""
    monkeypatch.setenv("MEDR1_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    shutil.copy(folder / "a.png", folder / "copy.png")
    picture(0).save(folder / "a.bmp")
    for number in (1, 2, 3):
        picture(number).save(folder / f"{number}.png")
    for file in folder.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)
    monkeypatch.setattr(contents, "SETTLED", -(10**18))  # these were made now: a change shows in their other times
    return folder


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each file that is hashed or decoded."""
    done: list[str] = []

    def watched(name: str, function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def call(path: Path) -> Any:
            done.append(f"{name} {path.name}")
            return function(path)

        return call

    for name in ("_file_digest", "_pixel_digest"):
        monkeypatch.setattr(contents, name, watched(name[1:5], getattr(contents, name)))
    return done


def plain(images: list[Path]) -> dict[Path, Content]:
    """The definition, file by file."""
    found = {}
    for image in images:
        shown = load_image(image)
        pixels = hashlib.sha256(f"{shown.size}".encode() + shown.tobytes()).hexdigest()
        found[image] = Content(hashlib.sha256(image.read_bytes()).hexdigest(), pixels, ())
    return found


def test_digests_are_computed_once_whatever_the_files_are_called(folder: Path, work: list[str]) -> None:
    images = sorted(folder.iterdir())
    assert contents_of(images) == plain(images)
    # Bytes of six files; pixels of five contents, since two files are one.
    assert [line for line in work if line.startswith("file")] == [f"file {i.name}" for i in images]
    assert len(work) == 6 + 5
    work.clear()
    assert contents_of(images) == plain(images) and work == []

    # Elsewhere the bytes are hashed again, and nothing is decoded.
    moved = folder.rename(folder.with_name("moved"))
    images = sorted(moved.iterdir())
    assert contents_of(images) == plain(images)
    assert work == [f"file {i.name}" for i in images]


def test_a_changed_file_is_seen_though_size_and_time_are_the_same(folder: Path) -> None:
    images = sorted(folder.glob("*.bmp"))
    times = images[0].stat()
    contents_of(images)
    picture(9).save(images[0])  # as many bytes, for it is no compressed format
    os.utime(images[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert images[0].stat().st_size == times.st_size
    assert contents_of(images) == plain(images)

    # Two folders that change names: paths, sizes and times of the files stay what they were.
    for number, name in ((10, "left"), (11, "right")):
        (folder / name).mkdir()
        picture(number).save(folder / name / "x.bmp")
        os.utime(folder / name / "x.bmp", (10**9,) * 2)
    both = [folder / "left" / "x.bmp", folder / "right" / "x.bmp"]
    before = contents_of(both)
    (folder / "left").rename(folder / "aside")
    (folder / "right").rename(folder / "left")
    (folder / "aside").rename(folder / "right")
    after = contents_of(both)
    assert after == plain(both)
    assert [after[path] for path in both] == [before[path] for path in both[::-1]]


def test_a_file_written_just_now_is_not_remembered_by_its_time(folder: Path, work: list[str], monkeypatch) -> None:
    monkeypatch.setattr(contents, "SETTLED", 2_000_000_000)
    picture(5).save(folder / "new.png")
    for _ in range(2):
        contents_of([folder / "new.png"])
    assert work == ["file new.png", "pixe new.png", "file new.png"]


def _garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 500)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6000])


def _holes(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) - 100))


def _other_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE files (something INT)")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_garbage, _half, _holes, _other_tables, _folder])
def test_a_damaged_cache_is_begun_anew(folder: Path, work: list[str], damage: Callable[[Path], None]) -> None:
    images = sorted(folder.iterdir())
    contents_of(images)
    damage(cache_folder() / FILE)
    assert contents_of(images) == plain(images)
    work.clear()
    assert contents_of(images) == plain(images)
    if damage is not _folder:  # in whose place nothing can be written: all is computed each time
        contents_of(images)
        assert work == []


def test_without_a_cache_all_is_computed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("MEDR1_CACHE", str(folder.parent / "file" / "below"))
    images = sorted(folder.iterdir())
    assert contents_of(images) == plain(images)


def test_what_cannot_be_read_or_decoded(folder: Path) -> None:
    (folder / "torn.png").write_bytes((folder / "1.png").read_bytes()[:60])
    odd = [folder / "absent.png", folder / ("long" * 200), Path("nul\0l"), folder]
    found = contents_of([folder / "torn.png", *odd])
    assert list(found) == [folder / "torn.png"]
    assert found[folder / "torn.png"].pixels is None


def test_other_decoders_may_give_other_pixels() -> None:
    """So whatever the extra that reads medical images brings is part of what decoded pixels are kept under."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    names = {re.split("[<>=]", wanted)[0] for wanted in project["optional-dependencies"]["images"]}
    assert names <= set(contents.DECODERS)


def test_a_selector_picks_other_pixels_of_the_same_bytes(folder: Path) -> None:
    picture(1).save(folder / "two.tiff", save_all=True, append_images=[picture(2)])
    first, second = contents_of([folder / "two.tiff#frame=1", folder / "two.tiff#frame=2"]).values()
    assert first.file == second.file and first.pixels != second.pixels
    one, two = contents_of([folder / "1.png", folder / "2.png"]).values()
    assert (first.pixels, second.pixels) == (one.pixels, two.pixels)


def test_several_processes_at_once_agree(folder: Path) -> None:
    for number in range(20, 80):
        picture(number).save(folder / f"{number}.png")
    code = (
        "import sys, hashlib; from pathlib import Path; from medr1.data.images import contents_of;"
        "found = contents_of(sorted(Path(sys.argv[1]).iterdir()));"
        "print(hashlib.sha256(repr(list(found.values())).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(4)]
    said = {process.communicate()[0].decode().strip() for process in running}
    expected = hashlib.sha256(repr(list(plain(sorted(folder.iterdir())).values())).encode()).hexdigest()
    assert said == {expected}
