"""Environments of what a bench compares us with: in .bench/, each with its own lock, made when that has changed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python_of(name: str, lock: Path) -> Path:
    """The interpreter of .bench/NAME. Raises CalledProcessError if what the lock names cannot be installed."""
    folder = ROOT / ".bench" / name
    python, stamp = folder / "bin" / "python", folder / "lock.sha256"
    wanted = hashlib.sha256(lock.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"bench: installing what we are compared with into .bench/{name} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--require-hashes"]
        subprocess.run([*pip, "-r", lock], check=True)
        stamp.write_text(wanted)
    return python
