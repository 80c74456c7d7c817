"""What holds for every stage of algorithms/local/."""

from __future__ import annotations

import importlib
import pkgutil

from fedpeer.algorithms import local
from fedpeer.stage import Stage


def test_a_local_stage_has_no_messages() -> None:
    modules = [
        importlib.import_module(f"{local.__name__}.{found.name}") for found in pkgutil.iter_modules(local.__path__)
    ]
    stages = [value for module in modules for value in vars(module).values() if isinstance(value, Stage)]
    assert stages
    assert not [found.name for found in stages if found.messages]
