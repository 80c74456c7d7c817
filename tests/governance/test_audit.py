"""The audit log: appended to only, and every change is found, with the entry that was changed."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedpeer import codec
from fedpeer.crypto import Secret, hash_
from fedpeer.errors import AuditBroken, TrustError
from fedpeer.governance import audit, export, heads, tree
from fedpeer.governance.heads import Cosign, Known, SignedHead
from fedpeer.identity import Identity
from fedpeer.mesh import records
from fedpeer.store import Store

JOB = b"j" * 32
Rows = list[tuple[int, bytes, bytes]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, [records.SCHEMA, audit.SCHEMA, heads.SCHEMA])
    yield opened
    opened.close()


def append(store: Store, event: str, job: bytes | None = JOB, **facts: Any) -> int:
    return store.write_now(lambda tx: audit.append(tx, "2026-01-01T00:00:00Z", event, job, facts))


def fill(store: Store, count: int) -> list[audit.Head]:
    """Entries, and the head after each."""

    def write(tx: Any) -> list[audit.Head]:
        made = []
        for i in range(count):
            audit.append(tx, "2026-01-01T00:00:00Z", "happened", JOB, {"i": i})
            made.append(audit.head(tx))
        return made

    return store.write_now(write)


def rows_of(store: Store) -> Rows:
    return store.write_now(lambda tx: audit.stored(tx, 1, 10**6))


def check(rows: Rows, signed: dict[int, list[tuple[bytes, str]]] | None = None) -> audit.Head:
    checker = audit.Checker(signed or {})
    for row in rows:
        checker.add(*row)
    return checker.end()


def broken(rows: Rows, signed: dict[int, list[tuple[bytes, str]]] | None = None) -> AuditBroken:
    with pytest.raises(AuditBroken) as caught:
        check(rows, signed)
    return caught.value


def made_anew(bodies: list[bytes]) -> Rows:
    """What a forger does who knows the format: all hashes from the bodies."""
    log = tree.Growing()
    return [(i, body, b"".join(log.add(tree.leaf(i, body)))) for i, body in enumerate(bodies, start=1)]


def by_bob(*made: audit.Head) -> dict[int, list[tuple[bytes, str]]]:
    return {head.number: [(head.digest, "bob")] for head in made}


# the log


def test_what_was_appended_is_read_in_order_by_job_and_from_the_end(store: Store) -> None:
    made = fill(store, 9)
    append(store, "peer_added", None, uid=7)
    read = store.write_now(audit.entries)
    assert [entry.number for entry in read] == list(range(1, 11))
    assert [entry.facts for entry in read] == [*({"i": i} for i in range(9)), {"uid": 7}]
    assert [e.number for e in store.write_now(lambda tx: audit.entries(tx, job=JOB, since=4))] == [4, 5, 6, 7, 8, 9]
    assert [e.number for e in store.write_now(lambda tx: audit.entries(tx, limit=3))] == [8, 9, 10]
    assert store.write_now(lambda tx: audit.find(tx, 11)) is None
    assert check(rows_of(store)[:9]) == made[-1]
    assert store.write_now(lambda tx: audit.head(tx, 4)) == made[3]


def test_an_entry_shares_the_fate_of_its_transaction(store: Store) -> None:
    def fails(tx: Any) -> None:
        audit.append(tx, "t", "never", None, {})
        raise ValueError

    append(store, "kept")
    with pytest.raises(ValueError):
        store.write_now(fails)
    assert append(store, "kept") == 2
    assert check(rows_of(store)).number == 2


def test_the_table_refuses_a_change_and_a_removal(store: Store) -> None:
    fill(store, 2)
    for sql in ("UPDATE audit_entry SET body = x'00' WHERE number = 1", "DELETE FROM audit_entry WHERE number = 2"):
        with pytest.raises(sqlite3.IntegrityError, match="only appended"):
            store.write_now(lambda tx, sql=sql: tx.execute(sql))
    assert len(rows_of(store)) == 2


@pytest.mark.parametrize(
    "facts",
    [
        {"text": "x" * 1_000_000, "kept": 1},
        {f"key{i}": "y" * 150 for i in range(100)},
        {"deep": [[[[[[[[[[[[1]]]]]]]]]]]], "kept": 1},
        {"huge": 1 << 80, "kept": 1},
        {"values": [float("nan")] * 5000, "kept": 1},
    ],
)
def test_facts_that_are_too_large_are_told_by_digest_and_can_be_read(store: Store, facts: dict[str, Any]) -> None:
    append(store, "large", **facts)
    (entry,) = store.write_now(audit.entries)
    assert len(rows_of(store)[0][1]) <= audit.MAX_ENTRY
    assert entry.facts.get("kept", 1) == 1
    assert [value for value in entry.facts.values() if isinstance(value, dict) and "digest" in value]


def test_the_hash_of_an_entry_tells_nothing_of_it(store: Store) -> None:
    assert append(store, "same") == 1
    first = rows_of(store)[0][1]
    other = codec.encode(msg := audit.read(first)).replace(msg.salt, b"s" * 16)
    assert tree.leaf(1, first) != tree.leaf(1, other)


# what is altered


@given(st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_any_flipped_bit_is_found_and_named(count: int, data: st.DataObject) -> None:
    rows = made_anew([b"body %d" % i for i in range(count)])
    at = data.draw(st.integers(0, count - 1))
    number, body, nodes = rows[at]
    bit = data.draw(st.integers(0, 8 * (len(body) + len(nodes)) - 1))
    changed = bytearray(body + nodes)
    changed[bit // 8] ^= 1 << bit % 8
    rows[at] = number, bytes(changed[: len(body)]), bytes(changed[len(body) :])
    assert broken(rows).number == at + 1


@pytest.mark.parametrize(
    ("alter", "number"),
    [
        (lambda rows: rows.pop(4), 5),
        (lambda rows: rows.insert(4, (5, b"new", tree.leaf(5, b"new"))), 5),
        (lambda rows: rows.insert(4, rows[3]), 4),
        (lambda rows: rows.__setitem__(slice(4, 6), [rows[5], rows[4]]), 5),
        (lambda rows: rows.__setitem__(slice(4, 6), [(5, *rows[5][1:]), (6, *rows[4][1:])]), 5),
        (lambda rows: rows.__setitem__(slice(4, 7), [(5, *rows[6][1:]), rows[5], (7, *rows[4][1:])]), 5),
        (lambda rows: rows.clear(), 1),
        (lambda rows: rows.__delitem__(slice(7, None)), 8),
    ],
    ids=["removed", "inserted", "twice", "reordered", "reordered and renumbered", "exchanged", "emptied", "cut off"],
)
def test_what_is_removed_inserted_reordered_or_cut_off_is_named(
    store: Store, alter: Callable[[Rows], object], number: int
) -> None:
    made = fill(store, 12)
    rows = rows_of(store)
    check(rows, by_bob(made[-1]))
    alter(rows)
    assert broken(rows, by_bob(made[-1])).number == number


def test_a_log_that_was_written_anew_is_found_by_what_partners_signed(store: Store) -> None:
    made = fill(store, 12)
    bodies = [body for _, body, _ in rows_of(store)]
    bodies[6] = bodies[6].replace(b"happened", b"happined")
    forged = made_anew(bodies)
    assert check(forged).number == 12, "nothing but a signature shows it"
    error = broken(forged, by_bob(made[4], made[9], made[11]))
    assert (error.number, "entries 6 to 10" in error.message, "bob" in error.message) == (6, True, True)
    assert broken(forged, by_bob(made[5], made[6])).message.startswith("entry 7 is not")


# the tree


@given(st.integers(1, 200), st.integers(0, 200))
@settings(deadline=None)
def test_a_proof_shows_that_a_log_grew_and_nothing_else(new: int, old: int) -> None:
    log, nodes, roots = tree.Growing(), {}, [tree.EMPTY]
    for number in range(1, new + 1):
        for level, node in enumerate(log.add(hash_("fp.test", number.to_bytes(4, "little")))):
            nodes[level, (number >> level) - 1] = node
        roots.append(log.root())
        assert tree.root(number, lambda *place: nodes[place]) == log.root()
    old = min(old, new)
    proof = tree.prove(old, new, lambda *place: nodes[place])
    assert len(proof) <= 2 * new.bit_length()
    assert tree.grew(old, roots[old], new, roots[new], proof)
    other = hash_("fp.test", b"other")
    if old:
        assert not tree.grew(old, other, new, roots[new], proof)
    if old < new:
        assert not tree.grew(old, roots[old], new, other, proof) or not old
        assert not tree.grew(new, roots[new], old, roots[old], proof)
    assert not tree.grew(old, roots[old], new, roots[new], [*proof, other])
    for i in range(len(proof)):
        assert not tree.grew(old, roots[old], new, roots[new], proof[:i] + proof[i + 1 :])
        assert not tree.grew(old, roots[old], new, roots[new], [*proof[:i], other, *proof[i + 1 :]])


def test_a_proof_from_anybody_takes_bounded_work() -> None:
    assert not tree.grew(1, b"r" * 32, tree.MAX_LEAVES, b"r" * 32, [])
    assert not tree.grew(1, b"r" * 32, 2**40, b"r" * 32, [b"h" * 32] * 97)
    assert not tree.grew(0, b"r" * 32, 5, b"r" * 32, [])


class Log(RuleBasedStateMachine):
    """A store and a list of facts; restarts, harm, and a witness who knows some heads."""

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.oracle: list[dict[str, Any]] = []
        self.witnessed: list[audit.Head] = []
        self._open()

    def _open(self) -> None:
        self.store = Store(Path(self.folder.name), [audit.SCHEMA])

    @rule(facts=st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=10), max_size=3))
    def append(self, facts: dict[str, Any]) -> None:
        self.store.write_now(lambda tx: audit.append(tx, "t", "e", None, facts))
        self.oracle.append(facts)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self._open()

    @rule()
    def witness(self) -> None:
        """The head is shown to begin with all that were seen before, and no other root is."""
        now = self.store.write_now(audit.head)
        for old in self.witnessed:
            proof = self.store.write_now(lambda tx, old=old: audit.prove(tx, old.number, now.number))
            assert tree.grew(old.number, old.digest, now.number, now.digest, proof)
            assert not old.number or not tree.grew(old.number, b"x" * 32, now.number, now.digest, proof)
        self.witnessed.append(now)

    @rule(data=st.data())
    def harm(self, data: st.DataObject) -> None:
        """A copy with one body changed, or another order, is found at the first place that differs."""
        rows = rows_of(self.store)
        if not rows:
            return
        at = data.draw(st.integers(0, len(rows) - 1))
        harmed = list(rows)
        match data.draw(st.sampled_from(["flip", "remove", "swap"])):
            case "flip":
                harmed[at] = (rows[at][0], rows[at][1][:-1] + bytes([rows[at][1][-1] ^ 1]), rows[at][2])
            case "remove":
                del harmed[at]
            case "swap":
                other = data.draw(st.integers(0, len(rows) - 1))
                harmed[at], harmed[other] = harmed[other], harmed[at]
                at = min(at, other)
        if harmed != rows:
            now = self.store.write_now(audit.head)
            assert broken(harmed, by_bob(now)).number == at + 1

    @invariant()
    def is_the_oracle(self) -> None:
        if not hasattr(self, "store"):
            return
        read = self.store.write_now(audit.entries)
        assert [(entry.number, entry.facts) for entry in read] == [
            (
                i,
                dict(facts)
                if all(-(2**63) <= v < 2**64 for v in facts.values() if isinstance(v, int))
                else entry.facts,
            )
            for i, (facts, entry) in enumerate(zip(self.oracle, read, strict=True), start=1)
        ]
        head = check(rows_of(self.store), {h.number: [(h.digest, "bob")] for h in self.witnessed if h.number})
        assert head == self.store.write_now(audit.head)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestLog = Log.TestCase
TestLog.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)


# heads


def point(head: audit.Head) -> heads.Point:
    return head.number, head.digest


def test_only_what_shows_all_that_is_known_is_taken(store: Store) -> None:
    made = fill(store, 20)
    known = {point(made[6]), point(made[12])}
    head, growths = store.write_now(lambda tx: heads.shown(tx, known))
    assert heads.only_grew(known, head, growths)
    assert heads.only_grew({point(made[19])}, head, [])
    assert not heads.only_grew(known | {(3, made[4].digest)}, head, growths)
    assert not heads.only_grew(known, head, [])
    assert not heads.only_grew({(7, b"f" * 32)}, head, growths)
    assert not heads.only_grew({(25, b"f" * 32)}, head, growths), "it was longer before"
    assert store.write_now(lambda tx: heads.begins_with(tx, {*known, (25, b"f" * 32), (7, b"f" * 32)})) == known


def test_proofs_for_many_partners_are_several_records_that_fit(store: Store) -> None:
    made = fill(store, 600)
    head, growths = store.write_now(lambda tx: heads.shown(tx, map(point, made)))
    assert head.growths == len(growths) > 1
    assert max(len(codec.encode(growth)) for growth in growths) <= records.MAX_BODY
    assert heads.only_grew(set(map(point, made)), head, growths)


def test_tips_are_what_no_later_head_was_shown_to_begin_with(store: Store) -> None:
    def known() -> tuple[heads.Named, ...]:
        return store.write_now(lambda tx: heads.known(tx, ["bob", "carol"])).heads

    first, second, third = (1, b"1" * 32), (2, b"2" * 32), (3, b"3" * 32)
    for begins, to in (((), first), ((first,), second), ((first,), third)):
        store.write_now(lambda tx, begins=begins, to=to: heads.move_tip(tx, "bob", begins, to))
    assert known() == (("bob", *second), ("bob", *third)), "two logs, or two jobs side by side: the next head must join"
    store.write_now(lambda tx: heads.move_tip(tx, "bob", [second, third], (9, b"9" * 32)))
    assert known() == (("bob", 9, b"9" * 32),)
    assert store.write_now(lambda tx: heads.accept(tx, "bob")) == [(9, b"9" * 32)]
    assert known() == ()


def test_of_each_participant_a_bounded_number_of_heads_is_answered() -> None:
    flood = Known(tuple(("me", i + 1, b"h" * 32) for i in range(500)))
    assert len(heads.named([flood, flood], "me")) == heads.MAX_TIPS


# elsewhere, with public keys only

ALICE, BOB, EVE = (Identity(Secret(name * 4)) for name in (b"alice---", b"bob-----", b"eve-----"))


def record(signer: Identity, kind: str, slot: str, body: codec.Record) -> bytes:
    return records.sign(signer.signing, records.Record(JOB, kind, slot, signer.id, codec.encode(body))).raw


def witnessed(store: Store, *numbers: int, by: Identity = BOB) -> None:
    """Alice signs these heads, and bob co-signs them."""
    for number in numbers:
        head = store.write_now(lambda tx, number=number: audit.head(tx, number))
        signed = SignedHead(head.number, head.digest, 0)
        cosign = record(by, heads.COSIGN, str(number), Cosign(((ALICE.id, *point(head)),)))

        def keep(tx: Any, signed: SignedHead = signed, cosign: bytes = cosign, head: audit.Head = head) -> None:
            heads.keep(tx, ALICE.id, signed, record(ALICE, heads.HEAD, str(head.number), signed), JOB, "")
            heads.co_signed(tx, ALICE.id, point(head), by.id, cosign, by.card("bob").text)

        store.write_now(keep)


def lines_of(store: Store, *, redacted: bool = False) -> list[bytes]:
    pages, since, card = b"", 0, ALICE.card("alice").text
    while page := store.write_now(partial(export.page, owner=ALICE.id, card=card, since=since, redacted=redacted)):
        pages += page
        since = since + page.count(b"\n") if since else 1
    return pages.splitlines(keepends=True)


def refused(lines: list[bytes], *more: list[bytes]) -> AuditBroken:
    with pytest.raises(AuditBroken) as caught:
        export.verify([("a.log", lines), *(("b.log", other) for other in more)])
    return caught.value


def test_an_export_verifies_with_public_keys_and_says_who_signed_up_to_where(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE", 7)
    fill(store, 30)
    witnessed(store, 10, 25)
    (log,) = export.verify([("a.log", lines_of(store))])
    assert (log.name, log.entries, log.signed, log.heads) == ("alice", 30, 25, 2)
    assert [(s.id, s.name, s.number) for s in log.cosigners] == [(BOB.id, "bob", 25)]
    (log,) = export.verify([("a.log", lines_of(store))], trusted={EVE.id})
    assert (log.signed, log.cosigners) == (0, [])


def test_a_redacted_export_verifies_and_nothing_of_an_entry_is_in_it(store: Store) -> None:
    fill(store, 30)
    bodies = [body for _, body, _ in store.write_now(lambda tx: audit.stored(tx, 1, 100))]
    witnessed(store, 10, 25)
    lines = lines_of(store, redacted=True)
    (log,) = export.verify([("a.log", lines)])
    assert (log.entries, log.hidden, log.signed) == (30, 30, 25)
    (shown,) = export.verify([("a.log", lines_of(store))])
    assert (shown.hidden, shown.root) == (0, log.root)
    entries = [msgspec.json.decode(line, type=export.Line) for line in lines if b'"number"' in line]
    assert [(line.number, line.entry) for line in entries] == [(number, b"") for number in range(1, 31)]
    assert all(len(line.nodes) % tree.HASH_BYTES == 0 for line in entries)
    assert len({audit.read(body).salt for body in bodies}) == 30  # else a hash could be found by trying


def test_every_flipped_byte_of_an_export_is_found(store: Store) -> None:
    fill(store, 20)
    witnessed(store, 20)
    lines = lines_of(store)
    whole = b"".join(lines)
    first = len(b"".join(lines[:-20]))
    chance = random.Random(5)
    for at in [*range(first, first + 400, 3), *chance.sample(range(len(whole) - 1), 300)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << chance.randrange(8)
        error = refused(bytes(changed).splitlines(keepends=True))
        if at >= first:
            place = whole[:at].count(b"\n") - (len(lines) - 20) + 1
            near = (place, place + 1) if place > 1 else (0, 1, 2)  # what cannot be read may have been a signature
            assert error.number in near, "the first wrong entry is named"


def test_a_log_cut_off_with_its_signatures_is_found_by_the_file_of_a_partner(store: Store, tmp_path: Path) -> None:
    fill(store, 12)
    witnessed(store, 6, 12)
    lines = lines_of(store)
    assert refused(lines[:-3]).number == 10
    cut = [line for line in lines[:-6] if b"head" not in line and b"cosign" not in line]
    assert export.verify([("a.log", cut)])[0].entries == 6
    theirs = Store(tmp_path / "bob", [records.SCHEMA, audit.SCHEMA, heads.SCHEMA])
    witnessed_there = [line for line in lines if b"head" in line or b"cosign" in line or b"card" in line]
    top = export.lines([export.Line(fedpeer_audit=1, owner=BOB.id)])
    theirs.close()
    error = refused(cut, [top, *witnessed_there])
    assert (error.number, "bob" in error.message) == (7, True)


def test_signatures_of_others_and_of_other_things_do_not_count(store: Store) -> None:
    made = fill(store, 5)
    witnessed(store, 5)
    lines = lines_of(store)
    head = SignedHead(5, made[4].digest, 0)
    for raw, kind in (
        (record(EVE, heads.HEAD, "x", head), "head"),  # no card
        (record(ALICE, "other", "x", head), "head"),  # another kind
        (record(EVE, heads.HEAD, "x", head).replace(EVE.id.encode(), ALICE.id.encode()), "head"),  # not her signature
        (record(BOB, heads.COSIGN, "x", head), "cosign"),
    ):
        line = export.lines([export.Line(**{kind: raw})])
        assert "altered" in refused([*lines[:3], line, *lines[3:]]).message
    assert "no audit log" in refused(lines[1:]).message
    assert "newer" in refused([lines[0].replace(b":1,", b":2,"), *lines[1:]]).message
    assert "card of its owner" in refused([lines[0].replace(ALICE.id.encode(), EVE.id.encode()), *lines[1:]]).message
    assert issubclass(AuditBroken, TrustError)
