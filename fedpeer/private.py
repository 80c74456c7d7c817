"""Files that hold a secret: read only when nobody but their owner could have read or replaced them.

Rules
* A file that others could read or replace is refused, also one whose folder others could exchange. What is checked is
  the file that was opened, not what its path names.
* A systemd credential ($CREDENTIALS_DIRECTORY) is exempt: systemd guards it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fedpeer.errors import KeyFileError


def read(path: Path, limit: int, *, missing: str) -> bytes:
    """At most the first `limit` bytes. Raises KeyFileError with the remedy; `missing` is that for no file at all."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    guarded = credentials is not None and path.parent == Path(credentials)
    try:
        # NONBLOCK: a pipe must not keep us waiting
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if guarded else os.O_NOFOLLOW | os.O_NONBLOCK))
        with os.fdopen(descriptor, "rb") as file:
            if not guarded:
                _check_file(path, os.fstat(descriptor))
                check_folder(path.parent)
            return file.read(limit)
    except FileNotFoundError:
        raise KeyFileError(f"{path} does not exist", hint=missing) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_plain_file(path) from None
        raise KeyFileError(f"{path}: {error.strerror}", hint="run it as the user whose peer this is") from None


def _no_plain_file(path: Path) -> KeyFileError:
    return KeyFileError(f"{path} is a link or no plain file", hint="put the file itself there")


def _check_file(path: Path, file: os.stat_result) -> None:
    me = os.geteuid()
    if not stat.S_ISREG(file.st_mode):
        raise _no_plain_file(path)
    if file.st_uid != me:
        raise KeyFileError(f"{path} belongs to uid {file.st_uid}, not to {me}", hint=f"chown {me} {path}")
    if stat.S_IMODE(file.st_mode) & 0o177:
        raise KeyFileError(
            f"{path} has mode {stat.S_IMODE(file.st_mode):04o}: others may use what is in it",
            hint=f"chmod 600 {path}",
        )


def check_folder(path: Path) -> None:
    """The folder is its owner's alone, and nobody else can put another in its place."""
    me, above = os.geteuid(), path.resolve().parent
    folder, mode_above = path.stat(), above.stat().st_mode
    if folder.st_uid not in (me, 0):
        raise KeyFileError(f"{path} belongs to uid {folder.st_uid}, not to {me}", hint=f"chown {me} {path}")
    if stat.S_IMODE(folder.st_mode) & 0o077:
        raise KeyFileError(
            f"{path} can be read or entered by others, who could read or replace what is in it",
            hint=f"chmod 700 {path}",
        )
    if mode_above & 0o022 and not mode_above & stat.S_ISVTX:
        raise KeyFileError(
            f"{above} can be written by others, who could put another folder in the place of {path}",
            hint=f"chmod go-w {above}",
        )
