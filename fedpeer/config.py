"""Where a peer's files lie, and fedpeer.toml as one frozen record.

Rules
* A peer is its home: `fedpeer.toml`, `identity.key`, `state/`, and `admin/admin.sock` in a folder of its own. Home is
  --home, else FEDPEER_HOME, else the platform's state directory.
* The file's keys are the fields of `Settings`; the comment of a key and its default stand side by side there and
  nowhere else. An unknown key is refused with the nearest known one: a misspelt setting is never silently a default.
* FEDPEER_SOCKET moves the admin socket, for the daemon and for its clients; a credential of systemd (identity.key)
  takes the place of the key file. Nothing else comes from the environment.

Identities are imported only where a whole configuration is read: a command that asks the daemon starts without them.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fedpeer import systemd
from fedpeer.errors import ConfigError

FILE = "fedpeer.toml"
KEY_FILE = "identity.key"
MAX_FILE = 64 * 1024
MAX_SOCKET_PATH = 107
"""bytes; the address of a unix socket has 108 with its final zero"""

SYSTEM_SOCKET = Path("/run/fedpeer-admin/admin.sock")
"""where systemd/fedpeer-admin.socket listens"""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What fedpeer.toml may say."""

    name: Annotated[
        str, msgspec.Meta(description="What the other organizations call this peer: a-z, 0-9 and hyphens, at most 32.")
    ]
    listen: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            description="Where this peer waits for others, as host:port; [] to wait nowhere and only dial.",
            max_length=8,
        ),
    ] = ("0.0.0.0:7420",)
    addresses: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            description="Where others can dial this peer, as host:port. They are part of its card: after a change,\n"
            "give the new card (fedpeer card) to the others. [] if nobody can: then this peer dials them.",
            max_length=8,
        ),
    ] = ()
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        msgspec.Meta(description="How much the log tells: debug, info, warning or error."),
    ] = "info"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The effective configuration of one peer. Paths are absolute, addresses "host:port"."""

    home: Path
    name: str
    listen: tuple[str, ...]
    addresses: tuple[str, ...]
    state: Path
    key_file: Path
    socket: Path
    log_level: str
    origin: dict[str, str]
    """for each of the fields above, where its value is from"""


def find_home(option: Path | None = None) -> Path:
    """The home of the peer that is meant: `option`, else FEDPEER_HOME, else the platform's state directory."""
    if option is not None:
        return option.absolute()
    if named := os.environ.get("FEDPEER_HOME"):
        return Path(named).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/fedpeer")
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "fedpeer"


def socket_of(home: Path) -> Path:
    """The admin socket of the peer in `home`; FEDPEER_SOCKET overrides. Raises ConfigError when it is too long."""
    return check_socket(Path(os.environ.get("FEDPEER_SOCKET") or home / "admin" / "admin.sock").absolute())


def find_socket(option: Path | None = None) -> Path:
    """Where a client finds the daemon: the socket of `find_home(option)`, else, if no home was named, the system's."""
    path = socket_of(find_home(option))
    named = option or os.environ.get("FEDPEER_HOME") or os.environ.get("FEDPEER_SOCKET")
    return SYSTEM_SOCKET if not named and not _exists(path) and _exists(SYSTEM_SOCKET) else path


def check_socket(path: Path) -> Path:
    """`path` itself, when a unix socket can have it. Raises ConfigError with the remedy."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        raise ConfigError(
            f"the path of the admin socket has {size} bytes, at most {MAX_SOCKET_PATH} are possible: {path}",
            hint="take a shorter --home, or set FEDPEER_SOCKET=/run/user/…/fedpeer.sock for daemon and clients alike",
        )
    return path


def load(home: Path) -> Config:
    """The configuration of the peer in `home`. Raises ConfigError naming the file and the entry."""
    given = _read(home / FILE)
    settings = _check(given, f"{home / FILE}: ")
    key_file = systemd.credential(KEY_FILE)
    origin = {name: FILE if name in given else "default" for name in Settings.__struct_fields__}
    return Config(
        home=home,
        name=settings.name,
        listen=settings.listen,
        addresses=settings.addresses,
        log_level=settings.log_level,
        state=home / "state",
        key_file=key_file or home / KEY_FILE,
        socket=socket_of(home),
        origin=origin
        | {
            "home": "the command line or the environment",
            "state": "home",
            "key_file": "systemd credential" if key_file else "home",
            "socket": "FEDPEER_SOCKET" if os.environ.get("FEDPEER_SOCKET") else "home",
        },
    )


def new_file(home: Path, *, name: str, listen: Sequence[str] | None, addresses: Sequence[str]) -> str:
    """The commented text of a fedpeer.toml for a new peer; `listen` None leaves the default.

    Everything that could be wrong is found here, before anything is written. Raises ConfigError.
    """
    path = home / FILE
    if path.exists():
        raise ConfigError(f"{path} exists: there is a peer here already", hint="another --home makes another peer")
    socket_of(home)
    given: dict[str, Any] = {"name": name, "addresses": list(addresses)}
    if listen is not None:
        given["listen"] = list(listen)
    return _text(_check(given, ""))


def write_new(home: Path, text: str) -> Config:
    """Write the text of `new_file` into `home`, and load it; never overwrites a file. Raises ConfigError."""
    path = home / FILE
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        (home / "state").mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return load(home)


def nearest(word: str, known: list[str]) -> str:
    """A hint naming the known word that `word` may have been meant to be, else all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} is not the home of a peer: it has no {FILE}",
            hint="fedpeer init --name NAME makes one; --home or FEDPEER_HOME names another",
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="run it as the user whose peer this is") from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"{path} has more than {MAX_FILE} bytes")
    try:
        return tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _check(given: dict[str, Any], where: str) -> Settings:
    from fedpeer.identity import check_name, split_address

    known = list(Settings.__struct_fields__)
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}unknown key {key!r}", hint=nearest(key, known))
    try:
        settings = msgspec.convert(given, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}{error}") from None
    try:
        check_name(settings.name)
        for address in (*settings.listen, *settings.addresses):
            split_address(address)
    except ConfigError as error:
        raise ConfigError(f"{where}{error.message}", hint=error.hint) from None
    return msgspec.structs.replace(
        settings,
        listen=tuple(address.removeprefix("tcp://") for address in settings.listen),
        addresses=tuple(address.removeprefix("tcp://") for address in settings.addresses),
    )


def _text(settings: Settings) -> str:
    """The settings as commented TOML; what is only a default is there too, commented out."""
    lines = [
        "# The configuration of this peer. The daemon reads it at its start; `fedpeer config show` tells the effect."
    ]
    for field in msgspec.inspect.type_info(Settings).fields:  # type: ignore[attr-defined]
        comment = (field.type.extra_json_schema or {})["description"]
        value = getattr(settings, field.name)
        unchanged = not field.required and value == field.default
        lines += ["", *(f"# {line}" for line in comment.splitlines())]
        lines.append(f"{'# ' if unchanged else ''}{field.name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
