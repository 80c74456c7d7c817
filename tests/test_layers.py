"""Rules about the code itself: imports point one way, trio stays in the shell, nothing dangerous is called.

The layers are ARCHITECTURE.md's. A module may import from its own layer and from lower ones only.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fedpeer"

# first match wins; the number is the layer
LAYERS = [
    ("fedpeer.network", 1),
    ("fedpeer.peers", 1),
    ("fedpeer.stage", 1),
    ("fedpeer.artifact", 1),
    ("fedpeer.worker.protocol", 1),
    ("fedpeer.worker.main", 5),
    ("fedpeer.admin.caller", 0),
    ("fedpeer.daemon", 8),
    ("fedpeer.cli", 8),
    ("fedpeer.testing", 8),
    ("fedpeer.admin", 7),
    ("fedpeer.*.service", 6),
    ("fedpeer.wire", 1),
    ("fedpeer.data", 1),
    ("fedpeer.mesh", 2),
    ("fedpeer.secure", 2),
    ("fedpeer.aggregation", 2),
    ("fedpeer.governance", 3),
    ("fedpeer.algorithms", 3),
    ("fedpeer.jobs", 4),
    ("fedpeer.worker", 5),
    ("fedpeer", 0),
]
MAY_IMPORT_TRIO = ("fedpeer.network", "fedpeer.daemon", "fedpeer.testing", "fedpeer.*.service")
WORKER_MAY_IMPORT = (
    "fedpeer.algorithms", "fedpeer.secure", "fedpeer.peers", "fedpeer.stage", "fedpeer.artifact", "fedpeer.worker",
    "fedpeer.codec", "fedpeer.crypto", "fedpeer.errors",
)  # fmt: skip
NEVER_IN_A_WORKER = ("trio", "fedpeer.wire", "fedpeer.mesh", "fedpeer.governance", "fedpeer.jobs", "fedpeer.store",
                     "fedpeer.aggregation", "fedpeer.identity", "fedpeer.admin", "phe")  # fmt: skip
ONLY_IN_CRYPTO = ("nacl", "cryptography")
NEVER_IMPORTED = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml")
NEVER_IN_ALGORITHMS = ("random", "secrets", "time", "datetime", "uuid", "os", "socket", "subprocess", "threading",
                       "phe")  # fmt: skip
PURE_WITHOUT_CHANCE = ("fedpeer.wire", "fedpeer.mesh", "fedpeer.secure", "fedpeer.aggregation", "fedpeer.governance",
                       "fedpeer.algorithms", "fedpeer.jobs")  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def matches(module: str, pattern: str) -> bool:
    if ".*." in pattern:
        first, last = pattern.split(".*.")
        return module.startswith(first + ".") and module.endswith("." + last)
    return module == pattern or module.startswith(pattern + ".")


def layer(module: str) -> int:
    return next(number for pattern, number in LAYERS if matches(module, pattern))


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, but for those needed only by the type checker."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = {name for name, _ in MODULES}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in names else node.module), node.lineno


MODULES = modules()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES}


def everywhere() -> Iterator[tuple[str, str, int]]:
    for name, _ in MODULES:
        for imported, line in imports(TREES[name]):
            yield name, imported, line


def test_imports_point_from_higher_layers_to_lower_ones() -> None:
    wrong = [
        f"{name}:{line} (layer {layer(name)}) imports {imported} (layer {layer(imported)})"
        for name, imported, line in everywhere()
        if imported.split(".")[0] == "fedpeer" and imported != "fedpeer" and layer(imported) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_shell_imports_trio() -> None:
    wrong = [
        f"{name}:{line}"
        for name, imported, line in everywhere()
        if matches(imported, "trio") and not any(matches(name, pattern) for pattern in MAY_IMPORT_TRIO)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_crypto_imports_the_cryptographic_libraries() -> None:
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, imported, line in everywhere()
        if any(matches(imported, library) for library in ONLY_IN_CRYPTO) and name != "fedpeer.crypto"
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_a_decoder_that_runs_code() -> None:
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, imported, line in everywhere()
        if any(matches(imported, library) for library in NEVER_IMPORTED)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_evaluates_text_or_loads_objects() -> None:
    wrong = []
    for name, _ in MODULES:
        for node in ast.walk(TREES[name]):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "np.load", "numpy.load", "tempfile.mktemp"):
                wrong.append(f"{name}:{node.lineno} calls {called}")
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and ast.unparse(keyword.value) != "False":
                    wrong.append(f"{name}:{node.lineno} {keyword.arg}={ast.unparse(keyword.value)}")
    assert not wrong, "\n".join(wrong)


def test_algorithms_and_secure_take_chance_and_time_from_peers_only() -> None:
    wrong = []
    for name, _ in MODULES:
        if not (matches(name, "fedpeer.algorithms") or matches(name, "fedpeer.secure")):
            continue
        for imported, line in imports(TREES[name]):
            if imported.split(".")[0] in NEVER_IN_ALGORITHMS:
                wrong.append(f"{name}:{line} imports {imported}")
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.random", "numpy.random"):
                wrong.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_pure_cores_take_time_and_chance_as_arguments() -> None:
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, imported, line in everywhere()
        if any(matches(name, pure) for pure in PURE_WITHOUT_CHANCE)
        and not matches(name, "fedpeer.*.service")
        and imported.split(".")[0] in ("random", "secrets", "time", "socket")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_worker_imports_nothing_of_the_daemon() -> None:
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, imported, line in everywhere()
        if name == "fedpeer.worker.main"
        and imported.split(".")[0] == "fedpeer"
        and not any(matches(imported, allowed) for allowed in WORKER_MAY_IMPORT)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif("fedpeer.worker.main" not in TREES, reason="there is no worker")
def test_an_interpreter_that_loaded_the_worker_and_every_algorithm_holds_no_trio_and_nothing_of_the_daemon() -> None:
    algorithms = [name for name, _ in MODULES if matches(name, "fedpeer.algorithms")]
    program = (
        "import importlib, sys\n"
        f"for name in ['fedpeer.worker.main', *{algorithms!r}]: importlib.import_module(name)\n"
        "print('\\n'.join(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = out.split()
    assert "fedpeer.worker.main" in loaded
    wrong = [name for name in loaded if any(matches(name, never) for never in NEVER_IN_A_WORKER)]
    assert not wrong, wrong


def test_no_module_is_named_for_nothing() -> None:
    lost = {"utils", "util", "common", "helpers", "base", "manager", "core", "misc"}
    assert not [name for name, _ in MODULES if lost & set(name.split("."))]


def test_every_module_says_what_it_is() -> None:
    assert not [name for name, path in MODULES if path.read_text().strip() and not ast.get_docstring(TREES[name])]
