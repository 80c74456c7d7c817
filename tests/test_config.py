"""fedpeer.toml: what may stand in it, what is said when something else does, and where the files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeer import config
from fedpeer.errors import ConfigError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDPEER_HOME", "FEDPEER_SOCKET", "CREDENTIALS_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)


def write(home: Path, text: str) -> Path:
    home.mkdir(exist_ok=True)
    (home / "fedpeer.toml").write_text(text)
    return home


def test_a_new_file_is_loaded_as_it_was_asked_for(tmp_path: Path) -> None:
    home = tmp_path / "home"
    text = config.new_file(home, name="clinic", listen=["tcp://127.0.0.1:7000"], addresses=["[::1]:7000"])
    loaded = config.write_new(home, text)
    assert (loaded.name, loaded.listen, loaded.addresses) == ("clinic", ("127.0.0.1:7000",), ("[::1]:7000",))
    assert loaded.log_level == "info"
    assert (home.stat().st_mode & 0o777, (home / "state").stat().st_mode & 0o777) == (0o700, 0o700)
    assert (home / "fedpeer.toml").stat().st_mode & 0o777 == 0o600


def test_every_setting_stands_in_a_new_file_with_its_comment(tmp_path: Path) -> None:
    lines = config.new_file(tmp_path, name="clinic", listen=None, addresses=[]).splitlines()
    for name in config.Settings.__struct_fields__:
        at = next(i for i, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{name} = "))
        assert lines[at - 1].startswith("# ")
    assert '# listen = ["0.0.0.0:7420"]' in lines, "a default is shown and left out"


def test_a_second_peer_in_the_same_home_is_refused(tmp_path: Path) -> None:
    config.write_new(tmp_path, config.new_file(tmp_path, name="a", listen=None, addresses=[]))
    before = (tmp_path / "fedpeer.toml").read_bytes()
    with pytest.raises(ConfigError, match="a peer here already"):
        config.new_file(tmp_path, name="b", listen=None, addresses=[])
    with pytest.raises(ConfigError, match="exists"):
        config.write_new(tmp_path, 'name = "b"')
    assert (tmp_path / "fedpeer.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ('name = "a"\nlisten_on = []', "unknown key 'listen_on'", "did you mean 'listen'?"),
        ('name = "a"\nadresses = []', "unknown key 'adresses'", "did you mean 'addresses'?"),
        ('name = "a"\ntelemetry = true', "unknown key 'telemetry'", "known: name, listen"),
        ("listen = []", "missing required field `name`", ""),
        ('name = "a"\nlisten = "0.0.0.0:1"', r"Expected `array`, got `str` - at `\$.listen`", ""),
        ('name = "a"\nlog_level = "loud"', r"loud.*at `\$.log_level`", ""),
        ('name = "A B"', "'A B' is not a name for a peer", "e.g. hospital-a"),
        ('name = "a"\nlisten = ["7420"]', "'7420' is not an address", "host:port"),
        ('name = "a"\naddresses = ["h:99999"]', "'h:99999' is not an address", "host:port"),
        ('name = "a', "is not TOML", ""),
        ("name = 'a'\nname = 'b'", "is not TOML", ""),
    ],
)
def test_a_wrong_entry_is_refused_by_name_with_the_file_and_a_hint(
    tmp_path: Path, text: str, said: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(write(tmp_path, text))
    assert str(tmp_path / "fedpeer.toml") in caught.value.message
    assert hint in caught.value.hint


def test_what_is_wrong_is_found_before_anything_is_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for wrong in ({"name": "A"}, {"name": "a", "listen": ["nonsense"]}, {"name": "a", "addresses": ["x"] * 9}):
        with pytest.raises(ConfigError):
            config.new_file(home, **{"listen": None, "addresses": [], **wrong})  # type: ignore[arg-type]
    assert not home.exists()


def test_a_folder_that_is_no_home_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the home of a peer") as caught:
        config.load(tmp_path)
    assert "fedpeer init" in caught.value.hint


def test_a_socket_path_is_refused_from_108_bytes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, fits in ((107, True), (108, False)):
        home = Path("/" + "ä" * 20 + "x" * (size - len("/" + "ää" * 20 + "/admin/admin.sock")))
        assert len(bytes(home / "admin" / "admin.sock")) == size
        if fits:
            assert config.socket_of(home) == home / "admin" / "admin.sock"
        else:
            with pytest.raises(ConfigError, match="at most 107") as caught:
                config.socket_of(home)
            assert "FEDPEER_SOCKET" in caught.value.hint
    monkeypatch.setenv("FEDPEER_SOCKET", "/run/short.sock")
    assert config.socket_of(Path("/" + "x" * 200)) == Path("/run/short.sock")


def test_the_home_is_the_option_then_the_environment_then_the_platforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/alice")
    assert config.find_home() == Path("/home/alice/.local/state/fedpeer")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/alice/state")
    assert config.find_home() == Path("/home/alice/state/fedpeer")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert config.find_home() == Path("/var/lib/fedpeer")
    monkeypatch.setenv("FEDPEER_HOME", "/srv/peer")
    assert config.find_home() == Path("/srv/peer")
    assert config.find_home(tmp_path) == tmp_path


def test_each_value_tells_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = write(tmp_path / "home", 'name = "a"\nlisten = []')
    loaded = config.load(home)
    assert loaded.origin.keys() == set(config.Config.__struct_fields__) - {"origin"}
    assert (loaded.origin["listen"], loaded.origin["addresses"]) == ("fedpeer.toml", "default")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "identity.key").touch()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    monkeypatch.setenv("FEDPEER_SOCKET", "/run/x.sock")
    loaded = config.load(home)
    assert (loaded.key_file, loaded.origin["key_file"]) == (credentials / "identity.key", "systemd credential")
    assert (loaded.socket, loaded.origin["socket"]) == (Path("/run/x.sock"), "FEDPEER_SOCKET")


def test_a_client_takes_the_systems_socket_only_when_no_peer_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "system.sock"
    monkeypatch.setattr(config, "SYSTEM_SOCKET", system)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    own = tmp_path / "fedpeer" / "admin" / "admin.sock"
    assert config.find_socket() == own
    system.touch()
    assert config.find_socket() == system
    assert config.find_socket(tmp_path / "other") == tmp_path / "other" / "admin" / "admin.sock"
    own.parent.mkdir(parents=True)
    own.touch()
    assert config.find_socket() == own
