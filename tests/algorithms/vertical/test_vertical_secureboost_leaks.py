"""What partners in SecureBoost get and send: nothing beside the declaration, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from boosting_cast import features, key, labels, roles, split, table, trained
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer import codec
from fedpeer.algorithms.vertical import secureboost
from fedpeer.algorithms.vertical.boosting import host
from fedpeer.algorithms.vertical.boosting.params import Fit
from fedpeer.errors import DataError, FedpeerError, RemoteProtocolError
from fedpeer.peers import Chance, Peers
from fedpeer.secure import paillier
from fedpeer.secure.losses import Loss
from fedpeer.secure.paillier import Ciphertexts, Owner
from fedpeer.secure.trees import MIN_ROWS, Pairs, Sums, offered
from fedpeer.stage import Open, Params, Sealed, Stage, Table
from fedpeer.testing.stages import CAST, Run, run_stage
from fedpeer.testing.uniformity import looks_uniform

Array = Any
PRIVATE = paillier.private_key(key()["alice"])


def said(run: Run, tag: str) -> list[Any]:
    return [each.value for each in run.said if each.tag == tag]


def slots_of(params: Fit, rows: int) -> Pairs:
    return Pairs.of(PRIVATE.public, rows, (4.0 if params.objective == "regression:l2" else 1.0) * params.max_weight)


# what is not to be seen


@pytest.mark.parametrize("noise", [True, False])
def test_encrypted_gradients_look_like_chance_whatever_they_are(noise: bool, request: pytest.FixtureRequest) -> None:
    if not noise:
        request.getfixturevalue("quick")
    x = features(60)
    params = Fit(n_estimators=1, max_depth=1, max_bin=2, complete_secure=False, subsample=0.5)
    looks = []
    for y in (labels(x), 1 - labels(x)):
        run = trained(split(2, x, y), params)
        (array,) = said(run, "gradients")
        assert array.shape == (60, 512)
        assert len({row.tobytes() for row in array}) == 60 or not noise, "rows that do not learn can be told"
        looks.append(looks_uniform(array[:, 2:].tobytes(), 1))  # n² is no power of two: its first bytes are not uniform
        plain = PRIVATE.decrypt(Ciphertexts.from_array(PRIVATE.public, array, 60))
        assert plain.count(0) == 30, "those that the tree does not learn from"
    assert looks == [noise, noise]


@pytest.mark.parametrize("n", [2, 4])
def test_no_message_holds_a_label_a_gradient_or_a_value_of_a_feature(n: int, quick: None) -> None:
    x = features(90)
    x += np.random.default_rng(9).normal(size=x.shape)
    y = labels(x, "regression:l2")
    params = Fit(objective="regression:l2", n_estimators=2, max_depth=2, max_bin=6, complete_secure=False)
    run = trained(split(n, x, y), params)
    loss = run.outputs["alice"]["model"].facts  # type: ignore[union-attr]
    gradients = np.float64(run.outputs["alice"]["model"].arrays["base"][0]) - (y - loss["middle"]) / loss["half"]  # type: ignore[union-attr]
    canaries = [*x[~np.isnan(x)].tolist(), *y.tolist(), *gradients.tolist()]
    known = {np.float64(value).tobytes() for value in canaries}
    known |= {np.int64(round(value * 2**20)).tobytes() for value in canaries if abs(value) > 2**-3}
    known |= {np.float32(value).tobytes() for value in canaries if abs(value) > 2**-3}
    assert {each.tag for each in run.said} == set(secureboost.fit.messages) - {"left"} | {"left"}
    for each in run.said:
        if each.tag == "gradients":
            continue  # encrypted, and another test's
        header, buffers = codec.pack_value(each.value)
        text = b"".join([header, *(bytes(buffer) for buffer in buffers)])
        assert not [canary for canary in known if canary in text], each.tag


def test_every_message_of_every_stage_says_what_it_tells() -> None:
    for stage in (secureboost.fit, secureboost.refit, secureboost.predict, secureboost.encode):
        assert all(isinstance(each, Open | Sealed) and each.text for each in stage.messages.values())
    sealed = [tag for tag, each in secureboost.refit.messages.items() if isinstance(each, Sealed)]
    assert sealed == ["gradients"]


def opened(run: Run, params: Fit, rows: int, candidates: int) -> list[list[list[tuple[int, int]]]]:
    """Of each message of sums and each node what the guest reads."""
    pairs = slots_of(params, rows)
    each = pairs.ciphertexts(candidates)
    found = []
    for array in said(run, "sums"):
        plain = PRIVATE.decrypt(Ciphertexts.from_array(PRIVATE.public, array, len(array)))
        nodes = [plain[start : start + each] for start in range(0, len(plain), each)]
        read = [pairs.part(pairs.slots.unpack(part, candidates)) for part in nodes]
        found.append([list(zip(sums.g.tolist(), sums.h.tolist(), strict=True)) for sums in read])
    return found


def test_the_guest_sees_the_same_sums_in_another_order_whatever_the_order_of_features_and_values(quick: None) -> None:
    x = features(90)
    y = labels(x)
    params = Fit(n_estimators=1, max_depth=1, max_bin=6, complete_secure=False)
    mirrored = x.copy()
    mirrored[[1, 3, 5, 6, 7, 9]] = x[[9, 7, 5, 6, 3, 1]]
    first, again, other = (
        opened(trained(split(2, each, y), params, seed=seed), params, 90, 6 * 5 * 2)[0][0]
        for each, seed in ((x, 1), (x, 2), (mirrored, 1))
    )
    assert sorted(first) == sorted(again) == sorted(other)
    assert first != again, "one order in two runs"
    assert len(set(first)) > 5


def test_each_node_has_an_order_of_its_own(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[Array] = []
    check = host._check_splits

    def noted(guest: str, said: Any, given: list[Array], allowed: Any) -> Any:
        orders.extend(given)
        return check(guest, said, given, allowed)

    monkeypatch.setattr(host, "_check_splits", noted)
    x = features()
    trained(split(2, x, labels(x)), Fit(n_estimators=2, max_depth=3, max_bin=4, complete_secure=False))
    assert len(orders) > 6
    assert len({order.tobytes() for order in orders}) == len(orders)


def test_as_many_ciphertexts_are_returned_whatever_the_features_are(quick: None) -> None:
    x = features(90)
    params = Fit(n_estimators=1, max_depth=1, max_bin=32, complete_secure=False)
    constant = np.ones_like(x)
    constant[0] = x[0]
    sizes = {said(trained(split(2, each, labels(x)), params), "sums")[0].shape for each in (x, constant)}
    assert len(sizes) == 1


def test_what_is_returned_has_new_noise_and_no_free_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = features(60)
    params = Fit(n_estimators=2, max_depth=1, max_bin=2, learning_rate=1e-9, complete_secure=False)
    run = trained(split(2, x, labels(x)), params)
    arrays = said(run, "sums")
    assert len(arrays) == 2
    assert not np.array_equal(*arrays)
    top = slots_of(params, 60).slots
    free = PRIVATE.public.bits - 2 - 12 * top.width  # of 31 slots 12 are used, in one ciphertext
    assert all(array.shape == (1, 512) for array in arrays)
    fillings = [
        PRIVATE.public.centred(PRIVATE.decrypt(Ciphertexts.from_array(PRIVATE.public, array, 1)))[0] >> 12 * top.width
        for array in arrays
    ]
    assert len(set(fillings)) == 2
    assert all(filling.bit_length() > free - 40 for filling in fillings)


@pytest.mark.parametrize("n", [2, 4])
def test_the_rows_of_the_last_level_go_between_the_guest_and_the_owner_of_the_split(n: int, quick: None) -> None:
    x = features(200)
    params = Fit(n_estimators=1, max_depth=2, max_bin=8, complete_secure=False)
    run = trained(split(n, x, labels(x)), params)
    for alias in CAST[1:n]:
        seen = [each.value for each in run.said if each.to == alias and each.tag == "nodes" and each.value is not None]
        assert len(seen) == 2, "the root, and two nodes"
        assert set(seen[1].tolist()) <= {-1, 0, 1}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=3, max_size=9))
def test_two_sums_that_are_offered_differ_by_20_rows_or_none_and_so_do_they_from_the_node(counts: list[int]) -> None:
    array = np.array(counts)
    *present, missing = counts
    prefix = np.cumsum(present)
    shown = [0, sum(counts)]
    may = offered(array)
    for t, side in np.argwhere(may):
        shown.append(int(prefix[t]) + (missing if side else 0))
        assert not side or missing >= MIN_ROWS
    for one, other in itertools.combinations([0, *(int(prefix[t]) for t in np.flatnonzero(may.any(axis=1)))], 2):
        assert abs(one - other) >= MIN_ROWS, "two that are next to each other"
    assert all(size >= MIN_ROWS and sum(counts) - size >= MIN_ROWS for size in shown[2:])


@pytest.mark.parametrize(("rows", "bound"), [(27, 1.0), (100_000, 1.0), (1 << 20, 4.0), (1 << 20, 4000.0)])
def test_the_largest_sums_fit_in_all_slots_at_once(rows: int, bound: float) -> None:
    pairs = Pairs.of(PRIVATE.public, rows, bound)
    most = int(rows * bound) << 20
    for sign in (1, -1):
        sums = Sums(np.array([sign * most] * 50), np.array([most] * 50))
        values = pairs.join(sums.g, sums.h)
        size, width = pairs.slots.count, pairs.slots.width
        plain = [
            sum(value << (width * place) for place, value in enumerate(values[start : start + size]))
            for start in range(0, 50, size)
        ]
        read = pairs.part(pairs.slots.unpack([value % PRIVATE.public.n for value in plain], 50))
        assert read.g.tolist() == sums.g.tolist()
        assert read.h.tolist() == sums.h.tolist()


@pytest.mark.parametrize(("rows", "width", "count"), [(30_000, 74, 27), (100_000, 78, 26), (1 << 20, 84, 24)])
def test_pairs_take_no_more_room_than_their_bounds_need(rows: int, width: int, count: int) -> None:
    slots = Pairs.of(PRIVATE.public, rows, 1.0).slots
    assert (slots.width, slots.count) == (width, count)


@pytest.mark.parametrize("objective", ["binary:bce", "multi:ce", "regression:l2"])
def test_derivatives_keep_within_the_declared_bound_whatever_margins_are(objective: Any) -> None:
    loss = Loss(objective, 3)
    margins, targets = np.array([-1e4, -50.0, -3.0, 0.0, 3.0, 50.0, 1e4] * 2), np.repeat([0.0, 1.0], 7)
    for derivative in loss.derivatives(margins, targets):
        assert np.abs(derivative).max() <= loss.bound
        assert derivative.max() > 0


# what is refused


def tampered(tag: str, change: Callable[[Any], Any], by: str) -> Stage:
    """The stage, in which one participant sends change(value) in the messages of one tag."""

    async def run(peers: Peers, params: Fit, table: Table) -> dict[str, Any]:
        send = peers.send

        async def lie(to: str, said_tag: str, value: Any) -> None:
            await send(to, said_tag, change(value) if said_tag == tag else value)

        if peers.me == by:
            peers.send = lie  # type: ignore[method-assign]
        result: dict[str, Any] = await secureboost.fit(peers, params, table)
        return result

    return dataclasses.replace(secureboost.fit, function=run)


def with_row(value: int) -> Callable[[Array], Array]:
    """One ciphertext is this number."""

    def change(array: Array) -> Array:
        found = array.copy()
        found[7] = np.frombuffer(int(value).to_bytes(512, "big"), np.uint8)
        return found

    return change


def no_sums(array: Array) -> Array:
    return Owner(PRIVATE, Chance(bytes(32)), 1).encrypt([1 << 1017] * len(array), Chance(bytes(32))).to_array()


def nodes(change: Callable[[Array], None]) -> Callable[[Any], Any]:
    def changed(value: Any) -> Any:
        if value is not None and len(value):
            value = value.copy()
            change(value)
        return value

    return changed


def moved(array: Array) -> None:
    array[:] = np.where(array == 1, 0, array)


def few(array: Array) -> None:
    places = np.flatnonzero(array == 0)
    array[places[5:]] = -1


P = int(PRIVATE._p)
CHEATS: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    "a row less": ("alice", "gradients", lambda array: array[:-1], "not 150 ciphertexts"),
    "zero": ("alice", "gradients", with_row(0), "0 or not below"),
    "too large": ("alice", "gradients", with_row(int(PRIVATE.public.square) + 1), "0 or not below"),
    "a factor": ("alice", "gradients", with_row(5 * P), "factor in common"),
    "no array": ("alice", "gradients", lambda _: "all of them", "not 150 ciphertexts"),
    "nodes as numbers of another type": ("alice", "nodes", lambda said: [1], "no nodes"),
    "two nodes in one": ("alice", "nodes", nodes(moved), "fewer than 20 rows"),
    "a small node": ("alice", "nodes", nodes(few), "fewer than 20 rows"),
    "a node below": ("alice", "nodes", nodes(lambda array: array.fill(-2)), "nodes that cannot be"),
    "no node": ("alice", "nodes", nodes(lambda array: array.fill(-1)), "nodes that cannot be"),
    "a split too far": ("alice", "splits", lambda said: [np.array([1 << 20]) for _ in said], "does not exist"),
    "a negative split": ("alice", "splits", lambda said: [np.array([-1]) for _ in said], "does not exist"),
    "no splits": ("alice", "splits", lambda _: [], "not the best splits"),
    "splits as text": ("alice", "splits", lambda said: ["1" for _ in said], "no places"),
    "too many gains": ("alice", "gains", lambda gains: np.append(gains, [1.0] * 99), "no gains"),
    "a gain of nothing": ("alice", "gains", lambda gains: gains * np.nan, "not finite"),
    "no start": ("alice", "start", lambda _: [1, 2], "no number of rows"),
    "other rows": ("bob", "shape", lambda shape: [149, shape[1]], "bob has 149 rows, and here are 150"),
    "no features": ("bob", "shape", lambda shape: [shape[0], 0], "no number of rows and features"),
    "fewer sums": ("bob", "sums", lambda array: array[:-1], "ciphertexts of 512 bytes"),
    "a sum of zero": ("bob", "sums", lambda array: array * 0, "0 or not below"),
    "other sums": ("bob", "sums", no_sums, "a sum that no rows can have|sums that no rows of the node have"),
    "other rows to the left": ("bob", "left", lambda bits: ~bits, "do not add up"),
    "fewer rows": ("bob", "left", lambda bits: bits[:-1], "not which rows|do not add up"),
    "more rows": ("bob", "left", lambda bits: np.append(bits, True), "more rows than the nodes have"),
    "rows as numbers": ("bob", "left", lambda bits: bits.astype(np.int64), "not which rows"),
}


@pytest.mark.parametrize("name", CHEATS)
@pytest.mark.parametrize("n", [2, 4])
def test_what_cannot_be_is_refused_naming_who_sent_it(n: int, name: str, quick: None) -> None:
    by, tag, change, words = CHEATS[name]
    x = features()
    params = Fit(n_estimators=1, max_depth=2, max_bin=6, complete_secure=False)
    x[7] = labels(x) * 3 + np.random.default_rng(1).normal(size=150)  # bob (of two) has the best splits
    if n == 4:
        x[1] = x[7]
    x[9] = x[7]
    inputs = split(n, x, labels(x) if tag != "left" else (x[7] > 1) * 1.0)
    with pytest.raises((RemoteProtocolError, DataError), match=words) as error:
        trained(inputs, params, tampered(tag, change, by))
    assert error.value.peer == by or isinstance(error.value, DataError)


BEFORE = np.repeat(np.array([0, 1, -1], np.int16), [60, 50, 10])


@pytest.mark.parametrize(
    ("counts", "good"),
    [
        ([[20, 40, 0], [25, 0, 25], [0, 0, 10]], True),
        ([[60, 0, 0], [0, 50, 0], [0, 0, 10]], False),  # a child that is all of its parent
        ([[20, 40, 0], [0, 30, 20], [0, 0, 10]], False),  # one child of two parents
        ([[20, 20, 20], [0, 0, 50], [0, 0, 10]], False),  # two children that are not all of it
        ([[20, 40, 0], [0, 0, 50], [0, 5, 5]], False),  # rows of a leaf
        ([[41, 19, 0], [0, 0, 50], [0, 0, 10]], False),  # few rows
    ],
)
def test_nodes_are_parts_of_nodes_before_with_20_rows_or_more(counts: list[list[int]], good: bool) -> None:
    said = np.concatenate([np.repeat(np.array([0, 1, -1], np.int16), each) for each in counts])
    said = np.where((BEFORE == 1) & (said == 0), 2, said).astype(np.int16) if good else said
    if good:
        np.testing.assert_array_equal(host._check_nodes("alice", said, BEFORE, True), said)
        return
    with pytest.raises(RemoteProtocolError, match="a node"):
        host._check_nodes("alice", said, BEFORE, True)
    with pytest.raises(RemoteProtocolError, match="nodes that cannot be"):
        host._check_nodes("alice", said, BEFORE, False)


def refusal(n: int, guests: Any, hosts: Any = None, params: Fit | None = None) -> FedpeerError:
    x = features(60)
    inputs = split(n, x, labels(x))
    inputs["alice"] = {"table": guests} if guests is not None else inputs["alice"]
    if hosts is not None:
        inputs[CAST[n - 1]] = {"table": hosts}
    with pytest.raises(FedpeerError) as error:
        trained(inputs, params or Fit(n_estimators=1, max_depth=1, max_bin=4))
    return error.value


X = features(60)
ALL = np.ones(60)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    ("guests", "hosts", "params", "words"),
    [
        (table(X[:2]), None, {}, "no label column"),
        (None, table(X[1:3], labels(X)), {}, "and it is the guest that has one"),
        (table(X[:2], ALL), None, {}, "one class only"),
        (table(X[:2], ALL * 2), None, {}, "labels are 0 to 1"),
        (table(X[:2], ALL), None, {"objective": "multi:ce", "num_class": 3}, "not all of num_class"),
        (table(X[:2], ALL), None, {"objective": "regression:l2"}, "the same label"),
        (table(X[:2], np.append(ALL[1:], np.nan)), None, {}, "missing values"),
        (None, table(X[:0]), {}, "0 feature columns"),
        (None, table(X[:2, :50]), {}, "has 50 rows, and here are 60|has 60 rows, and here are 50"),
        (table(X[:2], labels(X), w=ALL * 1.5), None, {"weight": "w"}, "from 0 to max_weight"),
        (table(X[:2], labels(X), w=ALL * -1), None, {"weight": "w"}, "from 0 to max_weight"),
        (table(X[:2], labels(X), w=ALL * np.nan), None, {"weight": "w"}, "missing"),
        (table(X[:2], labels(X), w=ALL * 0), None, {"weight": "w"}, "no row has weight"),
        (None, None, {"weight": "absent"}, "no column 'absent'"),
    ],
)
def test_data_that_is_no_good_is_refused_in_words(
    n: int, guests: Any, hosts: Any, params: dict[str, Any], words: str, quick: None
) -> None:
    found = refusal(n, guests, hosts, Fit(**{"n_estimators": 1, "max_depth": 1, "max_bin": 4} | params))
    assert isinstance(found, DataError)
    assert any(word in found.message for word in words.split("|"))


@pytest.mark.parametrize("n", [2, 4])
def test_too_few_rows_to_split_give_a_model_that_says_the_mean(n: int, quick: None) -> None:
    x = features(30)
    run = trained(split(n, x, labels(x)), Fit(n_estimators=3, max_depth=3, max_bin=4))
    model: Any = run.outputs["alice"]["model"]
    assert (model.arrays["owner"] == -1).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"goss": true}', "goss is refused"),
        ('{"early_stopping": 3}', "early_stopping takes validation rows"),
        ('{"objective": "count:poisson"}', "Invalid enum value"),
        ('{"key_bits": 1024}', "Invalid enum value"),
        ('{"multi_output": true}', "unknown field"),
    ],
)
def test_what_is_not_there_is_refused_when_the_contract_is_read(text: str, words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.json.decode(text, type=Fit)


@pytest.mark.parametrize("n", [2, 4])
def test_parts_of_two_models_do_not_score_together(n: int, quick: None) -> None:
    x = features(60)
    inputs = split(n, x, labels(x))
    runs = [trained(inputs, Fit(n_estimators=2, max_depth=1, max_bin=4), seed=seed) for seed in (1, 2)]
    parts = {alias: {"model": runs[0].outputs[alias]["model"], **inputs[alias]} for alias in CAST[:n]}
    parts[CAST[n - 1]]["model"] = runs[1].outputs[CAST[n - 1]]["model"]
    with pytest.raises(DataError, match="a part of another model"):
        run_stage(secureboost.predict, Params(), parts, roles=roles(n))
    parts[CAST[n - 1]]["model"] = runs[0].outputs["alice"]["model"]
    with pytest.raises(DataError, match="is not what"):
        run_stage(secureboost.predict, Params(), parts, roles=roles(n))
