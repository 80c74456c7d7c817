"""Keys, cards and the file the seed lies in."""

from __future__ import annotations

import base64
import os
import string
from pathlib import Path

import pytest

from fedpeer import codec, identity
from fedpeer.crypto import Secret
from fedpeer.errors import CardError, ConfigError, KeyFileError
from fedpeer.identity import Card, Identity, create_key_file, load_key_file
from fedpeer.words import WORDS

ALICE = Identity(Secret(bytes(range(32))))
CARD = ALICE.card("alice", ("alice.example:7420", "[2001:db8::1]:7420"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    return folder


def test_one_seed_is_one_peer_for_ever() -> None:
    assert ALICE.id == Identity(Secret(bytes(range(32)))).id
    assert Identity(Secret.random()).id != ALICE.id


def test_a_card_comes_back_from_its_line_of_text() -> None:
    again = Card.parse(CARD.text)
    assert again == CARD
    assert again.body.addresses == ("alice.example:7420", "[2001:db8::1]:7420")
    assert "\n" not in CARD.text
    assert Card.parse(f"  {CARD.text[:50]}\n   {CARD.text[50:]}\n") == CARD


def test_a_card_with_one_character_changed_is_refused() -> None:
    alphabet = string.ascii_letters + string.digits + "-_"
    for at in range(len(CARD.text)):
        other = alphabet[(alphabet.find(CARD.text[at]) + 1) % len(alphabet)]
        with pytest.raises(CardError):
            Card.parse(CARD.text[:at] + other + CARD.text[at + 1 :])


@pytest.mark.parametrize("text", ["", "fedpeer-card-1.", "fedpeer-card-1.AAAA", CARD.text[:-1], CARD.text + "A", "é"])
def test_what_is_no_whole_card_is_refused(text: str) -> None:
    with pytest.raises(CardError):
        Card.parse(text)


def test_a_card_whose_id_is_not_that_of_its_keys_is_refused() -> None:
    body = codec.encode([1, Identity(Secret.random()).id, 1, "alice", ALICE.signing.public, ALICE.dh.public, []])
    raw = body + ALICE.signing.sign("card", body)
    with pytest.raises(CardError):
        Card.parse(identity.CARD_PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("="))


def test_a_fingerprint_is_twelve_words_that_differ_between_peers() -> None:
    words = CARD.fingerprint.split()
    assert len(words) == 12
    assert set(words) <= set(WORDS)
    assert Identity(Secret.random()).card("alice").fingerprint != CARD.fingerprint


def test_the_word_list_has_one_word_for_each_byte() -> None:
    assert len(set(WORDS)) == len(WORDS) == 256


@pytest.mark.parametrize("name", ["", "Alice", "a_b", "-a", "a-", "a" * 33, "a b", "ä"])
def test_a_name_that_could_be_mistaken_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        ALICE.card(name)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:99999", "host:x", "h" * 300 + ":1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        identity.split_address(address)


@pytest.mark.parametrize(
    "host",
    ["a..b", ".a", "a" * 64 + ".example", "a\0b", "a b", "a/b", "ä.example", "[a.example]", "[::1", "::1", "[::1%\0]"],
)
def test_a_card_with_a_host_that_cannot_be_is_refused(host: str) -> None:
    with pytest.raises(ConfigError):
        identity.split_address(f"{host}:7420")
    with pytest.raises(CardError):
        ALICE.card("alice", (f"{host}:7420",))


@pytest.mark.parametrize("port", ["٣", "+1", "1_0", " 1"])
def test_a_port_is_ascii_digits(port: str) -> None:
    with pytest.raises(ConfigError):
        identity.split_address(f"a.example:{port}")


@pytest.mark.parametrize(
    "host", ["a" * 63 + ".b-c.my_host", "bank.example.", "10.0.0.1", "2001:db8::1", "fe80::1%eth0"]
)
def test_a_host_is_a_name_or_a_number(host: str) -> None:
    assert identity.split_address(f"tcp://[{host}]:1" if ":" in host else f"tcp://{host}:1") == (host, 1)


def test_a_key_file_is_made_for_its_owner_alone_and_never_overwritten(home: Path) -> None:
    os.umask(0)
    try:
        made = create_key_file(home / "identity.key")
    finally:
        os.umask(0o022)
    assert (home / "identity.key").stat().st_mode & 0o777 == 0o600
    assert load_key_file(home / "identity.key").id == made.id
    before = (home / "identity.key").read_bytes()
    with pytest.raises(KeyFileError, match="exists"):
        create_key_file(home / "identity.key")
    assert (home / "identity.key").read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "remedy"),
    [
        (lambda key: key.chmod(0o640), "chmod 600"),
        (lambda key: key.chmod(0o604), "chmod 600"),
        (lambda key: key.parent.chmod(0o720), "chmod 700"),
        (lambda key: key.parent.chmod(0o702), "chmod 700"),
        (lambda key: key.parent.chmod(0o750), "chmod 700"),
        (lambda key: key.parent.chmod(0o701), "chmod 700"),
        (lambda key: key.parent.parent.chmod(0o720), "chmod go-w"),
        (lambda key: key.parent.parent.chmod(0o702), "chmod go-w"),
        (lambda key: key.unlink() or os.mkfifo(key, 0o600), "put the file itself there"),
        (lambda key: key.rename(key.with_name("k")) and key.symlink_to("k"), "put the file itself there"),
        (lambda key: key.unlink(), "fedpeer init"),
        (lambda key: key.write_text("nonsense"), "restore it"),
        (lambda key: key.write_text(key.read_text()[:-2]), "restore it"),
    ],
)
def test_a_key_file_that_others_could_read_or_replace_is_refused_with_the_remedy(home, spoil, remedy) -> None:
    key = home / "identity.key"
    create_key_file(key)
    spoil(key)
    with pytest.raises(KeyFileError) as refused:
        load_key_file(key)
    assert remedy in refused.value.hint


def test_a_home_in_a_sticky_folder_is_as_good_as_in_ones_own(home: Path) -> None:
    made = create_key_file(home / "identity.key")
    home.parent.chmod(0o1777)
    assert load_key_file(home / "identity.key").id == made.id


def test_no_key_is_made_where_others_could_read_or_replace_it(home: Path) -> None:
    home.chmod(0o755)
    with pytest.raises(KeyFileError, match="entered by others"):
        create_key_file(home / "identity.key")
    assert list(home.iterdir()) == []


def test_the_file_that_was_looked_at_is_the_one_that_is_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = home / "identity.key"
    made, other = create_key_file(key), home / "other"
    create_key_file(other)
    open_ = os.open

    def exchange(path, *how, **more) -> int:
        descriptor = open_(path, *how, **more)
        if other.exists() and path == key:
            key.chmod(0o666)  # what we have opened is no longer good
            other.rename(key)  # and what now lies there is
        return descriptor

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(KeyFileError, match="0666"):
        load_key_file(key)
    assert load_key_file(key).id != made.id


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_key_file_of_another_user_is_refused_with_the_remedy(home: Path) -> None:
    key = home / "identity.key"
    create_key_file(key)
    os.chown(key, 65534, 65534)
    with pytest.raises(KeyFileError, match="belongs to uid 65534"):
        load_key_file(key)


def test_a_credential_of_systemd_is_taken_as_systemd_guards_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = home / "identity.key"
    made = create_key_file(key)
    key.chmod(0o440)
    with pytest.raises(KeyFileError):
        load_key_file(key)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(home))
    assert load_key_file(key).id == made.id
