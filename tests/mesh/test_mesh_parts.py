"""The pure parts of the mesh: letters as bytes, files on their way, statements with more than one signature."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeer.crypto import Secret, SigningKey, hash_
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, TrustError
from fedpeer.mesh import mail, records
from fedpeer.mesh.blobs import Fetched, Incoming
from fedpeer.mesh.mail import Place, pack, unpack
from fedpeer.mesh.messages import LetterHead
from fedpeer.mesh.records import Record, Shelf, sign
from fedpeer.store import Schema, Store, Transaction

PLACE = Place(b"scope", "fit", "alice", "bob", 3)
KEY = SigningKey(Secret(bytes(32)))


@given(st.text(max_size=64), st.binary(max_size=100), st.lists(st.binary(max_size=50), max_size=5))
def test_a_letter_is_what_was_packed(tag, header, buffers) -> None:
    letter = unpack(PLACE, pack(PLACE, tag, header, buffers))
    assert (letter.seq, letter.tag, letter.header, [bytes(b) for b in letter.buffers]) == (3, tag, header, buffers)


def test_a_letter_cut_or_extended_at_any_byte_is_none() -> None:
    packed = pack(PLACE, "t", b"header", [b"one", b"two"])
    for wrong in [*(packed[:n] for n in range(len(packed))), packed + b"x"]:
        with pytest.raises(RemoteProtocolError):
            unpack(PLACE, wrong)


@pytest.mark.parametrize("field", ["scope", "stage", "sender", "receiver", "seq"])
def test_a_letter_belongs_at_one_place(field) -> None:
    other = PLACE._replace(**{field: 4 if field == "seq" else b"x" if field == "scope" else "x"})
    with pytest.raises(RemoteProtocolError, match="belongs elsewhere"):
        unpack(other, pack(PLACE, "t", b"", []))


@pytest.mark.parametrize(
    ("tag", "header", "buffers"), [("x" * 65, b"", []), ("t", bytes((1 << 20) + 1), []), ("t", b"", [b""] * 4097)]
)
def test_a_letter_beyond_the_caps_is_refused_where_it_is_posted(tag, header, buffers) -> None:
    with pytest.raises(LocalProtocolError):
        pack(PLACE, tag, header, buffers)


def test_the_expected_letter_is_kept_a_repetition_is_not_and_a_gap_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, [mail.SCHEMA])

    def come(seq: int) -> bool:
        head = LetterHead("fit", seq, 1, b"")
        return store.write_now(lambda tx: mail.deliver(tx, PLACE._replace(seq=seq), head, bytes([seq])))

    assert [come(seq) for seq in (0, 0, 1, 0, 1, 2)] == [True, False, True, False, False, True]
    with pytest.raises(RemoteProtocolError):
        come(4)
    for seq in range(3):
        assert store.write_now(lambda tx: mail.first(tx, b"scope", "fit", "alice")) == (seq, b"", bytes([seq]))
        store.write_now(lambda tx, seq=seq: mail.take(tx, b"scope", "fit", "alice", seq))
    assert [come(seq) for seq in (1, 2, 3)] == [False, False, True]  # taken ones do not come back
    store.close()


def test_only_the_next_piece_of_a_file_is_written(tmp_path: Path) -> None:
    data = bytes(range(100))
    digest = hash_("fp.file", data)
    path = Fetched(tmp_path).path_of(b"s", digest)
    path.parent.parent.mkdir()
    incoming = Incoming(path, digest, 100)
    assert incoming.write(digest, 0, memoryview(data[:40]))
    for offset in (0, 39, 41, 60):
        assert not incoming.write(digest, offset, memoryview(data[:10]))
    assert not incoming.write(bytes(32), 40, memoryview(data[40:50]))
    with pytest.raises(RemoteProtocolError, match="longer"):
        incoming.write(digest, 40, memoryview(bytes(61)))
    incoming.close()
    incoming = Incoming(path, digest, 100)  # another start of the daemon
    assert incoming.offset == 40
    assert incoming.write(digest, 40, memoryview(data[40:]))
    assert incoming.complete
    assert not path.exists()
    assert incoming.finish()
    assert path.read_bytes() == data
    incoming.close()


def test_a_file_of_another_digest_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "s" / "d"
    incoming = Incoming(path, hash_("fp.file", b"right"), 5)
    incoming.write(incoming.digest, 0, memoryview(b"wrong"))
    assert not incoming.finish()
    assert (incoming.offset, path.exists()) == (0, False)
    incoming.write(incoming.digest, 0, memoryview(b"right"))
    assert incoming.finish()
    incoming.close()


def test_a_statement_with_two_signatures_is_one_statement(tmp_path: Path) -> None:
    store = Store(tmp_path, [records.SCHEMA])
    first = sign(KEY, Record(b"s", "vote", "1", "alice", b"yes"))
    other = records.parse(first.raw[:-1] + bytes([first.raw[-1] ^ 1]))
    assert other.digest == first.digest
    store.write_now(lambda tx: records.open_(tx, b"s", ["alice"]))
    outcomes = [store.write_now(lambda tx, s=s: records.keep(tx, s)) for s in (first, other, first)]
    assert outcomes == ["new", "same", "same"]
    store.close()


def quotas(tx: Transaction) -> tuple[list[tuple], list[tuple]]:
    """What is counted, and what there is."""
    counted = tx.all("SELECT scope, sender, records, bytes FROM mesh_quota ORDER BY 1, 2")
    there = "SELECT scope, sender, COUNT(*), SUM(LENGTH(raw)) FROM mesh_record GROUP BY scope, sender ORDER BY 1, 2"
    return counted, tx.all(there)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["alice", "bob"]), st.integers(0, 5)), max_size=30))
def test_what_a_sender_has_is_counted_as_its_records_come_and_go(events) -> None:
    with tempfile.TemporaryDirectory() as folder, closing(Store(Path(folder), [records.SCHEMA])) as store:
        store.write_now(lambda tx: records.open_(tx, b"s", ["alice", "bob"]))
        for kept, sender, slot in events:
            if kept:
                signed = sign(KEY, Record(b"s", "vote", str(slot), sender, bytes(slot)))
                store.write_now(lambda tx, signed=signed: records.keep(tx, signed))
            else:
                store.write_now(lambda tx, slot=slot: records.discard(tx, b"s", "vote", str(slot)))
            counted, there = store.write_now(quotas)
            assert counted == there


def test_what_was_kept_by_an_earlier_release_is_counted_too(tmp_path: Path) -> None:
    earlier = Schema(records.SCHEMA.name, records.SCHEMA.steps[:2])
    with closing(Store(tmp_path, [earlier])) as store:
        raw = sign(KEY, Record(b"s", "vote", "1", "alice", b"yes")).raw
        store.write_now(
            lambda tx: tx.execute("INSERT INTO mesh_record VALUES (?, ?, ?, ?, ?)", (b"s", "vote", "1", "alice", raw))
        )
    with closing(Store(tmp_path, [records.SCHEMA])) as store:
        assert store.write_now(quotas) == ([(b"s", "alice", 1, len(raw))],) * 2


def test_a_record_with_one_bit_changed_is_not_its_senders() -> None:
    raw = sign(KEY, Record(b"s", "vote", "1", "alice", b"yes")).raw
    for position in range(len(raw)):
        wrong = bytearray(raw)
        wrong[position] ^= 4
        with pytest.raises((RemoteProtocolError, TrustError)):
            records.parse(wrong).verify(KEY.public)


def test_a_shelf_finds_discards_and_says_what_others_lack() -> None:
    shelf = Shelf()
    signed = [sign(KEY, Record(b"s", kind, slot, "alice", b"")) for kind in ("a", "b") for slot in ("1", "2")]
    assert [shelf.add(s) for s in signed] == [True] * 4
    assert not shelf.add(signed[0])
    assert {s.digest for s in shelf.missing({signed[0].digest})} == {s.digest for s in signed[1:]}
    shelf.discard("a", "1")
    assert shelf.bodies("a") == {("2", "alice"): b""}
    assert shelf.get("a", "1", "alice") is None
    assert shelf.get("b", "1", "alice") == signed[2]
