"""Alignment: the right rows in one order, nothing in a message that its text does not say, and cheats refused."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gmpy2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer import codec, crypto
from fedpeer.algorithms.vertical import _psi, align
from fedpeer.algorithms.vertical.align import Align
from fedpeer.crypto import Secret, hash_
from fedpeer.errors import DataError, RemoteProtocolError
from fedpeer.peers import Peers
from fedpeer.secure import ids as ids_
from fedpeer.secure import psi
from fedpeer.stage import Open, Sealed, Stage, Table
from fedpeer.testing.stages import CAST, Run, check_stage, run_stage
from fedpeer.testing.uniformity import looks_uniform

Ids = Sequence[str | None]


def table(ids: Ids) -> Table:
    columns = {"id": pa.array(ids, pa.string()), "x": pa.array(np.arange(float(len(ids))))}
    return Table(pa.table(columns), id="id")


def roles(n: int) -> dict[str, str]:
    return {alias: "host" if i else "guest" for i, alias in enumerate(CAST[:n])}


def aligned(*ids: Ids, stage: Stage = align.run, params: Align | None = None, **more: Any) -> Run:
    """The run of a guest, alice, with the first ids, and hosts with the others."""
    inputs = {alias: {"table": table(each)} for alias, each in zip(CAST, ids, strict=False)}
    return run_stage(stage, params or Align(min_intersection=0), inputs, roles=roles(len(ids)), **more)


def transferred(*ids: Ids, **more: Any) -> Run:
    """The same of two who take each other to follow the protocol."""
    return aligned(*ids, semi_honest={"alice": ["bob"], "bob": ["alice"]}, **more)


def common_of(run: Run, *ids: Ids) -> list[str | None]:
    """The common ids in their order, which has to be the same at all."""
    orders = []
    for alias, own in zip(CAST, ids, strict=False):
        index = run.outputs[alias]["rows"].index  # type: ignore[union-attr]
        assert index.dtype == np.int64
        orders.append([own[i] for i in index])
    assert all(order == orders[0] for order in orders)
    return orders[0]


def said(run: Run, tag: str, to: str | None = None, sender: str | None = None) -> Any:
    """The one message of this tag."""
    (value,) = [
        each.value for each in run.said if each.tag == tag and to in (None, each.to) and sender in (None, each.sender)
    ]
    return value


def rows_of(value: Any) -> list[bytes]:
    return [row.tobytes() for row in value]


def numbered(*ranges: Iterable[int], seed: int = 1) -> list[list[str]]:
    """Shuffled ids for each range."""
    chance = random.Random(seed)
    lists = [[f"patient-{i:06d}" for i in each] for each in ranges]
    for each in lists:
        chance.shuffle(each)
    return lists


# the right rows


SPLIT = {
    2: numbered(range(0, 10), range(6, 17)),
    3: numbered(range(0, 10), range(3, 15), range(1, 8)),
    4: numbered(range(0, 10), range(3, 15), range(1, 8), range(2, 19)),
}


def test_it_stands_kills_at_every_request_repetition_and_other_processors() -> None:
    def right(outputs: Mapping[str, Mapping[str, Any]]) -> None:
        ids = SPLIT[len(outputs)]
        found = [[own[i] for i in outputs[alias]["rows"].index] for alias, own in zip(outputs, ids, strict=True)]
        assert all(each == found[0] for each in found)
        assert sorted(found[0]) == sorted(set.intersection(*map(set, ids)))

    check_stage(
        align.run,
        Align(min_intersection=0),
        lambda n: {alias: {"table": table(ids)} for alias, ids in zip(CAST, SPLIT[n], strict=False)},
        right,
        roles=roles,
        sizes=(2, 3, 4),
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=10), min_size=2, max_size=4), st.integers(0, 99))
def test_the_intersection_of_any_sets_comes_in_one_order_at_all(sets: list[list[int]], seed: int) -> None:
    ids = [[f"id {i}" for i in each] for each in sets]
    run = aligned(*ids, seed=seed)
    assert sorted(common_of(run, *ids)) == sorted(set.intersection(*map(set, ids)))


def test_the_order_of_the_rows_is_not_that_of_any_table_and_is_another_one_in_each_run() -> None:
    ids = [f"{i:03d}" for i in range(40)]
    orders = [common_of(aligned(ids, ids[::-1], seed=seed), ids, ids[::-1]) for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert ids not in orders
    assert ids[::-1] not in orders


def test_tables_of_very_different_size_are_aligned() -> None:
    (many,) = numbered(range(700))
    for guest, host in ((many, ["patient-000300"]), (["patient-000300"], many)):
        assert common_of(aligned(guest, host), guest, host) == ["patient-000300"]


@pytest.mark.parametrize("n", [2, 3])
def test_nothing_in_common_is_an_empty_alignment_if_that_is_allowed_and_an_error_otherwise(n: int) -> None:
    ids = [["a", "b"], ["c"], []][:n]
    assert common_of(aligned(*ids), *ids) == []
    with pytest.raises(DataError, match="too small: fewer than min_intersection = 1 ids"):
        aligned(*ids, params=Align(min_intersection=1))


def test_with_fewer_in_common_than_agreed_the_hosts_get_no_result() -> None:
    ids = numbered(range(10), range(5, 15))
    assert len(common_of(aligned(*ids, params=Align(min_intersection=5)), *ids)) == 5
    heard: list[Any] = []
    with pytest.raises(DataError, match="too small: fewer than min_intersection = 6 ids"):
        aligned(*ids, params=Align(min_intersection=6), stage=tampered("result", heard.append))
    assert heard == []
    with pytest.raises(DataError, match="min_intersection = 6"):  # and a host does not take one
        aligned(*ids, params=Align(min_intersection=6), stage=lenient_guest())


# ids


@pytest.mark.parametrize(
    ("one", "other", "casefold"),
    [
        ("Müller", "Mu\u0308ller", False),
        ("  4711\t", "4711", False),
        ("\u00a04711\u3000", "4711", False),
        ("ＡＢ１２", "AB12", False),
        ("ﬁne", "fine", False),
        ("Straße", "STRASSE", True),
        ("ΣΊΣΥΦΟΣ", "σίσυφος", True),
        ("x@Example.org", "X@EXAMPLE.ORG", True),
    ],
)
def test_ids_are_one_whatever_unicode_form_they_are_written_in(one: str, other: str, casefold: bool) -> None:
    ids = [["-", one], [other, "+"]]
    run = aligned(*ids, params=Align(casefold=casefold, min_intersection=1))
    assert [run.outputs[alias]["rows"].index.tolist() for alias in ("alice", "bob")] == [[1], [0]]  # type: ignore[union-attr]


def test_ids_that_differ_in_case_zeros_or_inner_space_are_others() -> None:
    assert common_of(aligned(["abc", "07", "a b"], ["ABC", "7", "a  b"]), [], []) == []


def test_rows_without_an_id_are_left_out_and_counted_for_their_owner_only() -> None:
    ids: list[Ids] = [[None, "a", "  ", "b", ""], ["b", None, "c"]]
    run = aligned(*ids)
    assert common_of(run, *ids) == ["b"]
    assert run.progress["alice"][-1].metrics == {"ids": 2.0, "without_id": 3.0, "common": 1.0}
    assert run.progress["bob"][-1].metrics == {"ids": 2.0, "without_id": 1.0, "common": 1.0}
    assert said(run, "guest_size") == [4, False]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_repeated_id_is_refused_at_every_participant_with_its_rows_and_without_its_words(at: int) -> None:
    ids = [["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"]]
    ids[at] = ["a", "ﬁne", "c", " fine"]
    with pytest.raises(DataError, match=r"'id' has one id, in normal form, in rows 1 and 3 \(from 0\)") as error:
        aligned(*ids)
    assert "fine" not in str(error.value)
    assert f"at {CAST[at]}" in error.value.__notes__[0]


def test_more_ids_than_points_can_be_made_of_are_refused_before_anything_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(psi, "MAX_IDS", 16)
    (many,) = numbered(range(17))
    with pytest.raises(DataError, match='has 17 ids; psi = "ecdh" aligns up to 16 a participant'):
        aligned(many, ["a"], stage=tampered("guest_size", heard.append))
    assert heard == []
    with pytest.raises(RemoteProtocolError, match="alice sent not a padded number of at most 16 ids"):
        aligned(["a"], ["a"], stage=tampered("guest_size", lambda _: [20, False]))


def test_nobody_asks_about_more_ids_than_the_contract_says() -> None:
    (many,) = numbered(range(9))
    heard: list[Any] = []
    few = Align(min_intersection=0, max_ids=8)
    assert common_of(aligned(many[:8], many[:3], params=few), many[:8], many[:3])
    with pytest.raises(DataError, match="the table has 9 ids, and max_ids = 8"):
        aligned(many, ["a"], params=few, stage=tampered("guest_size", heard.append))
    assert heard == []
    for by, ids in (("alice", (many, ["a"])), ("bob", (["a"], many))):  # one that does not check itself

        async def run(peers: Peers, params: Align, table: Table, by: str = by) -> dict[str, Any]:
            own = Align(min_intersection=0) if peers.me == by else params
            result: dict[str, Any] = await align.run(peers, own, table)
            return result

        with pytest.raises(RemoteProtocolError, match=f"{by} sent not a padded number of at most 8 ids"):
            aligned(*ids, params=few, stage=dataclasses.replace(align.run, function=run))


def test_a_table_without_a_column_of_ids_as_text_is_refused() -> None:
    for wrong, says in (
        (Table(pa.table({"x": [1.0]})), "no id column"),
        (Table(pa.table({"x": [1.0]}), id="x"), "'x' is double, not text"),
    ):
        with pytest.raises(DataError, match=says):
            run_stage(align.run, Align(), {"alice": {"table": wrong}, "bob": {"table": table(["a"])}}, roles=roles(2))


# what a message tells


def test_every_message_is_declared_and_sealed_or_open_with_a_text() -> None:
    tags = {each.tag for each in aligned(*SPLIT[4]).said}
    tags |= {each.tag for each in transferred(*SPLIT[2], params=Align(min_intersection=0, repeated=True)).said}
    assert tags == set(align.run.messages)
    assert {tag for tag, message in align.run.messages.items() if isinstance(message, Sealed)} == {
        "guest_points",
        "host_points",
        "offer",
        "choices",
        "rows",
    }
    assert all(isinstance(message, Sealed | Open) and message.text for message in align.run.messages.values())


def lengths(run: Run) -> dict[tuple[str, str | None, str], int]:
    packed = [(each, codec.pack_value(each.value)) for each in run.said]
    return {(e.sender, e.to, e.tag): len(header) + sum(map(len, buffers)) for e, (header, buffers) in packed}


def test_all_lengths_but_the_results_follow_from_the_padded_sizes() -> None:
    one = lengths(aligned(*numbered(range(0, 17), range(0, 26), range(0, 40))))
    other = lengths(aligned(*[[f"{i}" for i in range(a, b)] for a, b in ((0, 20), (19, 47), (100, 133))], seed=7))
    assert one.keys() == other.keys()
    assert {key for key in one if one[key] != other[key]} == {("alice", "bob", "result"), ("alice", "carol", "result")}


def test_a_message_is_never_larger_than_declared_for_the_most_ids() -> None:
    for tag, most in {
        "guest_points": (align.BLOCK, 32),
        "host_points": (align.BLOCK, 32),
        "tags": (align.BLOCK, 16),
        "choices": (512, 32),
        "rows": (align.BINS, 64),
    }.items():
        header, buffers = codec.pack_value(np.zeros(most, dtype=np.uint8))
        assert len(header) + sum(map(len, buffers)) <= align.run.messages[tag].max_bytes  # type: ignore[union-attr]
    header, _ = codec.pack_value([bytes(32)] * 200)
    assert len(header) <= align.run.messages["nonces"].max_bytes  # type: ignore[union-attr]


def sealed(run: Run) -> list[bytes]:
    return [row for each in run.said if each.tag.endswith("_points") for row in rows_of(each.value)]


def test_no_sealed_element_is_there_twice_between_hosts_roles_and_runs() -> None:
    ids = numbered(range(40), range(40), range(40))
    elements = [row for seed in (1, 2) for row in sealed(aligned(*ids, seed=seed))]
    assert len(elements) == 2 * 4 * 40
    assert len(set(elements)) == len(elements)


def test_sealed_bytes_look_like_chance_and_every_element_is_a_point_of_the_curve() -> None:
    run = aligned(*numbered(range(1300), range(20)))  # of 1536 guest's points, 236 fill up
    points = said(run, "guest_points")
    assert len(points) == 1536
    assert looks_uniform(np.ascontiguousarray(points[:, :31]).tobytes(), width=31)
    for row in points:
        u = int.from_bytes(row.tobytes(), "little")
        assert gmpy2.jacobi(u**3 + 486662 * u**2 + u, psi.PRIME) == 1


def session_of(run: Run) -> bytes:
    return psi.session_key(dict(zip(run.outputs, said(run, "nonces", to="bob"), strict=True)))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_no_message_holds_an_id_a_hash_of_one_or_its_point_but_for_the_result(n: int) -> None:
    ids = SPLIT[n]
    run = aligned(*ids)
    session, common = session_of(run), set.intersection(*map(set, ids))
    everybody = sorted(set().union(*map(set, ids)))
    names = dict(zip(everybody, names_of(session, everybody), strict=True))
    points = dict(zip(everybody, rows_of(psi.points(uniform_of(session, everybody))), strict=True))
    found = set()
    for each in run.said:
        header, buffers = codec.pack_value(each.value)
        message = b"".join([header, *buffers])
        for name in everybody:
            raw = name.encode()
            canaries = {
                "id": raw,
                "hex": raw.hex().encode(),
                "name": names[name],
                "point": points[name],
                "tag of the point": psi.tags(session, each.sender.encode(), _one(points[name])).tobytes(),
            }
            for label in ("fp.psi1", "fp.psi.id", "fp.psi.order", "fp.psi.tag"):
                canaries |= {f"{label} {key.hex()[:4]}": hash_(label, raw, key=key)[:12] for key in (b"", session)}
                canaries[f"{label} 16"] = hash_(label, raw, key=session, size=16)[:12]
                canaries |= {f"{label} {n}": hash_(label, raw, key=session, size=n)[:12] for n in (48, 64)}
            parts = ids_.digests(session, pa.array([raw], pa.large_binary()))
            canaries |= {"block": parts.blocks.tobytes()[:12], "order": parts.order.tobytes()[:12]}
            found |= {(each.tag, what, name) for what, canary in canaries.items() if canary in message}
    assert {(tag, name) for tag, _, name in found} == {("result", name) for name in common}
    assert {what for _, what, _ in found} == {"name"}


def names_of(session: bytes, ids: Sequence[str]) -> list[bytes]:
    return rows_of(ids_.digests(session, pa.array([name.encode() for name in ids], pa.large_binary())).names)


def uniform_of(session: bytes, ids: Sequence[str]) -> psi.Bytes:
    return psi.uniform_of(session, [name.encode() for name in ids])


def _one(row: bytes) -> psi.Bytes:
    return np.frombuffer(row, dtype=np.uint8).reshape(1, -1)


def test_no_message_holds_a_number_but_the_sizes() -> None:
    for each in aligned(*SPLIT[3]).said:
        if each.tag in ("guest_size", "host_size"):
            assert each.value == [psi.padded(len(SPLIT[3][CAST.index(each.sender)])), False]
        elif each.tag in ("host_nonce", "nonces"):
            nonces = each.value if each.tag == "nonces" else [each.value]
            assert all(isinstance(nonce, bytes) and len(nonce) == 32 for nonce in nonces)
        else:
            assert each.value.dtype == np.uint8
            assert each.value.shape[1] in (16, 32)


def test_points_leave_in_random_order_and_the_result_is_sorted() -> None:
    """By the places of the first row's point, found with the secret scalars that each party drew."""
    ids = [[f"{i}" for i in range(16)], [f"{i}" for i in range(8, 24)]]
    places: dict[str, set[int]] = {"alice": set(), "bob": set()}
    for seed in range(12):
        drawn: dict[str, list[bytes]] = {"alice": [], "bob": []}
        run = aligned(*ids, stage=overheard(drawn), seed=seed)
        for alias, tag, own in zip(places, ("guest_points", "host_points"), ids, strict=True):
            first = psi.points(uniform_of(session_of(run), own[:1]))
            sent = rows_of(said(run, tag))
            (place,) = [
                sent.index(raised)
                for scalar in drawn[alias]
                if (raised := psi.raised(Secret(scalar), first).tobytes()) in sent
            ]
            places[alias].add(place)
        result = rows_of(said(run, "result"))
        assert result == sorted(result)
    assert min(map(len, places.values())) >= 6


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_result_names_what_is_common_to_all_and_nothing_that_only_some_have(n: int) -> None:
    ids = SPLIT[n]
    run = aligned(*ids)
    everybody = sorted(set().union(*map(set, ids)))
    names = dict(zip(names_of(session_of(run), everybody), everybody, strict=True))
    for host in CAST[1:n]:
        assert {names[row] for row in rows_of(said(run, "result", to=host))} == set.intersection(*map(set, ids))


# participants that deviate


def tampered(tag: str, change: Callable[[Any], Any] | None, by: str = "alice") -> Stage:
    """The stage, in which one participant sends change(value) in the messages of one tag."""

    async def run(peers: Peers, params: Align, table: Table) -> dict[str, Any]:
        send = peers.send

        async def lie(to: str, said_tag: str, value: Any) -> None:
            await send(to, said_tag, change(value) if change and said_tag == tag else value)

        if peers.me == by:
            peers.send = lie  # type: ignore[method-assign]
        result: dict[str, Any] = await align.run(peers, params, table)
        return result

    return dataclasses.replace(align.run, function=run)


def overheard(drawn: Mapping[str, list[bytes]]) -> Stage:
    """The stage, with what each participant drew by 32 bytes written down."""

    async def run(peers: Peers, params: Align, table: Table) -> dict[str, Any]:
        draw = peers.random.bytes

        def bytes_(size: int) -> bytes:
            value = draw(size)
            if size == 32:
                drawn[peers.me].append(value)
            return value

        peers.random.bytes = bytes_  # type: ignore[method-assign]
        result: dict[str, Any] = await align.run(peers, params, table)
        return result

    return dataclasses.replace(align.run, function=run)


def lenient_guest() -> Stage:
    """The stage with a guest that wants only one id in common."""
    one = Align(min_intersection=1)

    async def run(peers: Peers, params: Align, table: Table) -> dict[str, Any]:
        result: dict[str, Any] = await align.run(peers, one if peers.me == "alice" else params, table)
        return result

    return dataclasses.replace(align.run, function=run)


def with_row(number: int, row: bytes) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        changed = value.copy()
        changed[number] = np.frombuffer(row, dtype=np.uint8)
        return changed

    return change


def twice(value: Any) -> Any:
    return value[[0, *range(len(value) - 1)]]


LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
CHEATS: list[tuple[str, str, Callable[[Any], Any], str]] = [
    *[
        (by, tag, with_row(2, bytes.fromhex(point)), "a point of low order")
        for by, tag in (("alice", "guest_points"), ("bob", "host_points"))
        for point in LOW_ORDER
    ],
    ("alice", "guest_points", with_row(2, b"\xff" * 32), "points that are not in canonical form"),
    ("alice", "guest_points", with_row(2, (psi.PRIME + 2).to_bytes(32, "little")), "points that are not in canonical"),
    ("alice", "guest_points", twice, "points that are not all different"),
    ("alice", "guest_points", lambda value: value[:-1], "not 16 points of 32 bytes"),
    ("alice", "guest_points", lambda value: np.concatenate([value, value]), "not 16 points of 32 bytes"),
    ("alice", "guest_points", lambda value: value[:, :31].copy(), "not 16 points of 32 bytes"),
    ("alice", "guest_points", lambda value: value.tobytes(), "not 16 points of 32 bytes"),
    ("bob", "host_points", twice, "points that are not all different"),
    ("bob", "host_points", lambda value: value[1:], "not 20 points of 32 bytes"),
    ("bob", "tags", lambda value: value[1:], "not 16 tags of 16 bytes"),
    ("bob", "tags", lambda value: np.concatenate([value, value[:1]]), "not 16 tags of 16 bytes"),
    ("bob", "tags", twice, "tags that are not all different"),
    ("alice", "guest_size", lambda _: [12_288, False], "not a padded number"),
    ("alice", "guest_size", lambda _: [11, False], "not a padded number"),
    ("alice", "guest_size", lambda _: [True, False], "not a padded number"),
    ("alice", "guest_size", lambda _: [16, 0], "not a padded number"),
    ("alice", "guest_size", lambda _: 16, "not a padded number"),
    ("bob", "host_size", lambda _: [0, False], "not a padded number"),
    ("bob", "host_size", lambda _: [24, False], "not 24 points of 32 bytes"),
    ("bob", "host_nonce", lambda value: value[:31], "no nonce"),
    ("alice", "nonces", lambda value: value[:2], "not 3 nonces"),
    ("alice", "nonces", lambda value: [value[1], value[0], value[2]], "a list without my nonce"),
    ("alice", "nonces", lambda value: {"a": value}, "not 3 nonces"),
    ("alice", "result", lambda value: value[::-1].copy(), "a result that is not sorted"),
    ("alice", "result", twice, "hashes that are not all different"),
    ("alice", "result", lambda value: np.zeros((17, 16), np.uint8), "not a result"),
    ("alice", "result", with_row(0, bytes(16)), "a result that cannot be"),
    ("alice", "result", lambda value: value.tobytes(), "not a result"),
]


@pytest.mark.parametrize(("by", "tag", "change", "says"), CHEATS)
def test_what_breaks_the_protocol_is_refused_and_says_who_sent_it(
    by: str, tag: str, change: Callable[[Any], Any], says: str
) -> None:
    ids = numbered(range(16), range(2, 22), range(1, 16))
    with pytest.raises(RemoteProtocolError, match=f"^{by} sent {says}") as error:
        aligned(*ids, stage=tampered(tag, change, by))
    assert error.value.peer == by


def test_an_unknown_entry_of_a_result_is_not_pointed_at() -> None:
    ids = numbered(range(16), range(2, 22))
    texts = set()
    for number, row in ((0, bytes(16)), (13, b"\xff" * 16)):
        with pytest.raises(RemoteProtocolError) as error:
            aligned(*ids, stage=tampered("result", with_row(number, row)))
        texts.add(error.value.message)
    assert len(texts) == 1


# in blocks


@pytest.mark.parametrize("n", [2, 3, 4])
def test_in_blocks_the_rows_are_the_same_and_a_killed_worker_goes_on_at_its_block(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_psi, "BLOCK", 4)
    whole = aligned(*SPLIT[n])
    assert whole.turns == max(psi.padded(len(ids)) for ids in SPLIT[n]) // 4 > 1
    assert sorted(common_of(whole, *SPLIT[n])) == sorted(set.intersection(*map(set, SPLIT[n])))  # type: ignore[type-var]
    for victims in ([CAST[0]], [CAST[n - 1]], CAST[:n]):
        killed = aligned(*SPLIT[n], kills=dict.fromkeys(victims, range(1000)))
        assert killed.digests == whole.digests
        assert heard(killed) == heard(whole)


def heard(run: Run) -> list[Any]:
    return sorted(
        (each.sender, each.to, each.tag, each.turn, each.k, codec.pack_value(each.value)[0]) for each in run.said
    )


@pytest.mark.parametrize(("by", "tag"), [("bob", "host_points"), ("bob", "tags")])
def test_what_comes_again_in_another_block_is_refused(by: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_psi, "BLOCK", 4)
    first: list[Any] = []

    def again(value: Any) -> Any:
        first.append(value)
        return first[0]

    with pytest.raises(RemoteProtocolError, match=f"^{by} sent (points|tags) that are not all different"):
        aligned(*numbered(range(8), range(4, 12)), stage=tampered(tag, again, by))


# ids of several columns, declared forms, ids that the guest repeats


def test_two_columns_are_one_id_where_the_contract_says_so() -> None:
    def people(*rows: tuple[str, str]) -> dict[str, Table]:
        names, towns = zip(*rows, strict=True)
        data = {"id": pa.array(names, pa.string()), "town": pa.array(towns, pa.string())}
        return {"table": Table(pa.table(data), id="id")}

    inputs = {
        "alice": people(("ab", "c"), ("a", "bc"), ("x", "y")),
        "bob": people(("a", "BC"), ("x", "z")),
    }
    run = run_stage(align.run, Align(min_intersection=1, also={"town": "text"}, casefold=True), inputs, roles=roles(2))
    assert [run.outputs[alias]["rows"].index.tolist() for alias in inputs] == [[1], [0]]  # type: ignore[union-attr]


def test_zeros_before_a_number_are_dropped_where_it_is_declared_as_one() -> None:
    ids = [["007", "12"], ["7", "x"]]
    assert common_of(aligned(*ids), *ids) == []
    run = aligned(*ids, params=Align(min_intersection=0, form="integer"))
    assert [run.outputs[alias]["rows"].index.tolist() for alias in ("alice", "bob")] == [[0], [0]]  # type: ignore[union-attr]
    assert run.progress["bob"][-1].metrics["without_id"] == 1


@pytest.mark.parametrize("transfers", [False, True])
def test_a_guest_may_repeat_ids_and_hosts_are_told_how_often_where_it_is_declared(transfers: bool) -> None:
    ids = [["a", "b", "a", "c", "b", "a"], ["b", "x", "a"]]
    with pytest.raises(DataError, match="in rows 0 and 2"):
        aligned(*ids)
    how = transferred if transfers else aligned
    params = Align(min_intersection=2, repeated=True)
    run = how(*ids, params=params)
    assert sorted(common_of(run, *ids)) == ["a", "a", "a", "b", "b"]  # type: ignore[type-var]
    index = run.outputs["alice"]["rows"].index.tolist()  # type: ignore[union-attr]
    assert [i for i in index if ids[0][i] == "a"] == [0, 2, 5]
    assert sorted(said(run, "repeats").tolist()) == [2, 3]
    with pytest.raises(DataError, match="min_intersection = 3"):  # ids count, not rows
        how(*ids, params=Align(min_intersection=3, repeated=True))
    with pytest.raises(DataError, match="in rows 0 and 1"):
        how(["a"], ["a", "a"], params=params)
    for wrong in (lambda v: v[:1], lambda v: v * 0, lambda v: v.astype(np.int64), lambda _: None):
        with pytest.raises(RemoteProtocolError, match="alice sent not 2 numbers of rows"):
            how(*ids, params=params, stage=tampered("repeats", wrong))


# by oblivious transfer


def test_kkrt_is_taken_only_where_both_take_the_other_to_follow_the_protocol() -> None:
    ids = SPLIT[2]
    for trust, kkrt in (
        ({}, False),
        ({"alice": ["bob"]}, False),
        ({"bob": ["alice"]}, False),
        ({"alice": ["bob"], "bob": ["alice"]}, True),
    ):
        tags = {each.tag for each in aligned(*ids, semi_honest=trust).said}
        assert ("list" in tags) is kkrt
        assert ("guest_points" in tags) is not kkrt
    assert "guest_points" in {each.tag for each in transferred(*ids, params=Align(min_intersection=0, psi="ecdh")).said}
    everybody = dict.fromkeys(CAST, CAST)
    assert "guest_points" in {each.tag for each in aligned(*SPLIT[3], semi_honest=everybody).said}


def test_a_contract_that_asks_for_kkrt_where_it_cannot_be_is_refused_by_name() -> None:
    kkrt = Align(min_intersection=0, psi="kkrt")
    assert common_of(transferred(*SPLIT[2], params=kkrt), *SPLIT[2])
    said_: list[Any] = []
    for n, trust in ((2, {"bob": ["alice"]}), (3, dict.fromkeys(CAST, CAST))):
        with pytest.raises(DataError, match='psi = "kkrt" is for two participants who take each other'):
            aligned(*SPLIT[n], params=kkrt, semi_honest=trust, stage=tampered("guest_size", said_.append))
    for by, tag in (("bob", "host_size"), ("alice", "guest_size")):
        with pytest.raises(RemoteProtocolError, match=f'{by} does not take part in psi = "kkrt"'):
            transferred(*SPLIT[2], params=kkrt, stage=tampered(tag, lambda value: [value[0], False], by))


def test_by_transfer_in_blocks_the_rows_are_the_same_with_workers_killed_at_every_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = numbered(range(4000), range(1500, 7500))
    one = transferred(*ids)
    monkeypatch.setattr(_psi, "BINS", 4096)
    whole = transferred(*ids)
    assert (one.turns, whole.turns) == (1, 2)
    assert sorted(common_of(one, *ids)) == sorted(set(ids[0]) & set(ids[1]))  # type: ignore[type-var]
    killed = transferred(*ids, kills={"alice": range(1000), "bob": range(1000)})
    assert killed.digests == whole.digests == one.digests
    assert heard(killed) == heard(whole)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=10), min_size=2, max_size=2), st.integers(0, 99))
def test_by_transfer_the_intersection_of_any_sets_comes_in_one_order(sets: list[list[int]], seed: int) -> None:
    ids = [[f"id {i}" for i in each] for each in sets]
    assert sorted(common_of(transferred(*ids, seed=seed), *ids)) == sorted(set(ids[0]) & set(ids[1]))  # type: ignore[type-var]


def test_by_transfer_lengths_follow_from_the_padded_sizes_and_lists_are_sorted_and_full() -> None:
    one = lengths_of(transferred(*numbered(range(0, 17), range(0, 26))))
    other = lengths_of(transferred(*numbered(range(0, 20), range(19, 47)), seed=7))
    assert {key: n for key, n in one.items() if key != "result"} == {k: n for k, n in other.items() if k != "result"}
    run = transferred(*numbered(range(0, 17), range(0, 26)))
    lists = [each.value for each in run.said if each.tag == "list"]
    assert [each.shape for each in lists] == [(28, 12)] * 3
    assert all(rows_of(each) == sorted(rows_of(each)) for each in lists)
    assert len({row for each in lists for row in rows_of(each)}) == 3 * 28


def lengths_of(run: Run) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for each in run.said:
        header, buffers = codec.pack_value(each.value)
        found.setdefault(each.tag, []).append(len(header) + sum(map(len, buffers)))
    return found


def test_a_result_depends_on_nothing_but_the_common_ids() -> None:
    common = [f"c{i}" for i in range(20)]
    results, tables = set(), []
    for rest in ("x", "y"):
        own = [*common, *(f"{rest}{i}" for i in range(12))]
        run = transferred(own if rest == "x" else own[::-1], common)
        results.add(said(run, "result").tobytes())
        tables.append(said(run, "rows").tobytes())
    assert len(results) == 1
    assert tables[0] != tables[1]


def test_by_transfer_sealed_rows_look_like_chance() -> None:
    rows = said(transferred(*numbered(range(3000), range(10))), "rows")
    assert rows.shape == (4096, 8)
    assert looks_uniform(rows.tobytes(), width=64)


TRANSFER_CHEATS: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("alice", "offer", lambda _: bytes.fromhex(LOW_ORDER[0]), "no point of the main subgroup"),
    ("alice", "offer", lambda value: crypto.edwards_add(value, ORDER_8), "no point of the main subgroup"),
    ("alice", "offer", lambda value: value[:31], "no point"),
    ("bob", "choices", lambda value: value[:511], "not 512 points"),
    ("bob", "choices", with_row(3, bytes(32)), "a point that is not of the main subgroup"),
    ("alice", "rows", lambda value: value[:-1], "not 4096 rows of 64 bytes"),
    ("alice", "rows", lambda value: value.view(np.uint8), "not 4096 rows of 64 bytes"),
    ("bob", "list", lambda value: value[:-1], "not 20 tags of 12 bytes"),
    ("bob", "list", lambda value: np.concatenate([value, value]), "not 20 tags of 12 bytes"),
    ("bob", "list", lambda value: value[::-1].copy(), "tags that are not sorted"),
    ("bob", "list", twice, "tags that are not sorted"),
    ("alice", "result", with_row(0, bytes(16)), "a result that cannot be"),
    ("alice", "result", lambda value: value[::-1].copy(), "a result that is not sorted"),
]
ORDER_8 = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")


@pytest.mark.parametrize(("by", "tag", "change", "says"), TRANSFER_CHEATS)
def test_by_transfer_what_breaks_the_protocol_is_refused_and_says_who_sent_it(
    by: str, tag: str, change: Callable[[Any], Any], says: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=f"^{by} sent {says}") as error:
        transferred(*numbered(range(16), range(2, 22)), stage=tampered(tag, change, by))
    assert error.value.peer == by


def test_by_transfer_too_few_in_common_end_it_before_the_host_has_a_result() -> None:
    said_: list[Any] = []
    with pytest.raises(DataError, match="too small"):
        transferred(["a", "b"], ["b", "c"], params=Align(min_intersection=2), stage=tampered("result", said_.append))
    assert said_ == []


# how many


def test_a_count_is_told_to_the_guest_and_stands_kills_at_every_request() -> None:
    def right(outputs: Mapping[str, Mapping[str, Any]]) -> None:
        assert outputs["alice"]["report"].values == {"common": 4}
        assert outputs["bob"]["report"] is None

    check_stage(
        align.count,
        align.Count(min_intersection=0),
        lambda _: {alias: {"table": table(ids)} for alias, ids in zip(CAST, SPLIT[2], strict=False)},
        right,
        roles=roles,
        sizes=(2,),
    )
    inputs = {alias: {"table": table(ids)} for alias, ids in zip(CAST, SPLIT[2], strict=False)}
    with pytest.raises(DataError, match="min_intersection = 5"):
        run_stage(align.count, align.Count(min_intersection=5), inputs, roles=roles(2))


def test_a_count_does_not_say_which_ids_are_common() -> None:
    """What the guest would take for its common ids, were tags in the order of its points, is any of them."""
    taken: dict[str, set[int]] = {}
    for stage in (align.count, align.run):
        places = taken.setdefault(stage.name, set())

        async def watching(peers: Peers, params: Any, table: Table, stage: Stage = stage, at: Any = places) -> Any:
            if peers.role == "guest":
                guest = _psi.points_guest

                async def points_guest(*given: Any) -> Any:
                    common = await guest(*given)
                    at.update(np.flatnonzero(common).tolist())
                    return common

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(align, "points_guest", points_guest)
                    return await stage(peers, params, table)
            return await stage(peers, params, table)

        params = align.Count(min_intersection=1) if stage is align.count else Align(min_intersection=1)
        inputs = {"alice": {"table": table(["a", "b", "c", "d"])}, "bob": {"table": table(["x", "b", "y", "z"])}}
        for seed in range(24):
            run_stage(dataclasses.replace(stage, function=watching), params, inputs, roles=roles(2), seed=seed)
    assert list(taken.values()) == [{0, 1, 2, 3}, {1}]
