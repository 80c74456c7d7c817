"""The passwords of databases: by name, in a file of their own or a systemd credential, and nowhere else.

Rules
* A systemd credential of that name counts (LoadCredential*= in the unit); else the file `secrets/NAME` in the peer's
  home, read only when nobody but its owner could have read or replaced it (private.py).
* It is one line of UTF-8; the end of the line does not belong to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedpeer import private, systemd
from fedpeer.crypto import Secret
from fedpeer.errors import KeyFileError

FOLDER = "secrets"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_BYTES = 1024


def load(folder: Path | None, name: str) -> Secret:
    """The secret of this name. Raises KeyFileError with the remedy, and without what the file says."""
    if not NAME.fullmatch(name):
        raise KeyFileError(
            "this cannot name a secret", hint="letters, digits, dot, - and _; at most 64; not the secret"
        )
    path = systemd.credential(name) or (folder / name if folder is not None else None)
    if path is None:
        raise KeyFileError(f"there is no secret {name!r}")
    value = private.read(
        path, MAX_BYTES + 1, missing="write the password into it, mode 600; or give it as a credential of systemd"
    )
    value = value.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    if not 0 < len(value) <= MAX_BYTES or not text.isprintable() or not text:
        raise KeyFileError(f"{path} is not one line of text with at most {MAX_BYTES} bytes")
    return Secret(value)
