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

from fedpeer import codec
from fedpeer.algorithms.vertical import align
from fedpeer.algorithms.vertical.align import Align, normal_form
from fedpeer.crypto import Secret, hash_
from fedpeer.errors import DataError, RemoteProtocolError
from fedpeer.peers import Peers
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


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12))
def test_the_normal_form_of_a_normal_form_is_itself(text: str) -> None:
    for casefold in (False, True):
        once = normal_form(text, casefold)
        assert normal_form(once, casefold) == once


def test_rows_without_an_id_are_left_out_and_counted_for_their_owner_only() -> None:
    ids: list[Ids] = [[None, "a", "  ", "b", ""], ["b", None, "c"]]
    run = aligned(*ids)
    assert common_of(run, *ids) == ["b"]
    assert run.progress["alice"][-1].metrics == {"ids": 2.0, "without_id": 3.0, "common": 1.0}
    assert run.progress["bob"][-1].metrics == {"ids": 2.0, "without_id": 1.0, "common": 1.0}
    assert said(run, "guest_size") == 4


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_repeated_id_is_refused_at_every_participant_with_its_rows_and_without_its_words(at: int) -> None:
    ids = [["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"]]
    ids[at] = ["a", "ﬁne", "c", " fine"]
    with pytest.raises(DataError, match=r"'id' has one id, in normal form, in rows 1 and 3 \(from 0\)") as error:
        aligned(*ids)
    assert "fine" not in str(error.value)
    assert f"at {CAST[at]}" in error.value.__notes__[0]


def test_more_ids_than_this_version_takes_are_refused_before_anything_is_said() -> None:
    heard: list[Any] = []
    (many,) = numbered(range(psi.MAX_IDS + 1))
    with pytest.raises(DataError, match=r"'id' has 10001 ids; this version aligns up to 10000"):
        aligned(many, ["a"], stage=tampered("guest_size", heard.append))
    assert heard == []


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


def test_as_many_ids_as_this_version_takes_are_aligned() -> None:
    (many,) = numbered(range(psi.MAX_IDS))
    host = [many[17], "somebody else", many[9_999]]
    assert sorted(common_of(aligned(many, host), many, host)) == sorted([many[17], many[9_999]])  # type: ignore[type-var]


def test_a_table_without_a_column_of_ids_as_text_is_refused() -> None:
    for wrong, says in (
        (Table(pa.table({"x": [1.0]})), "no id column"),
        (Table(pa.table({"x": [1.0]}), id="x"), "'x' is double, not text"),
    ):
        with pytest.raises(DataError, match=says):
            run_stage(align.run, Align(), {"alice": {"table": wrong}, "bob": {"table": table(["a"])}}, roles=roles(2))


# what a message tells


def test_every_message_is_declared_and_sealed_or_open_with_a_text() -> None:
    run = aligned(*SPLIT[4])
    assert {each.tag for each in run.said} == set(align.run.messages)
    assert {tag for tag, message in align.run.messages.items() if isinstance(message, Sealed)} == {
        "guest_points",
        "host_points",
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
    for tag, most in (("guest_points", (psi.MAX_PADDED, 32)), ("tags", (psi.MAX_PADDED, 16)), ("result", (10_000, 16))):
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
    names = dict(zip(everybody, psi.names_of(session, everybody), strict=True))
    points = dict(zip(everybody, rows_of(psi.points(psi.uniform_of(session, everybody))), strict=True))
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
                canaries[f"{label} 64"] = hash_(label, raw, key=session, size=64)[:12]
            found |= {(each.tag, what, name) for what, canary in canaries.items() if canary in message}
    assert {(tag, name) for tag, _, name in found} == {("result", name) for name in common}
    assert {what for _, what, _ in found} == {"name", "fp.psi.id 16"}


def _one(row: bytes) -> psi.Bytes:
    return np.frombuffer(row, dtype=np.uint8).reshape(1, -1)


def test_no_message_holds_a_number_but_the_sizes() -> None:
    for each in aligned(*SPLIT[3]).said:
        if each.tag in ("guest_size", "host_size"):
            assert each.value == psi.padded(len(SPLIT[3][CAST.index(each.sender)]))
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
            first = psi.points(psi.uniform_of(session_of(run), own[:1]))
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
    names = dict(zip(psi.names_of(session_of(run), everybody), everybody, strict=True))
    for host in CAST[1:n]:
        assert {names[row] for row in rows_of(said(run, "result", to=host))} == set.intersection(*map(set, ids))


def test_the_chance_of_a_party_depends_on_what_it_received_before_it_meets_it() -> None:
    """A host that is asked again with other points answers under another scalar."""
    ids = [["a", "b", "c", "d"], ["d", "c", "b", "a"]]
    honest, other = (
        aligned(*ids, stage=tampered("guest_points", change)) for change in (None, lambda v: v[::-1].copy())
    )
    assert said(honest, "host_nonce") == said(other, "host_nonce")
    assert not set(rows_of(said(honest, "host_points"))) & set(rows_of(said(other, "host_points")))
    assert not set(rows_of(said(honest, "tags"))) & set(rows_of(said(other, "tags")))


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
    ("alice", "guest_size", lambda _: 2 * psi.MAX_PADDED, "not a padded number"),
    ("alice", "guest_size", lambda _: 11, "not a padded number"),
    ("alice", "guest_size", lambda _: True, "not a padded number"),
    ("bob", "host_size", lambda _: 0, "not a padded number"),
    ("bob", "host_size", lambda _: 24, "not 24 points of 32 bytes"),
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
