"""run_stage and check_stage find what an author can get wrong: each fault is a small stage of its own here."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fedpeer.errors import GateClosed, NotDeterministic, StageError, SumError
from fedpeer.peers import Peers
from fedpeer.stage import Agreed, Model, Open, Params, Report, Sealed, Stage, Sum, Table, at_least, exactly, stage
from fedpeer.testing.stages import check_stage, older_processor, run_stage

MEMBERS = {"member": at_least(2)}
GUEST_AND_HOSTS = {"guest": exactly(1), "host": at_least(1)}
ROWS = np.arange(1.0, 61.0)


def split(n: int) -> list[dict[str, Table]]:
    return [{"table": Table(pa.table({"x": part}))} for part in np.array_split(ROWS, n)]


def of_members(function: Any) -> Stage:
    """A stage of members with the sums "a" and "b" and the agreed value "c"."""
    return stage(
        version=1,
        roles=MEMBERS,
        inputs={"table": Table},
        outputs={"model": Model},
        messages={"a": Sum("a"), "b": Sum("b"), "c": Agreed("c")},
    )(function)


def model(**facts: Any) -> dict[str, Any]:
    return {"model": Model("trial", facts)}


# a sound stage


@of_members
async def average(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    x = table.column("x")
    count = (await peers.sum("b", np.array([x.size])))["values"][0]
    state, own = {"mean": np.zeros(1)}, {"turns": 0}
    for turn in peers.rounds(4, shared=state, own=own):
        total = await peers.sum(
            "a", {"step": np.array([(x - state["mean"]).sum() / 2]), "noise": peers.random.integers(0, 9, 3)}
        )
        state["mean"] = state["mean"] + total["step"] / count
        own["turns"] += 1
        peers.progress(turn + 1, 4, mean=float(state["mean"][0]))
    agreed = await peers.agree("c", [float(np.exp(-state["mean"][0]))])
    last = await peers.sum("a", np.array([own["turns"]]))
    return model(mean=float(state["mean"][0]), agreed=agreed[0], turns=int(last["values"][0]))


def average_is_right(outputs: Any) -> None:
    for output in outputs.values():
        facts = output["model"].facts
        assert facts["mean"] == pytest.approx(ROWS.mean() * (1 - 1 / 16))
        assert facts["turns"] == 4 * len(outputs)


def test_a_sound_stage_stands_everything():
    check_stage(average, Params(), split, average_is_right)


@stage(
    version=1,
    roles=MEMBERS,
    inputs={"table": Table},
    outputs={"model": Model},
    messages={"step": Sum("clipped steps, and the count of rows", clip=1.0, bits=20)},
)
async def clipped_average(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    x = table.column("x") / 64
    state = {"mean": np.zeros(300), "n": 0}
    for _ in peers.rounds(3, shared=state):
        total = await peers.sum("step", {"step": (x.mean() - state["mean"]) / 2, "n": np.array([x.size])})
        state["mean"] = state["mean"] + total["step"] / len(total.survivors)
        state["n"] = int(total["n"][0])
    return model(mean=float(state["mean"].mean()), n=state["n"])


def test_a_stage_with_clipped_sums_stands_everything_and_is_right_on_average():
    def pooled(outputs: Any) -> None:
        for output in outputs.values():
            facts = output["model"].facts
            assert facts["mean"] == pytest.approx(ROWS.mean() / 64 * 7 / 8, abs=2e-7)  # a step is 2e-6
            assert facts["n"] == 60

    check_stage(clipped_average, Params(), split, pooled)


def test_clipped_sums_round_by_the_chance_of_the_turn():
    runs = [run_stage(clipped_average, Params(), split(3), seed=seed) for seed in (1, 1, 2)]
    one, again, other = (run.totals[1, 0]["step"] for run in runs)
    assert one.tolist() == again.tolist()
    assert (one != other).mean() > 0.3
    assert len(set(one)) > 1


def test_a_run_keeps_what_was_said_and_what_all_saw():
    run = run_stage(average, Params(), split(3))
    assert list(run.outputs) == ["alice", "bob", "carol"]
    assert run.turns == 4
    assert run.requests == dict.fromkeys(run.outputs, 16)  # 5 checkpoints, 4 of progress, 6 sums, 1 agreed value
    assert [entry.done for entry in run.progress["bob"]] == [1, 2, 3, 4]
    assert {(said.turn, said.k, said.tag) for said in run.said if said.sender == "carol"} == {
        (0, 0, "b"), (1, 0, "a"), (2, 0, "a"), (3, 0, "a"), (4, 0, "a"), (5, 0, "c"), (5, 1, "a"),
    }  # fmt: skip
    assert run.totals[0, 0]["values"].tolist() == [60]
    assert sum(said.value["values"][0] for said in run.said if said.tag == "b") == 60


def test_the_order_of_the_participants_does_not_matter(seed: int):
    digests = [run_stage(average, Params(), split(4), seed=seed).digests for _ in range(2)]
    assert digests[0] == digests[1]
    models = {run_stage(average, Params(), split(4), seed=seed + i).digests["dave"]["model"] for i in range(5)}
    assert len(models) == 1  # what is drawn does not reach the model here


def test_a_kill_at_any_one_request_changes_nothing():
    whole = run_stage(average, Params(), split(3))
    for number in range(whole.requests["bob"]):
        killed = run_stage(average, Params(), split(3), kills={"bob": {number}})
        assert killed.digests == whole.digests, number
        assert len(killed.said) == len(whole.said), number


# messages between roles


@stage(
    version=1,
    roles=GUEST_AND_HOSTS,
    inputs={"table": Table},
    outputs={"report": Report},
    messages={"ask": Open("guest", "host", "a number", per_turn=2), "reply": Sealed("host", "guest", "another")},
)
async def talk(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    state: dict[str, Any] = {}
    own = {"heard": []}
    for turn in peers.rounds(3, shared=state, own=own):
        if peers.role == "guest":
            await peers.broadcast("ask", np.array([turn]))
            await peers.broadcast("ask", peers.random.bytes(4))
            own["heard"] = [*own["heard"], await peers.gather("host", "reply")]
        else:
            number, chance = await peers.receive("alice", "ask"), await peers.receive("alice", "ask")
            await peers.send("alice", "reply", [int(number[0]) + 1, chance, peers.random.bytes(4)])
    if peers.role == "host":
        return {"report": None}
    return {"report": Report({"heard": [{who: said[0] for who, said in each.items()} for each in own["heard"]]})}


def guest_and_hosts(n: int) -> dict[str, str]:
    return {"alice": "guest", **dict(zip(["bob", "carol", "dave", "erin"], ["host"] * (n - 1), strict=False))}


def test_messages_arrive_once_and_in_order_whatever_is_killed():
    def heard(outputs: Any) -> None:
        hosts = [alias for alias in outputs if alias != "alice"]
        assert outputs["alice"]["report"].values["heard"] == [dict.fromkeys(hosts, turn + 1) for turn in range(3)]
        assert all(outputs[host]["report"] is None for host in hosts)

    check_stage(
        talk,
        Params(),
        lambda n: dict(zip(guest_and_hosts(n), split(n), strict=True)),
        heard,
        roles=guest_and_hosts,
    )


def test_roles_that_the_stage_does_not_allow_are_refused():
    inputs = dict(zip(["alice", "bob"], split(2), strict=True))
    with pytest.raises(ValueError, match="guest"):
        run_stage(talk, Params(), inputs, roles={"alice": "guest", "bob": "guest"})
    with pytest.raises(ValueError, match="say who holds which"):
        run_stage(talk, Params(), inputs)
    with pytest.raises(ValueError, match="member"):
        run_stage(average, Params(), split(1))


# faults that one run shows


@of_members
async def undeclared(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    await peers.sum("secret", table.column("x"))
    return model()


@of_members
async def too_often(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    await peers.sum("a", np.ones(1))
    await peers.sum("a", np.ones(1))
    return model()


@of_members
async def other_shapes(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    await peers.sum("a", np.ones(1 if peers.me == "bob" else 2))
    return model()


@of_members
async def other_tags(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    await peers.sum("a" if peers.me == "bob" else "b", np.ones(1))
    return model()


@of_members
async def too_large(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    await peers.sum("a", np.array([1e9]))
    return model()


@of_members
async def own_as_shared(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    state = {"fine": 1, "mine": 0.0}
    for _ in peers.rounds(2, shared=state):
        await peers.sum("a", np.ones(1))
        state["mine"] = float(table.column("x")[0])
    return model()


@of_members
async def hangs(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    if peers.me != "bob":
        await peers.sum("a", np.ones(1))
    return model()


class Elsewhere:
    def __await__(self) -> Any:
        yield "sleep"


@of_members
async def sleeps(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    await Elsewhere()
    return model()


@of_members
async def returns_nothing(peers: Peers, params: Params, table: Table) -> None:
    return None


@of_members
async def returns_a_report(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    return {"model": Report({})}


@pytest.mark.parametrize(
    ("faulty", "error", "says"),
    [
        (undeclared, GateClosed, "'secret'.*not declared"),
        (too_often, GateClosed, "1 times in a turn"),
        (other_shapes, SumError, "do not agree.*layout"),
        (other_tags, SumError, "do not agree.*tag"),
        (too_large, StageError, "2\\^22"),
        (own_as_shared, StageError, "'mine' differs"),
        (hangs, StageError, "hangs: .*waits for the others at 'a'"),
        (sleeps, StageError, "await nothing but"),
        (returns_nothing, StageError, "returned a NoneType; declared are model"),
        (returns_a_report, StageError, "'model' is a Report"),
    ],
)
def test_a_fault_is_an_error_that_says_what_it_is(faulty: Stage, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        run_stage(faulty, Params(), split(3))


# faults that only a restart shows

elsewhere = itertools.count()


@of_members
async def chance_of_its_own(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    for _ in peers.rounds(2, shared={}):
        await peers.sum("a", np.array([next(elsewhere)]))
        await peers.sum("b", np.array([1]))
    return model()


@of_members
async def forgets(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    seen = 0  # not in a dict given to rounds
    for _ in peers.rounds(3, shared={}):
        seen += int((await peers.sum("a", np.array([1])))["values"][0])
    return model(seen=seen)


@of_members
async def holds_on(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    state = {"w": np.zeros(1)}
    w = state["w"]  # is not what the loop goes on with after a restart
    for _ in peers.rounds(3, shared=state):
        w += (await peers.sum("a", np.ones(1)))["values"]
    return model(w=w.tolist())


def nothing(_outputs: Any) -> None:
    pass


def test_chance_that_is_not_of_peers_is_found_by_the_restart():
    run_stage(chance_of_its_own, Params(), split(2))
    with pytest.raises(NotDeterministic, match="repeats turn 1"):
        check_stage(chance_of_its_own, Params(), split, nothing)


@pytest.mark.parametrize(
    ("faulty", "error", "says"),
    [
        (forgets, AssertionError, "killed at every request the outputs have other bytes"),
        (holds_on, StageError, "'w' differs"),
    ],
)
def test_state_outside_of_the_dicts_of_rounds_is_found_by_the_restart(faulty: Stage, error: type[Exception], says: str):
    run_stage(faulty, Params(), split(2))
    with pytest.raises(error, match=says):
        check_stage(faulty, Params(), split, nothing)


def test_an_output_that_is_not_equal_at_all_is_found():
    @of_members
    async def named(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
        return model(me=peers.me)

    with pytest.raises(AssertionError, match="'model' of bob has other bytes"):
        check_stage(named, Params(), split, nothing)


def test_a_wrong_result_is_what_pooled_says():
    def wrong(_outputs: Any) -> None:
        raise AssertionError("not the mean")

    with pytest.raises(AssertionError, match="not the mean"):
        check_stage(average, Params(), split, wrong)


# faults that only another processor shows


async def _softened(peers: Peers, table: Table, agree: bool) -> dict[str, Any]:
    state = {"weights": np.zeros(4096)}
    for _ in peers.rounds(3, shared=state):
        total = await peers.sum("a", np.linspace(0.001, 0.2, 4096) + state["weights"] / 1e9 + table.column("x")[0] / 97)
        weights = np.exp(total["values"])
        state["weights"] = await peers.agree("c", weights) if agree else weights
    return model(weights=state["weights"].tolist())


@of_members
async def exponential(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    return await _softened(peers, table, agree=False)


@of_members
async def agreed_exponential(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    return await _softened(peers, table, agree=True)


needs_vector_units = pytest.mark.skipif(
    not older_processor(), reason="numpy uses no vector unit here that can be turned off"
)


@needs_vector_units
def test_a_shared_state_that_differs_by_processor_is_found():
    with pytest.raises(AssertionError, match="older processor, has another shared state after 1 turns: 'weights'"):
        check_stage(exponential, Params(), split, nothing)


@needs_vector_units
def test_a_shared_state_that_was_agreed_on_is_equal_on_any_processor():
    check_stage(agreed_exponential, Params(), split, nothing)


def test_a_value_that_differs_by_more_than_rounding_is_not_agreed_on():
    @of_members
    async def quarrel(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
        return model(x=await peers.agree("c", float(table.column("x")[0])))

    with pytest.raises(StageError, match="'c' that was proposed"):
        run_stage(quarrel, Params(), split(3))
