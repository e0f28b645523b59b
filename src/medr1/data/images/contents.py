"""What image files hold, as digests, each computed once: bytes, decoded pixels, and who was imaged.

    contents_of([Path("a.png"), Path("copy of a.bmp")])

The digests lie in one SQLite file in the user's cache, so that training, evaluation and `medr1 data check` share them.
A file is known by path, size, times and inode; where one of these is new, its bytes are hashed again. What the bytes
decode to is kept under their own digest, so a moved, renamed or copied file is never decoded twice. The cache is only
a saving: a damaged one is begun anew, and where there can be none everything is computed.
"""

import hashlib
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from medr1.data.cache import cache_folder
from medr1.data.images.identity import owners_of, salt_name
from medr1.data.images.kinds import is_dicom
from medr1.data.images.read import load_image
from medr1.data.images.reference import file_of
from medr1.errors import MedR1Error
from medr1.processes import is_first

FILE = "contents-1.sqlite"
"""In the cache; the number is that of its tables."""
TABLES = ("files (path BLOB PRIMARY KEY, stamp TEXT, digest TEXT)", "contents (name TEXT PRIMARY KEY, value TEXT)")
DECODERS = (
    *("pillow", "numpy", "pydicom", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "python-gdcm", "imagecodecs"),
    *("nibabel", "tifffile", "openslide-python", "openslide-bin"),
)
AT_ONCE = 256
"""Images between two commits: what an interrupted run has hashed is kept."""
TOGETHER = 4096
"""Records whose images are looked up in one go."""
SETTLED = 2_000_000_000
"""Nanoseconds after which a file's times tell the next change; a file newer than that is not remembered by path."""
SHOWN_FROM = 1000
"""New images from which progress is shown."""

_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, None}
"""Error codes after which the cache is begun anew; locked, read-only and full are none of them."""

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Content:
    """What one image is, whatever its name.

    Example: `Content("9f86…", "60303…", ("patient-0f3c…", "study-1b2a…"))`
    """

    file: str
    """SHA-256 (hex) of the file's bytes; a selector changes nothing."""
    pixels: str | None
    """SHA-256 (hex) of size and RGB pixels as decoded, selector heeded; None where it cannot be decoded."""
    owners: tuple[str, ...]
    """Patient and study of a DICOM file, as `owners_of` names them."""


def contents_of(images: Iterable[Path], *, decode: bool = True) -> dict[Path, Content]:
    """The content of each image (or reference) whose file is there and can be read; the others are left out.

    Args:
        decode: without it no image is decoded, and `pixels` is None.

    Raises:
        MedR1Error: the salt for a patient's name cannot be kept.
    """
    with _opened() as store, _progress() as advance:
        return _contents(images, decode, store, advance)


def with_contents(
    items: Iterable[T], images_of: Callable[[T], Iterable[Path]], *, decode: bool = True
) -> Iterator[tuple[T, dict[Path, Content]]]:
    """Each item, in its order, with the contents of its images, and of some others; see `contents_of`.

    Those of TOGETHER items are in memory at a time.
    """
    rest = iter(items)
    with _opened() as store, _progress() as advance:
        while some := list(islice(rest, TOGETHER)):
            contents = _contents((image for item in some for image in images_of(item)), decode, store, advance)
            for item in some:
                yield item, contents


def _contents(
    images: Iterable[Path], decode: bool, store: "_Store", advance: Callable[[int], None]
) -> dict[Path, Content]:
    places: dict[Path, tuple[Path, bytes, str]] = {}  # image: its file, that file's absolute path and stamp
    for image in dict.fromkeys(images):
        file = file_of(image)
        try:
            status = os.stat(file)
        except (OSError, ValueError):  # missing; a name that is too long, or holds a null
            continue
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        places[image] = file, os.fsencode(os.path.abspath(file)), stamp
    files = _digests({name: (file, stamp) for file, name, stamp in places.values()}, store, advance)
    places = {image: place for image, place in places.items() if place[1] in files}
    kinds = {files[name]: file for file, name, _ in places.values()}
    is_dicom_of = store.filled({(digest, "dicom"): file for digest, file in kinds.items()}, _dicom, advance)
    named = {digest: file for digest, file in kinds.items() if is_dicom_of.get((digest, "dicom"))}
    who = f"owners {salt_name()}" if named else ""
    owners = store.filled({(digest, who): file for digest, file in named.items()}, _owners, advance)
    shown: dict[Path, tuple[str, str]] = {}
    if decode:
        for image, (file, name, _) in places.items():
            shown[image] = files[name], f"pixels {_decoder()} {str(image)[len(str(file)) :]}"
    wanted = {key: image for image, key in shown.items()}
    pixels = store.filled(wanted, _pixel_digest, advance, AT_ONCE)
    return {
        image: Content(
            files[name],
            pixels.get(shown[image]) if decode else None,
            tuple(filter(None, (owners.get((files[name], who)) or "").split(" "))),
        )
        for image, (_, name, _) in places.items()
    }


def _pixel_digest(image: Path) -> str | None:
    """SHA-256 (hex) of size and pixels of what `load_image` gives; None where it cannot be decoded."""
    try:
        picture = load_image(image)
    except MedR1Error:
        return None
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def _digests(
    files: Mapping[bytes, tuple[Path, str]], store: "_Store", advance: Callable[[int], None]
) -> dict[bytes, str]:
    """SHA-256 of each file that can be read, by absolute path."""
    known = store.files(files)
    found = {name: known[name][1] for name, (_, stamp) in files.items() if known.get(name, ("",))[0] == stamp}
    for some in _chunks([name for name in files if name not in found], AT_ONCE):
        now = time.time_ns()
        new = dict(zip(some, all_cores(_file_digest, [files[name][0] for name in some]), strict=True))
        found |= {name: digest for name, digest in new.items() if digest}
        store.keep_files(
            (name, files[name][1], digest)
            for name, digest in new.items()
            if digest and now - max(map(int, files[name][1].split(" ")[1:3])) > SETTLED
        )
        advance(len(some))
    return found


def _file_digest(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None


def _dicom(file: Path) -> str | None:
    try:
        return "yes" if is_dicom(file) else ""
    except OSError:
        return None


def _owners(file: Path) -> str | None:
    try:
        return " ".join(owners_of(file))
    except (MedR1Error, OSError):  # a header that cannot be read is told where the image is
        return None


@lru_cache
def _decoder() -> str:
    """What decides which pixels come out of a file: this wing's own sources, and the libraries' versions."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for name in DECODERS:
        try:
            digest.update(f"{name} {metadata.version(name)}".encode())
        except metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()[:16]


class _Store:
    """The cache, or without a database only what is computed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database: sqlite3.Connection | None = None
        self.begun_anew = False
        self._connect()

    def files(self, names: Iterable[bytes]) -> dict[bytes, tuple[str, str]]:
        """Stamp and digest of each path that is known."""
        query = "SELECT path, stamp, digest FROM files WHERE path IN ({})"
        return {path: (stamp, digest) for path, stamp, digest in self._select(query, list(names))}

    def keep_files(self, rows: Iterable[tuple[bytes, str, str]]) -> None:
        self._write("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", list(rows))

    def filled(
        self,
        wanted: Mapping[tuple[str, str], Path],
        compute: Callable[[Path], str | None],
        advance: Callable[[int], None],
        at_once: int = 16 * AT_ONCE,
    ) -> dict[tuple[str, str], str]:
        """What is known of each digest, and what is computed now; without what gives None, which is not kept."""
        by_name = {f"{digest} {what}": (digest, what) for digest, what in wanted}
        query = "SELECT name, value FROM contents WHERE name IN ({})"
        found: dict[tuple[str, str], str] = {by_name[name]: value for name, value in self._select(query, list(by_name))}
        for some in _chunks([key for key in wanted if key not in found], at_once):
            values = all_cores(compute, [wanted[key] for key in some])
            new = {key: value for key, value in zip(some, values, strict=True) if value is not None}
            rows = [(f"{digest} {what}", value) for (digest, what), value in new.items()]
            self._write("INSERT OR REPLACE INTO contents VALUES (?, ?)", rows)
            found |= new
            advance(len(some))
        return found

    def close(self) -> None:
        if self.database is not None:
            self.database.close()
            self.database = None

    def _connect(self) -> None:
        def connect() -> None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(self.path, timeout=60)
            with self.database:
                for table in TABLES:
                    self.database.execute(f"CREATE TABLE IF NOT EXISTS {table}")

        self._guarded(connect, None)

    def _select(self, query: str, keys: list[T]) -> list[tuple]:
        def select() -> list[tuple]:
            assert self.database is not None
            rows: list[tuple] = []
            for some in _chunks(keys, 500):
                rows += self.database.execute(query.format(",".join("?" * len(some))), some)
            return rows

        return self._guarded(select, []) if self.database else []

    def _write(self, query: str, rows: list[tuple]) -> None:
        def write() -> None:
            assert self.database is not None
            with self.database:
                self.database.executemany(query, rows)

        if self.database and rows:
            self._guarded(write, None)

    def _guarded(self, work: Callable[[], T], otherwise: T) -> T:
        """What `work` gives; where the database is damaged it is begun anew, else it is not used any more."""
        try:
            return work()
        except (OSError, sqlite3.Error) as error:
            self.close()
            damaged = isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) in _CORRUPT
            if damaged and not self.begun_anew:
                self.begun_anew = True
                try:
                    self.path.unlink()
                    self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
                except OSError:
                    return otherwise
                self._connect()
            return otherwise


@contextmanager
def _opened() -> Iterator[_Store]:
    with closing(_Store(cache_folder() / FILE)) as store:
        yield store


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """A function that counts images; it shows them from SHOWN_FROM on, for nobody waits for fewer."""
    done = 0
    columns = (TextColumn("images are hashed, once for all commands:"), TextColumn("{task.completed}"), SpinnerColumn())
    progress = Progress(*columns, console=Console(stderr=True), disable=not is_first(), transient=True)
    task = progress.add_task("", total=None)

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if done >= SHOWN_FROM:
            progress.start()
        progress.update(task, completed=done)

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


def all_cores(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`work` of each item, in order, by threads: hashing and decoding mostly leave the interpreter's lock alone.

    No warning is told until the last is taken.
    """
    # Readers silence warnings each for themselves, and what one thread takes back another would tell.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        yield from pool.map(work, items)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
