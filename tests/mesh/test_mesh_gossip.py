"""Records and files among peers that are not all connected: lines, stars, rings, random graphs, cuts, and liars."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from mesh_cast import SCOPE, Organization, homes, introduce

from fedpeer import codec
from fedpeer.crypto import SIGNATURE_BYTES, hash_, verify
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, SessionError, TrustError
from fedpeer.identity import Card
from fedpeer.mesh import gossip, records
from fedpeer.mesh.gossip import Neighbours, bits_of, peers_of
from fedpeer.mesh.messages import HELLO, RECORDS, SYNC, WANTS, Chunk, Hello, Near, Sync, Want
from fedpeer.mesh.records import Record
from fedpeer.mesh.session.service import Session
from fedpeer.testing.network import MemoryNetwork
from fedpeer.wire.service import Link, initiate

NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
Edge = tuple[str, str]
LARGE = Random(5).randbytes(300_000)


def line(*names: str) -> set[Edge]:
    return set(pairwise(names))


def full(names: tuple[str, ...]) -> set[Edge]:
    return set(combinations(names, 2))


@dataclass
class Heard:
    """What came to each peer, counted where it comes."""

    records: Counter[tuple[str, str]] = field(default_factory=Counter)  # (hearer, slot)
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)  # (hearer, sayer)


@dataclass
class Web:
    """Organizations, all with the cards of all; connected are those of `edges`."""

    cast: dict[str, Organization]
    network: MemoryNetwork
    edges: set[Edge]
    nursery: trio.Nursery
    heard: Heard

    def __getitem__(self, name: str) -> Organization:
        return self.cast[name]

    def rewire(self, edges: set[Edge]) -> None:
        for pair in combinations(self.cast, 2):
            now = pair in edges or pair[::-1] in edges
            before = pair in self.edges or pair[::-1] in self.edges
            if before and not now:
                self.network.cut(*pair)
            elif now and not before:
                self.network.heal(*pair)
        self.edges = set(edges)

    async def until_connected(self) -> None:
        """Every edge is a session, and both sides know that the scope is open over there."""
        for one, other in self.edges:
            for a, b in ((self[one], self[other]), (self[other], self[one])):
                await a.until_connected(b)
                while b.id not in a.mesh.scopes[SCOPE].neighbours:
                    await trio.sleep(0.01)
        await trio.sleep(0.1)

    def holders(self, kind: str, slot: str, sender: str) -> set[str]:
        """Who can read this record."""
        return {
            name for name, one in self.cast.items() if one.mesh.find(SCOPE, kind, slot, self[sender].id) is not None
        }

    async def until_read(self, slot: str, sender: str, *readers: str, within: float) -> None:
        with trio.fail_after(within):
            for name in readers or self.cast:
                await self[name].until_held("note", slot, self[sender])


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard()
    came, sync = Session._on_message, Session._sync_came

    async def on_message(self: Session, name, header, payload) -> None:
        if name == RECORDS:
            heard.records[self._mesh.roster.me.name, records.parse(payload).record.slot] += 1
        await came(self, name, header, payload)

    async def sync_came(self: Session, message: Sync) -> None:
        heard.syncs[self._mesh.roster.me.name, self._mesh.roster.name_of(self.peer)] += 1
        await sync(self, message)

    monkeypatch.setattr(Session, "_on_message", on_message)
    monkeypatch.setattr(Session, "_sync_came", sync_came)
    return heard


@pytest.fixture
def never_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the Sync of once in a while."""
    monkeypatch.setattr(gossip, "LOOK_S", 1e9)


@asynccontextmanager
async def web(names: tuple[str, ...], edges: set[Edge], heard: Heard, *, opened: bool = True) -> AsyncIterator[Web]:
    network = MemoryNetwork()
    with homes() as home, trio.fail_after(100_000):
        async with trio.open_nursery() as nursery:
            cast = {name: Organization(name, home, network.host(name), f"{name}:7420") for name in names}
            it = Web(cast, network, full(names), nursery, heard)
            it.rewire(edges)
            for one in cast.values():
                await one.start(nursery, connect=False)
            await introduce(*cast.values())
            for one in cast.values():
                if opened:
                    await one.open(*(other for other in cast.values() if other is not one))
                await one.connect(nursery)
            if opened:
                await it.until_connected()
            yield it
            nursery.cancel_scope.cancel()
        for one in cast.values():
            assert one.log.faults == []


# pure decisions


@given(st.lists(st.text(max_size=3), unique=True, max_size=40), st.data())
def test_a_bitmap_names_peers_of_the_audience_and_nobody_else(audience, data) -> None:
    peers = data.draw(st.sets(st.sampled_from(audience))) if audience else set()
    assert peers_of(audience, bits_of(audience, {*peers, "a stranger"})) == peers
    assert peers_of(audience, b"\xff" * 32) == set(audience)
    assert peers_of(audience, b"") == set()


def test_a_record_is_left_to_its_signer_where_that_is_known_to_be_connected() -> None:
    audience = ["a", "b", "c", "d", "e"]
    mine = Neighbours("a", audience)
    for peer, near in {"b": "ac", "c": "ab", "d": "a"}.items():
        assert mine.meet(peer, bits_of(audience, set(near)))
    note = partial(Record, b"s", "note", "")
    assert mine.receivers(note("b", b""), "b") == ["d"]  # c has it from b
    assert mine.receivers(note("b", b""), "d") == []
    assert mine.receivers(note("e", b""), "c") == ["b", "d"]
    assert mine.receivers(note("a", b""), None) == ["b", "c", "d"]
    assert mine.receivers(note("a", b""), "b") == ["c", "d"]  # our own, which this disk has lost
    assert mine.part("b")
    assert not mine.part("b")
    assert mine.receivers(note("b", b""), "d") == []  # c still says that it has b
    assert not mine.meet("c", bits_of(audience, {"a", "e"}))
    assert mine.receivers(note("b", b""), "d") == ["c"]


def test_a_directed_record_is_told_to_those_that_are_needed_for_it() -> None:
    audience = ["a", "b", "c", "d", "e"]
    mine = Neighbours("a", audience)
    for peer, near in {"b": "ac", "c": "ab", "d": "a"}.items():
        mine.meet(peer, bits_of(audience, set(near)))
    to_b, to_e, from_e = (Record(b"s", "note", "", x, b"", y) for x, y in (("a", "b"), ("a", "e"), ("e", "b")))
    assert mine.receivers(to_b, None) == ["b"]
    assert [mine.answers(to_b, peer, ()) for peer in "bcd"] == [True, False, False]
    assert [mine.lists(to_b, peer) for peer in "bcd"] == [True, False, False]
    assert [mine.answers(to_b, peer, audience) for peer in "bcd"] == [True, False, False]
    assert mine.receivers(to_e, None) == ["b", "c", "d"]
    mine.meet("c", bits_of(audience, {"e"}))
    assert mine.receivers(to_e, None) == ["c"]
    assert [mine.answers(to_e, peer, ()) for peer in "bcd"] == [False, True, False]
    assert [mine.answers(to_e, peer, audience) for peer in "bcd"] == [True, True, True]
    assert mine.gained == {("c", "e")}
    assert (mine.detours(to_e), mine.detours(to_b)) == (["c"], [])
    mine.gained.clear()
    assert mine.detours(to_e) == []
    mine.lost.add("e")
    assert mine.detours(to_e) == ["c"]
    assert mine.receivers(from_e, "c") == ["b"]
    mine.meet("b", bits_of(audience, {"e"}))
    assert mine.receivers(from_e, "c") == []


# passing on


@pytest.mark.parametrize(
    "edges",
    [
        line(*NAMES[:5]),
        {("alice", name) for name in NAMES[1:5]},
        line(*NAMES[:5], "alice"),
        full(NAMES[:5]) - {("alice", "bob")},
    ],
    ids=["line", "star", "ring", "one edge short of all"],
)
async def test_in_any_connected_graph_everybody_gets_everything(edges, heard, never_look, autojump_clock) -> None:
    async with web(NAMES[:5], edges, heard) as it:
        for name, one in it.cast.items():
            await one.publish("note", name, name.encode())
        for name in it.cast:
            await it.until_read(name, name, within=1)
        neighbours = Counter(name for edge in edges for name in edge)
        assert all(count <= neighbours[name] for (name, _), count in heard.records.items())


@pytest.mark.parametrize("count", [2, 3, 5, 8])
async def test_in_a_full_mesh_no_record_is_sent_twice(count, heard, never_look, autojump_clock) -> None:
    names = NAMES[:count]
    async with web(names, full(names), heard) as it:
        before = sum(one.connections.traffic()[0] for one in it.cast.values())
        for number, (name, one) in enumerate(it.cast.items()):
            await one.publish("note", name, Random(number).randbytes(20_000))
        for name in names:
            await it.until_read(name, name, within=1)
        await trio.sleep(10)
        sent = sum(one.connections.traffic()[0] for one in it.cast.values()) - before
        assert count * (count - 1) * 20_000 < sent < count * (count - 1) * 20_300
        assert set(heard.records.values()) == {1}
        assert len(heard.records) == count * (count - 1)


async def test_a_peer_that_was_away_gets_each_record_about_once(heard, never_look, autojump_clock) -> None:
    names = NAMES[:6]
    async with web(names, full(names), heard) as it:
        await it["frank"].stop()
        for number in range(20):
            for name in names[:5]:
                await it[name].publish("note", f"{name} {number}", bytes(100))
        await trio.sleep(5)
        heard.records.clear()
        await it["frank"].start(it.nursery)
        for number in range(20):
            for name in names[:5]:
                await it.until_read(f"{name} {number}", name, within=10)
        await trio.sleep(10)
        assert {hearer for hearer, _ in heard.records} == {"frank"}
        assert 100 <= sum(heard.records.values()) <= 200  # the first to be connected tells all it has


async def test_a_peer_that_opens_the_scope_late_gets_each_record_once(heard, never_look, autojump_clock) -> None:
    names = NAMES[:6]
    async with web(names, full(names), heard, opened=False) as it:
        await trio.sleep(60)
        everybody = list(it.cast.values())
        for one in everybody[:5]:
            await one.open(*(other for other in everybody if other is not one))
        await trio.sleep(1)
        for name in names[:5]:
            for number in range(20):
                await it[name].publish("note", f"{name} {number}", bytes(100))
        await trio.sleep(1)
        await it["frank"].open(*everybody[:5])
        await trio.sleep(1)
        assert len(it["frank"].mesh.held(SCOPE, "note")) == 100
        assert set(heard.records.values()) == {1}


async def test_what_was_lost_with_a_connection_is_asked_for_where_it_is(heard, never_look, autojump_clock) -> None:
    names = NAMES[:4]
    async with web(names, full(names), heard) as it:
        it.network.cut("alice", "dave", silent=True)  # both still think that they are connected
        await it["alice"].publish("note", "1", b"x")
        await it.until_read("1", "alice", "bob", "carol", within=1)
        await trio.sleep(5)
        assert it.holders("note", "1", "alice") == {"alice", "bob", "carol"}
        await it.until_read("1", "alice", within=60)  # as soon as dave notices
        assert not it["dave"].connections.connected(it["alice"].id)
        await it["alice"].publish("note", "2", b"x")
        await it.until_read("2", "alice", within=1)  # and from now on it is passed on at once


async def test_connections_that_come_and_go_do_not_make_a_storm_of_syncs(heard, never_look, autojump_clock) -> None:
    names = NAMES[:6]
    async with web(names, full(names), heard) as it:
        heard.syncs.clear()
        for _ in range(100):
            for edge in (("alice", "bob"), ("alice", "carol"), ("bob", "carol")):
                it.network.cut(*edge)
                it.network.heal(*edge)
            await trio.sleep(0.1)
        await trio.sleep(1)
        sessions = 2 * it.network.connections
        assert sum(heard.syncs.values()) < sessions + 30 * (11 / gossip.PAUSE_S + 1)
        assert max(heard.syncs["dave", name] for name in ("alice", "bob", "carol")) <= 11 / gossip.PAUSE_S + 1


@dataclass
class Weather:
    """What was done to a web."""

    cuts: int = 0
    kills: int = 0
    said: dict[str, str] = field(default_factory=dict)  # slot: sender
    directed: dict[str, tuple[str, str]] = field(default_factory=dict)  # slot: (sender, addressee)


def connected_graph(names: tuple[str, ...], random: Random) -> set[Edge]:
    """A random tree, and some more."""
    order = random.sample(names, len(names))
    edges = {(random.choice(order[:i]), order[i]) for i in range(1, len(order))}
    return edges | {edge for edge in full(names) if random.random() < 0.2}


async def weather(seed: int, heard: Heard, *, directed: bool) -> Weather:
    random, did = Random(seed), Weather()
    names = NAMES[: random.randint(3, 8)]
    async with web(names, connected_graph(names, random), heard) as it:
        for number in range(40):
            await trio.sleep(random.expovariate(1.5))
            one = it[random.choice(names)]
            match random.randrange(8):
                case 0:
                    before = len(it.edges)
                    it.rewire({edge for edge in connected_graph(names, random) if random.random() < 0.7})
                    did.cuts += before > len(it.edges)
                case 1:
                    await one.stop()
                    await trio.sleep(random.choice([0.0, 0.3, 3.0]))
                    await one.start(it.nursery)
                    did.kills += 1
                case 2 | 3 if directed:
                    to = random.choice([name for name in names if name != one.name])
                    did.directed[str(number)] = (one.name, to)
                    await one.store.write(
                        lambda tx, n=number, one=one, to=to: one.mesh.publish(
                            tx, SCOPE, "note", str(n), random.randbytes(50), to=it[to].id
                        )
                    )
                case _:
                    did.said[str(number)] = one.name
                    await one.publish("note", str(number), random.randbytes(random.choice([0, 100, 5000])))
        it.rewire(connected_graph(names, random))
        for slot, sender in did.said.items():
            await it.until_read(slot, sender, within=5000 if directed else 180)
        for slot, (sender, to) in did.directed.items():
            await it.until_read(slot, sender, to, within=5000)
        await trio.sleep(10)
        for slot, ends in did.directed.items():
            assert it.holders("note", slot, ends[0]) == set(ends)
    return did


@pytest.mark.system  # chaos
@pytest.mark.parametrize("seeds", [range(n, n + 8) for n in range(0, 16, 8)], ids=lambda r: f"{r[0]} to {r[-1]}")
async def test_everybody_ends_with_everything_whatever_was_cut_or_killed(
    seeds, heard, never_look, autojump_clock
) -> None:
    did = [await weather(seed, heard, directed=False) for seed in seeds]
    assert sum(d.cuts for d in did) >= 5
    assert sum(d.kills for d in did) >= 10
    assert sum(len(d.said) for d in did) >= 100


@pytest.mark.parametrize("seeds", [range(n, n + 8) for n in range(100, 108, 8)], ids=lambda r: f"{r[0]} to {r[-1]}")
async def test_directed_records_come_to_their_addressee_and_are_shown_to_nobody_else(
    seeds, heard, autojump_clock
) -> None:
    did = [await weather(seed, heard, directed=True) for seed in seeds]
    assert sum(len(d.directed) for d in did) >= 40


# directed records


async def tell(it: Web, sender: str, to: str, slot: str, body: bytes = b"x") -> None:
    one = it[sender]
    await one.store.write(lambda tx: one.mesh.publish(tx, SCOPE, "note", slot, body, to=it[to].id))


async def test_a_directed_record_is_seen_by_nobody_else_while_the_pair_is_connected(heard, autojump_clock) -> None:
    names = NAMES[:5]
    async with web(names, full(names), heard) as it:
        await tell(it, "alice", "bob", "1")
        await it.until_read("1", "alice", "bob", within=1)
        await it["carol"].stop()
        await it["carol"].start(it.nursery)
        await trio.sleep(20 * gossip.LOOK_S)
        assert heard.records == {("bob", "1"): 1}
        for name in ("carol", "dave", "erin"):
            rows = await it[name].store.read(lambda tx: tx.all("SELECT slot FROM mesh_record"))
            assert rows == []


async def test_a_directed_record_takes_the_one_way_that_is_known_and_relays_do_not_show_it(
    heard, never_look, autojump_clock
) -> None:
    names = NAMES[:5]
    async with web(names, full(names) - {("alice", "bob"), ("bob", "dave"), ("bob", "erin")}, heard) as it:
        await tell(it, "alice", "bob", "1")
        await it.until_read("1", "alice", "bob", within=1)
        await trio.sleep(10)
        assert heard.records == {("bob", "1"): 1, ("carol", "1"): 1}
        mesh = it["carol"].mesh
        assert mesh.find(SCOPE, "note", "1", it["alice"].id) is None
        assert mesh.held(SCOPE, "note") == {}
        assert mesh.since(SCOPE, "note", 0) == ([], 0)
        await it["bob"].stop()
        await trio.sleep(10)
        await it["bob"].start(it.nursery)
        await trio.sleep(10)
        assert heard.records == {("bob", "1"): 1, ("carol", "1"): 1}  # bob's Sync says that it is there
        await it["carol"].stop()
        await it["carol"].start(it.nursery)
        assert it["carol"].mesh.held(SCOPE, "note") == {}


async def test_a_directed_record_goes_along_a_line_to_a_peer_that_comes_later(
    heard, never_look, autojump_clock
) -> None:
    async with web(NAMES[:4], line(*NAMES[:4]), heard) as it:
        await it["dave"].stop()
        await trio.sleep(1)
        await tell(it, "alice", "dave", "1")
        await trio.sleep(1)
        assert heard.records == {("bob", "1"): 1, ("carol", "1"): 1}
        await it["dave"].start(it.nursery)
        await it.until_read("1", "alice", "dave", within=60)


async def test_a_directed_record_that_was_lost_with_the_connection_takes_a_detour(
    heard, never_look, autojump_clock
) -> None:
    names = NAMES[:3]
    async with web(names, full(names), heard) as it:
        it.network.cut("alice", "bob", silent=True)
        await tell(it, "alice", "bob", "1")
        await trio.sleep(1)
        assert it.holders("note", "1", "alice") == {"alice"}
        await it.until_read("1", "alice", "bob", within=60)


async def test_who_is_not_of_the_audience_is_no_addressee(heard, autojump_clock) -> None:
    async with web(NAMES[:2], full(NAMES[:2]), heard) as it:
        alice = it["alice"]
        for to in (alice.id, "fp1nobody"):
            with pytest.raises(LocalProtocolError, match="not another peer"):
                await alice.store.write(lambda tx, to=to: alice.mesh.publish(tx, SCOPE, "note", "1", b"", to=to))


# the contract


@pytest.mark.parametrize("kept_s", [0, 1], ids=["kept at once", "kept a little after it was opened"])
@pytest.mark.parametrize("edges", [line(*NAMES[:4]), full(NAMES[:4])], ids=["line", "full mesh"])
async def test_a_contract_comes_once_to_each_participant_also_where_its_initiator_cannot_reach(
    edges, kept_s, heard, autojump_clock
) -> None:
    names = NAMES[:4]
    async with web(names, edges, heard, opened=False) as it:

        async def consider(one: Organization, record: Record) -> None:
            await trio.sleep(5 * names.index(one.name))
            await one.open(*(other for other in it.cast.values() if other is not one), scope=record.scope)
            if kept_s:
                await trio.sleep(kept_s)  # others may tell the contract again

        for one in it.cast.values():
            one.mesh.on_unknown_scope = partial(consider, one)
        await it["alice"].open(*(it[name] for name in names[1:]))
        await it["alice"].publish("contract", "", b"all four")
        with trio.fail_after(60):
            for one in it.cast.values():
                while one.mesh.find(SCOPE, "contract", "", it["alice"].id) is None:
                    await trio.sleep(1)
        assert heard.records.keys() == {(name, "") for name in names[1:]}
        assert kept_s or set(heard.records.values()) == {1}
        await it["dave"].publish("note", "yes", b"")
        await it.until_read("yes", "dave", within=5)


# the feed


async def test_the_feed_gives_every_record_once_and_in_the_order_in_which_it_came(heard, autojump_clock) -> None:
    async with web(NAMES[:3], line(*NAMES[:3]), heard) as it:
        alice, carol = it["alice"], it["carol"]
        assert carol.mesh.since(SCOPE, "note", 0) == ([], 0)
        position, came = 0, []
        for number in (3, 1, 2):
            await alice.publish("note", str(number), bytes([number]))
            await alice.publish("vote", str(number), b"")
            await it.until_read(str(number), "alice", within=1)
            new, position = carol.mesh.since(SCOPE, "note", position)
            came += new
        assert came == [(alice.id, str(number), bytes([number])) for number in (3, 1, 2)]
        assert carol.mesh.since(SCOPE, "note", position) == ([], position)
        assert carol.mesh.since(SCOPE, "note", 0) == (came, position)
        assert carol.mesh.since(SCOPE, "note", 1) == (came[1:], position)
        await carol.store.write(lambda tx: carol.mesh.discard(tx, SCOPE, "note", "1"))
        assert carol.mesh.since(SCOPE, "note", 0) == ([came[0], came[2]], position)
        await carol.stop()
        await carol.start(it.nursery, connect=False)
        assert {slot for _, slot, _ in carol.mesh.since(SCOPE, "note", 0)[0]} == {"3", "2"}
        assert carol.mesh.since(b"closed", "note", 7) == ([], 7)
        await carol.connect(it.nursery)


async def test_what_is_under_a_prefix_is_discarded_with_the_commit_and_nothing_else(heard, autojump_clock) -> None:
    async with web(NAMES[:3], line(*NAMES[:3]), heard) as it:
        carol = it["carol"]
        for slot in ("a%/1", "a%/2", "a_/1", "b/a%/", "A%/1", "a%"):
            await it["alice"].publish("note", slot, b"")
            await it["alice"].publish("vote", slot, b"")
        await tell(it, "alice", "bob", "a%/3")
        await trio.sleep(1)

        def fail(tx) -> None:
            carol.mesh.discard_under(tx, SCOPE, "note", "a%/")
            raise KeyError

        with pytest.raises(KeyError):
            await carol.store.write(fail)
        assert len(carol.mesh.held(SCOPE, "note")) == 6
        carol.mesh.refuse(SCOPE, lambda record: record.kind == "note" and record.slot.startswith("a%/"))
        await carol.store.write(lambda tx: carol.mesh.discard_under(tx, SCOPE, "note", "a%/"))
        for restarted in (False, True):
            assert {slot for slot, _ in carol.mesh.held(SCOPE, "note")} == {"a_/1", "b/a%/", "A%/1", "a%"}
            assert {slot for _, slot, _ in carol.mesh.since(SCOPE, "note", 0)[0]} == {"a_/1", "b/a%/", "A%/1", "a%"}
            assert len(carol.mesh.held(SCOPE, "vote")) == 6
            if not restarted:
                await carol.stop()
                await carol.start(it.nursery, connect=False)
        await carol.connect(it.nursery)


# seals


def seal_all(it: Web, kind: str = "own") -> list[str]:
    """Bodies of this kind are a signature over all that a record says, and then the content. Who verified is noted."""
    verified: list[str] = []

    def check(name: str, record: Record, card: Card) -> None:
        verified.append(name)
        what = codec.encode([record.scope, record.kind, record.slot, record.sender, record.to, record.body[64:]])
        verify(card.body.signing, "test", what, record.body[:64])

    for name, one in it.cast.items():
        one.mesh.seal(kind, partial(check, name), lambda _record: None)
    return verified


def sealed_body(one: Organization, slot: str, content: bytes, to: str = "") -> bytes:
    what = codec.encode([SCOPE, "own", slot, one.id, to, content])
    return one.identity.signing.sign("test", what) + content


async def test_a_sealed_record_is_signed_once_and_verified_once_by_each(heard, autojump_clock) -> None:
    names = NAMES[:4]
    async with web(names, line(*names), heard) as it:
        verified = seal_all(it)
        body = sealed_body(it["alice"], "1", b"content")
        await it["alice"].publish("own", "1", body)
        for name in names:
            assert await it[name].until_held("own", "1", it["alice"]) == body
        assert verified == list(names[1:])
        (raw,) = await it["dave"].store.read(lambda tx: tx.one("SELECT raw FROM mesh_record"))
        assert raw == codec.encode(Record(SCOPE, "own", "1", it["alice"].id, body))
        await it["dave"].stop()
        await it["dave"].start(it.nursery, connect=False)  # no seal is registered yet
        assert it["dave"].mesh.find(SCOPE, "own", "1", it["alice"].id) == body
        await it["dave"].connect(it.nursery)


async def test_a_record_is_taken_in_the_form_of_its_kind_only(heard, autojump_clock) -> None:
    names = NAMES[:3]
    for wrong in ("signed", "sealed", "another slot", "another addressee"):
        async with web(names, full(names), heard) as it:
            seal_all(it)
            alice, bob = it["alice"], it["bob"]
            body = sealed_body(alice, "1", b"content")
            raw = {
                "signed": records.sign(alice.identity.signing, Record(SCOPE, "own", "1", alice.id, body)),
                "sealed": records.seal(Record(SCOPE, "note", "1", alice.id, body)),
                "another slot": records.seal(Record(SCOPE, "own", "2", alice.id, body)),
                "another addressee": records.seal(Record(SCOPE, "own", "1", alice.id, body, bob.id)),
            }[wrong].raw
            session = bob.connections.sessions[alice.id]
            with suppress(SessionError):
                await alice.connections.sessions[bob.id].link.send(RECORDS, b"", raw)
            await trio.sleep(0.01)
            assert bob.connections.sessions.get(alice.id) is not session
            assert bob.mesh.held(SCOPE, "own") == bob.mesh.held(SCOPE, "note") == {}


async def test_two_sealed_records_in_one_slot_are_evidence(heard, autojump_clock) -> None:
    async with web(NAMES[:2], full(NAMES[:2]), heard) as it:
        seal_all(it)
        alice, bob = it["alice"], it["bob"]
        raws = [records.seal(Record(SCOPE, "own", "1", alice.id, sealed_body(alice, "1", c))).raw for c in (b"a", b"b")]
        for raw in raws:
            await alice.connections.sessions[bob.id].link.send(RECORDS, b"", raw)
        await trio.sleep(1)
        assert await bob.store.read(lambda tx: tx.all("SELECT first, second FROM mesh_evidence")) == [tuple(raws)]


@given(st.binary(max_size=300), st.sampled_from(["", "bob"]))
def test_the_two_forms_of_a_record_cannot_be_taken_for_each_other(body, to) -> None:
    record = Record(b"s", "kind", "slot", "alice", body, to)
    sealed = records.seal(record)
    assert (sealed.record, sealed.signature) == (record, b"")
    signed = records.parse(sealed.raw + bytes(SIGNATURE_BYTES))
    assert (signed.record, signed.signature, signed.digest) == (record, bytes(SIGNATURE_BYTES), sealed.digest)
    for wrong in (sealed.raw + bytes(63), sealed.raw + bytes(65), sealed.raw[:-1], bytes(64), b""):
        with pytest.raises(RemoteProtocolError):
            records.parse(wrong)


# liars


@dataclass
class Mallory:
    """Bare links of one peer of the audience to some of a web, who says what it likes."""

    it: Web
    name: str
    links: dict[str, Link] = field(default_factory=dict)
    wants: list[tuple[str, Want]] = field(default_factory=list)
    heard: list[tuple[str, Record]] = field(default_factory=list)

    @property
    def who(self) -> Organization:
        return self.it[self.name]

    async def connect(self, name: str, *near: str) -> None:
        """Say hello, and that the scope is open here, and to whom we are connected."""
        stream = await self.it.network.host(f"bare {self.name}").connect(f"{name}:7420")
        link = self.links[name] = await initiate(stream, self.who.identity.dh, self.it[name].identity.dh.public)
        self.it.nursery.start_soon(self._serve, name)
        await link.send(HELLO, b"", codec.encode(Hello([1], bytes(8), 0)))
        audience = self.it[name].mesh.scopes[SCOPE].audience
        bits = bits_of(audience, {self.it[n].id for n in (name, *near)})
        await link.send(SYNC, codec.encode(Near(SCOPE, True, bits)))
        await link.send(SYNC, b"", codec.encode(Sync(SCOPE, b"", [], b"", True)))
        await trio.sleep(0.1)

    async def _serve(self, name: str) -> None:
        async def note(channel, header, payload) -> None:
            if channel == WANTS:
                self.wants.append((name, codec.decode_as(Want, payload)))
            if channel == RECORDS:
                self.heard.append((name, records.parse(payload).record))

        with suppress(SessionError):
            await self.links[name].run(note)

    async def say(self, name: str, raw: bytes) -> None:
        with suppress(SessionError):
            await self.links[name].send(RECORDS, b"", raw)
        await trio.sleep(0.01)


@asynccontextmanager
async def with_mallory(names: tuple[str, ...], edges: set[Edge], heard: Heard) -> AsyncIterator[tuple[Web, Mallory]]:
    """The last of the names is mallory's, whose own daemon does not run."""
    async with web(names, edges, heard) as it:
        mallory = it[names[-1]]
        await mallory.stop()
        await trio.sleep(1)
        yield it, Mallory(it, names[-1])
        await mallory.start(it.nursery, connect=False)


async def test_a_signer_that_tells_one_only_is_heard_by_all_in_a_while(heard, autojump_clock) -> None:
    names = NAMES[:4]
    async with with_mallory(names, full(names), heard) as (it, mallory):
        for name in names[:3]:
            await mallory.connect(name, *names[:3])
        who = mallory.who.identity
        await mallory.say("alice", records.sign(who.signing, Record(SCOPE, "note", "1", who.id, b"")).raw)
        await trio.sleep(1)
        assert it["bob"].mesh.held(SCOPE, "note") == {}  # it is connected to mallory, so mallory tells it
        with trio.fail_after(4 * gossip.LOOK_S):
            for name in names[:3]:
                await it[name].until_held("note", "1", mallory.who)


async def test_a_relay_that_drops_delays_and_one_that_corrupts_ends_its_own_session(heard, autojump_clock) -> None:
    names = NAMES[:4]  # alice - bob - carol, and dave, who is mallory's, beside both ends
    async with with_mallory(names, line(*names[:3]), heard) as (it, mallory):
        await mallory.connect("alice", "carol")
        await mallory.connect("carol", "alice")
        await it["alice"].publish("note", "1", b"true")
        await it.until_read("1", "alice", *names[:3], within=1)
        raw = records.sign(it["alice"].identity.signing, Record(SCOPE, "note", "2", it["alice"].id, b"true")).raw
        await mallory.say("carol", raw.replace(b"true", b"lies"))
        assert not it["carol"].connections.connected(mallory.who.id)
        assert it["carol"].mesh.find(SCOPE, "note", "2", it["alice"].id) is None
        assert it["carol"].connections.connected(it["bob"].id)


async def test_a_relay_that_lies_about_its_connections_only_delays_a_directed_record(heard, autojump_clock) -> None:
    names = NAMES[:5]  # alice - bob - carol - dave; erin, who is mallory's, beside alice claims dave
    async with with_mallory(names, line(*names[:4]), heard) as (it, mallory):
        await mallory.connect("alice", "dave")
        await tell(it, "alice", "dave", "1", b"for dave")
        await trio.sleep(1)
        assert [record.slot for _, record in mallory.heard] == ["1"]
        assert heard.records[("bob", "1")] == 0
        await it.until_read("1", "alice", "dave", within=10 * gossip.LOOK_S)
        await it["bob"].publish("note", "2", b"")
        await it.until_read("2", "bob", *names[:4], within=1)


async def test_relayed_records_count_against_the_caps_of_their_sender(heard, autojump_clock, monkeypatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORDS", 5)
    names = NAMES[:3]
    async with with_mallory(names, {("alice", "bob")}, heard) as (it, mallory):
        await mallory.connect("alice")
        who = mallory.who.identity
        for number in range(10):
            record = Record(SCOPE, "note", str(number), who.id, b"", it["bob"].id)
            await mallory.say("alice", records.sign(who.signing, record).raw)
        await trio.sleep(1)
        rows = await it["alice"].store.read(lambda tx: tx.all("SELECT slot FROM mesh_record"))
        assert len(rows) == len(it["bob"].mesh.held(SCOPE, "note")) == 5
        stranger = records.sign(who.signing, Record(SCOPE, "note", "x", who.id, b"", "fp1stranger"))
        await it["alice"].store.write(lambda tx: it["alice"].mesh.discard(tx, SCOPE, "note", "0"))
        await mallory.say("alice", stranger.raw)
        assert len(await it["alice"].store.read(lambda tx: tx.all("SELECT slot FROM mesh_record"))) == 4


# files


def passing(one: Organization) -> list[Path]:
    return list((one.folder / "passing").glob("*"))


async def test_a_file_comes_over_a_neighbour_of_its_holder_and_nothing_stays_there(heard, autojump_clock) -> None:
    async with web(NAMES[:4], line(*NAMES[:3]) | {("carol", "dave")}, heard) as it:
        digest = await it["alice"].offer(LARGE)
        path = await it["carol"].mesh.files.fetch(SCOPE, digest, len(LARGE), [it["alice"].id])
        assert path.read_bytes() == LARGE
        await trio.sleep(1)
        assert passing(it["bob"]) == []
        assert list((it["bob"].folder / "fetched").rglob("*")) == []
        with trio.move_on_after(500) as patience:  # two hops are one too many
            await it["dave"].mesh.files.fetch(SCOPE, digest, len(LARGE), [it["alice"].id])
        assert patience.cancelled_caught
        with trio.fail_after(100):  # the longest pause between two dials is 90 s
            it.rewire({*it.edges, ("alice", "dave")})
            await it["dave"].mesh.files.fetch(SCOPE, digest, len(LARGE), [it["alice"].id])


async def test_a_transfer_over_a_relay_goes_on_where_it_was_after_a_cut(heard, autojump_clock) -> None:
    async with web(NAMES[:3], line(*NAMES[:3]), heard) as it:
        digest = await it["alice"].offer(LARGE)
        it.network.limits = lambda _from, _to: (200_000, 200_000)
        it.network.cut("bob", "carol")
        it.network.heal("bob", "carol")
        before = it["alice"].connections.traffic()[0]
        path = await it["carol"].mesh.files.fetch(SCOPE, digest, len(LARGE), [it["alice"].id])
        assert path.read_bytes() == LARGE
        assert len(LARGE) < it["alice"].connections.traffic()[0] - before < 1.8 * len(LARGE)
        await trio.sleep(60)
        assert passing(it["bob"]) == []


async def test_a_file_has_the_digest_that_its_asker_computes(heard, autojump_clock) -> None:
    def digest_of(view: memoryview) -> bytes:
        return hash_("fp.test", view)

    async with web(NAMES[:3], line(*NAMES[:3]), heard) as it:
        alice = it["alice"]
        name = await alice.store.put_file(LARGE, digest_of(memoryview(LARGE)))
        assert name == digest_of(memoryview(LARGE))
        await alice.store.write(lambda tx: alice.mesh.files.offer(tx, SCOPE, name, len(LARGE)))
        for one in ("bob", "carol"):
            path = await it[one].mesh.files.fetch(SCOPE, name, len(LARGE), [alice.id], digest_of=digest_of)
            assert path.read_bytes() == LARGE
        false = await alice.store.put_file(b"false", bytes(32))
        await alice.store.write(lambda tx: alice.mesh.files.offer(tx, SCOPE, false, 5))
        with pytest.raises(TrustError, match="alice sent another file"):
            await it["bob"].mesh.files.fetch(SCOPE, false, 5, [alice.id], digest_of=digest_of)


async def serve_falsely(mallory: Mallory, data: bytes, served: int) -> None:
    """Answer every Want with the first so many bytes of this."""
    answered = 0
    while True:
        for name, want in mallory.wants[answered:]:
            answered += 1
            piece = data[want.offset : served]
            with suppress(SessionError):
                chunk = Chunk(want.digest, want.offset if piece else -1)
                await mallory.links[name].send(("blob", want.lane), codec.encode(chunk), piece, bulk=True)
        await trio.sleep(0.01)


@pytest.mark.parametrize("served", [1000, 400], ids=["a whole file", "the beginning of one"])
async def test_a_wrong_file_over_a_relay_convicts_nobody_and_comes_another_way(served, heard, autojump_clock) -> None:
    names = NAMES[:4]  # alice - bob - carol; dave, who is mallory's, beside carol claims alice
    async with with_mallory(names, line(*names[:3]), heard) as (it, mallory):
        it.rewire({("alice", "bob")})
        await trio.sleep(1)
        await mallory.connect("carol", "alice")
        it.rewire({("alice", "bob"), ("bob", "carol")})  # the second to be asked
        await it.until_connected()
        it.nursery.start_soon(serve_falsely, mallory, bytes(1000), served)
        for number in range(6):
            data = Random(number).randbytes(1000)
            digest = await it["alice"].offer(data)
            with trio.fail_after(100):
                path = await it["carol"].mesh.files.fetch(SCOPE, digest, len(data), [it["alice"].id])
            assert path.read_bytes() == data
        assert mallory.wants
        await it["bob"].stop()
        with trio.move_on_after(100) as patience:  # there is no other way, and still nobody is convicted
            await it["carol"].mesh.files.fetch(SCOPE, bytes(32), 1000, [it["alice"].id])
        assert patience.cancelled_caught
        assert len(mallory.wants) < 400
        await it["bob"].start(it.nursery)


async def test_what_passes_is_bounded_by_what_was_asked_for_and_goes_with_the_session(heard, autojump_clock) -> None:
    names = ("alice", "bob", "dave", "carol")  # carol, who is mallory's, asks bob for files of alice
    async with with_mallory(names, line("alice", "bob"), heard) as (it, mallory):
        await mallory.connect("bob")
        digest = await it["alice"].offer(LARGE)
        session = it["bob"].connections.sessions[it["alice"].id]
        link = mallory.links["bob"]

        async def ask(want: Want) -> None:
            await link.send(WANTS, b"", codec.encode(want))

        for size in (0, 1000, 1 << 32):  # another size than the file has
            await ask(Want(0, SCOPE, digest, 0, size, it["alice"].id))
            await trio.sleep(1)
        assert it["bob"].connections.sessions[it["alice"].id] is session, "the holder is not to blame"
        for lane in (0, 1, 2, 0, 1, 2, 0):  # the holder has nothing of it and says so; a lane has one file
            await ask(Want(lane, SCOPE, bytes([lane]) * 32, 0, 1 << 32, it["alice"].id))
            assert len(passing(it["bob"])) <= 3
        await trio.sleep(1)
        assert passing(it["bob"]) == []
        for holder in (it["dave"].id, "fp1nobody", mallory.who.id, it["bob"].id):
            await ask(Want(0, SCOPE, digest, 0, len(LARGE), holder))  # one that bob is not connected to
            await trio.sleep(1)
            assert passing(it["bob"]) == []
        it.network.cut("alice", "bob", silent=True)
        await ask(Want(1, SCOPE, digest, 0, len(LARGE), it["alice"].id))
        await trio.sleep(1)
        assert len(passing(it["bob"])) == 1
        it["bob"].connections.sessions[mallory.who.id].end("for the test")
        await trio.sleep(0.1)
        assert passing(it["bob"]) == []
