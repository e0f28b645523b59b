"""Grouping by patient without knowing the patient: a keyed hash of the PatientID, and nothing else of the header."""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

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
        kind, identity = _identity(path)
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return f"{kind}-{hmac.new(_salt(), identity.encode(), hashlib.sha256).hexdigest()[:16]}"


def _identity(path: Path) -> tuple[str, str]:
    if is_dicom(path):
        from medr1.data.images.dicom import identifiers

        for kind, identity in identifiers(path).items():
            if identity:
                return kind, identity
    return "file", content_digest(path)


def _salt() -> bytes:
    if given := os.environ.get(SALT):
        return given.encode()
    path = Path(os.environ.get("MEDR1_CACHE", Path.home() / ".cache" / "medr1")) / "salt"
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
