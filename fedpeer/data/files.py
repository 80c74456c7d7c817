"""Sources that are files: where a URI says that one lies, and whether it changed while it was read."""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fedpeer.errors import DataError


def locate(uri: str) -> Path:
    """The plain file that an absolute path or a file:/// URI names. Raises DataError."""
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise DataError(f"{uri!r}: only files of this machine can be read", hint="an absolute path, or file:///…")
    path = Path(unquote(parts.path) if parts.scheme else uri)
    if not path.is_absolute():
        raise DataError(f"{uri!r} is not an absolute path", hint="the daemon runs in a folder of its own")
    return path


def check(path: Path) -> None:
    """Refuse what is no file, or none that can be read. Raises DataError."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is not a file")


def fingerprint(path: Path) -> str:
    """Another one when the file was written to, or another was put in its place. Raises OSError."""
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def unreadable(place: Path | str, error: OSError) -> DataError:
    """What an owner reads of a file that the system does not give."""
    return DataError(f"{place}: {error.strerror}", hint="the daemon must be able to read it")
