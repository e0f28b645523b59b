"""Grouping by patient without knowing the patient: a keyed hash of the PatientID, and nothing else of the header."""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from pathlib import Path

from medr1.data.cache import cache_folder
from medr1.data.images.kinds import is_dicom
from medr1.data.images.reference import content_digest, file_of
from medr1.errors import MedR1Error

SALT = "MEDR1_SALT"
"""Environment variable with the salt; without it `salt` in the user's cache (MEDR1_CACHE moves that) holds one."""


def group_of(reference: Path | str) -> str:
    """The group that an image must stay in: "patient-…" in DICOM, else "study-…" (no PatientID there), else "file-…".

    Sixteen hexadecimal digits of HMAC-SHA256 under the salt: the same patient gets the same group on every machine
    that shares the salt, and nobody without it can test a PatientID against a group.

    Raises:
        MedR1Error: the file cannot be read, or the salt cannot be kept.
    """
    path = file_of(reference)
    try:
        return next(iter(owners_of(path)), None) or name_of_content(content_digest(path))
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def owners_of(path: Path) -> tuple[str, ...]:
    """Patient and study of a DICOM file, named as `group_of` names them; none of another file.

    Raises:
        MedR1Error: the header cannot be read, or the salt cannot be kept.
        OSError: the file cannot be read.
    """
    if not is_dicom(path):
        return ()
    from medr1.data.images.dicom import identifiers

    return tuple(_salted(kind, identity) for kind, identity in identifiers(path).items() if _tells(identity))


def is_salted(group: str) -> bool:
    """Whether a group has the form of `group_of`: such a name differs from machine to machine."""
    return re.fullmatch(r"(patient|study|file)-[0-9a-f]{16}", group) is not None


def name_of_content(digest: str) -> str:
    """The group of a file that tells of no patient, by `content_digest`."""
    return _salted("file", digest)


def salt_name() -> str:
    """What tells one salt from another, and nothing of it.

    Raises:
        MedR1Error: the salt cannot be kept.
    """
    return hashlib.sha256(b"medr1 salt " + _salt()).hexdigest()[:16]


def _tells(identity: str) -> bool:
    """Whether a PatientID or UID is one, and not what is written over it so that it tells nothing."""
    blanked = r"[0x*?._ -]*|anon(ymous|ymi[sz]ed)?|unknown|none|n/?a|removed|de-?identified"
    return not re.fullmatch(blanked, identity, re.IGNORECASE)


def _salted(kind: str, identity: str) -> str:
    return f"{kind}-{hmac.new(_salt(), identity.encode(), hashlib.sha256).hexdigest()[:16]}"


def _salt() -> bytes:
    if given := os.environ.get(SALT):
        return given.encode()
    path = cache_folder() / "salt"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, new = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # another process was faster: its salt is the salt
                os.link(new, path)
            os.unlink(new)
        salt = path.read_bytes()
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be written or read ({error.strerror}); set {SALT}") from error
    if not salt:
        raise MedR1Error(f"{path}: is empty; delete it, or set {SALT}")
    return salt
