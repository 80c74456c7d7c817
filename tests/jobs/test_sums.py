"""What people see of the secure sums of a job: what they protect, their steps, and who was in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from trio.abc import Clock

from fedpeer import stage as stages
from fedpeer.admin import screen
from fedpeer.errors import ContractError
from fedpeer.jobs import contract, views
from fedpeer.jobs.views import JobView
from fedpeer.peers import Peers
from fedpeer.stage import Params, Report, Stage, Sum, at_least, stage
from fedpeer.testing.federation import Federation, federation

NAMES = ["alice", "bob", "carol", "dave", "erin"]
TURNS = 6
STEPS = {"started", "scattered", "added", "committed", "released", "opened", "unmasked", "final"}


@stage(
    version=1,
    roles={"member": at_least(2)},
    inputs={},
    outputs={"report": Report},
    messages={"first": Sum("how many there are", group="data"), "turn": Sum("how many are in this turn")},
)
async def count(peers: Peers, params: Params) -> dict[str, Any]:
    shared = {"counted": [int((await peers.sum("first", np.array([1])))["values"][0])]}
    for turn in peers.rounds(TURNS, shared=shared):
        shared["counted"] += [int((await peers.sum("turn", np.array([1])))["values"][0])]
        peers.progress(turn + 1, TURNS)
    return {"report": Report({"counted": shared["counted"]})}


@stage(version=1, roles={"member": at_least(1)}, inputs={}, outputs={"report": Report}, messages={})
async def alone(peers: Peers, params: Params) -> dict[str, Any]:
    return {"report": Report({})}


def find(name: str) -> Stage:
    return {count.name: count, alone.name: alone}.get(name) or stages.find(name)


CONTRACT = """
[[stage]]
id = "count"
run = "test_sums:count"
[[stage]]
id = "alone"
run = "test_sums:alone"
"""


def proposed(n: int, rules: str = "") -> JobView:
    """A job of n participants as the first sees it."""
    peers = "\n".join(f'p{i} = "p{i}"' for i in range(n))
    text = f'version = 1\nname = "job"\n[participants]\n{peers}\n{CONTRACT}\n[rules]\n{rules}\n'
    read = contract.parse(text, me="p0", resolve=lambda ref: ref, find=find, now=0, nonce=bytes(16))
    return views.first_view(read, bytes(32), "", "p0", lambda peer: peer, find)


# what they protect


@pytest.mark.parametrize(
    ("n", "rules", "profile", "hidden_among", "may_be_away"),
    [
        (3, "", "crash", 2, 0),  # whatever the contract says of a profile
        (4, "", "byz", 2, 1),
        (5, "", "byz", 3, 1),
        (5, 'profile = "crash"', "crash", 3, 1),
        (5, "min_parties = 5", "byz", 4, 0),
        (10, "", "byz", 5, 4),
        (11, "", "byz", 5, 4),
        (50, "", "byz", 21, 20),
        (50, 'profile = "crash"', "crash", 25, 24),
    ],
)
def test_a_job_says_among_how_many_values_are_hidden_and_how_many_may_be_away(
    n: int, rules: str, profile: str, hidden_among: int, may_be_away: int
) -> None:
    with_sums, without = proposed(n, rules).stages
    assert without.sums is None
    sums = with_sums.sums
    assert sums is not None
    assert (len(sums.parties), sums.profile, sums.hidden_among, sums.may_be_away) == (
        n,
        profile,
        hidden_among,
        may_be_away,
    )
    text = screen.protection(msgspec.to_builtins(sums))
    assert f"hidden among those of at least {hidden_among} organizations" in text
    assert ("if all run unmodified software" in text) == (profile == "crash")
    assert ("the job waits when one is away" if may_be_away == 0 else f"; {may_be_away} may be away") in text
    assert ("who was in the first sum over the data alone is waited for" in text) == (may_be_away > 0)
    only_of_turns = screen.protection(msgspec.to_builtins(sums) | {"of_data": False})
    assert "waited for" not in only_of_turns


@pytest.mark.parametrize(("n", "rules"), [(2, ""), (3, "min_parties = 4"), (5, "min_parties = 6")])
def test_too_few_participants_for_a_sum_are_refused_at_submit(n: int, rules: str) -> None:
    with pytest.raises(ContractError, match="makes secure sums, which take at least"):
        proposed(n, rules)


# who was in them


def told(view: JobView, *sums: tuple[int, str]) -> JobView:
    """The view after sums: (turn, numbers of the survivors)."""
    for turn, who in sums:
        survivors = [f"p{number}" for number in who]
        views.apply(view, "", "sum", {"stage": "count", "step": "total", "turn": turn, "k": 0, "survivors": survivors})
    return view


@pytest.mark.parametrize(
    ("sums", "left_out"),
    [
        ([(0, "01234")], {}),
        ([(1, "0123")], {"p4": 1}),
        ([(1, "0123"), (1, "0123"), (2, "0123")], {"p4": 2}),  # turns are counted, not sums
        ([(1, "0123"), (2, "0123"), (3, "01234")], {}),
        ([(1, "0123"), (2, "01234"), (3, "0123")], {"p4": 1}),  # not in a row
        ([(1, "0123"), (2, "0124"), (3, "0124")], {"p3": 2}),
        ([(1, "0123"), (2, "0123"), (2, "01234")], {"p4": 2}),  # of two sums of a turn in one only
        ([(1, "0123"), (2, "01234"), (2, "0123")], {"p4": 2}),
    ],
)
def test_who_is_left_out_of_turns_in_a_row_is_counted(sums: list[tuple[int, str]], left_out: dict[str, int]) -> None:
    view = told(proposed(5), *sums)
    seen = view.stages[0].sums
    assert seen is not None
    assert screen.left_out(msgspec.to_builtins(seen)) == left_out
    assert (seen.turn, seen.survivors) == (sums[-1][0], [f"p{number}" for number in sums[-1][1]])
    named = "p4, 2 turns in a row" in " ".join(screen.job(msgspec.to_builtins(view)).split())
    assert named == (left_out.get("p4") == 2)


TRAIN = """
[[stage]]
id = "fit"
run = "horizontal.logistic:fit"
inputs = { table = "dataset:rows" }
params = { reg_lambda = 0.1 }
"""


async def add_rows(peers: Federation) -> None:
    for number, peer in enumerate(peers.values()):
        chance = np.random.Generator(np.random.PCG64(number))
        x = chance.normal(size=(60, 2))
        noise = 9 if peer.name == "erin" else 1  # so that the mean loss falls when erin leaves, and rises again
        y = (x @ [1.5, -1.0] + noise * chance.normal(size=60) > 0).astype(int)
        lines = [f"{i},{a:.6f},{b:.6f},{label}" for i, ((a, b), label) in enumerate(zip(x, y, strict=True))]
        path = peers.folder / f"{peer.name}.csv"
        path.write_text("\n".join(["id,a,b,y", *lines]) + "\n")
        await peer.daemon.catalog.add("rows", str(path), "id", "y")


CLUSTER = """
[[stage]]
id = "cluster"
run = "horizontal.kmeans:fit"
inputs = { table = "dataset:rows" }
params = { k = 2, max_iter = 2 }
"""
EVALUATE = """
[[stage]]
id = "evaluate"
run = "horizontal.logistic:evaluate"
inputs = { model = "fit.model", table = "dataset:rows" }
"""


@pytest.mark.parametrize(
    ("stages", "leaves", "bound"),
    [
        pytest.param(TRAIN, ("fit", 0), ("fit", 1), id="the first turn of a regression"),
        pytest.param(CLUSTER, ("cluster", 0), ("cluster", 1), id="the first turn of a clustering"),
        pytest.param(TRAIN + EVALUATE, ("fit", 3), ("evaluate", 0), id="an evaluation"),
    ],
)
async def test_no_sum_over_the_data_alone_tells_by_its_difference_what_one_has_who_left(
    stages: str, leaves: tuple[str, int], bound: tuple[str, int], autojump_clock: Clock, quick_path: Path
) -> None:
    """What all begin with is no model, and an evaluation can be asked for twice."""
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        over: dict[tuple[str, int], set[int]] = {}
        away = trio.Event()

        def watch(event: Any) -> None:
            if event["event"] == "sum" and event["step"] == "total":
                over.setdefault((event["stage"], event["turn"]), set()).add(len(event["survivors"]))
                if (event["stage"], event["turn"]) == leaves:
                    away.set()

        peers["alice"].daemon.events.subscribe(watch)
        job = await peers["alice"].daemon.jobs.submit(peers.contract(stages))
        with trio.fail_after(2000):
            await away.wait()
            await peers["erin"].stop()
            await trio.sleep(600)
            assert bound not in over, "it is waited for"
            await peers["erin"].start()
            ended = [await peer.daemon.jobs.wait(job.id) for peer in peers.values()]
        assert {view.state for view in ended} == {"done"}, [view.error for view in ended]
        assert over[bound] == {5}


async def test_training_ends_at_the_optimum_of_all_though_one_was_away_for_some_turns(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        without: dict[bool, set[int]] = {True: set(), False: set()}
        away, back = trio.Event(), trio.Event()

        def watch(event: Any) -> None:
            if event["event"] == "sum" and event["step"] == "total":
                without[peers["erin"].identity.id not in event["survivors"]].add(event["turn"])
                (away if event["turn"] == 2 else trio.Event()).set()
                (back if len(without[True]) == 2 else trio.Event()).set()

        peers["alice"].daemon.events.subscribe(watch)
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        with trio.fail_after(600):
            await away.wait()
            await peers["erin"].stop()
            await back.wait()
            await peers["erin"].start()
            ended = [await peer.daemon.jobs.wait(job.id) for peer in peers.values()]
        assert {view.state for view in ended} == {"done"}, [view.error for view in ended]
        assert len(without[True]) == 2
        assert max(without[False]) > max(without[True]), "it came back in time"
        undisturbed = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN, name="undisturbed"))
        with trio.fail_after(600):
            assert (await peers["alice"].daemon.jobs.wait(undisturbed.id)).state == "done"
        one, other = [(await peers["alice"].daemon.jobs.models.get(name)).facts for name in ("job", "undisturbed")]
        assert one["converged"]
        assert one["objective"] == pytest.approx(other["objective"], rel=1e-9)


async def test_a_participant_that_was_away_sees_with_all_others_who_was_in_each_sum(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        ids = {peer.identity.id: name for name, peer in peers.items()}
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        waiting: dict[tuple[str, int], trio.Event] = {}

        def follow(name: str) -> None:
            def take(event: Any) -> None:
                if event["event"] == "sum":
                    seen[name].append({"erin": "erin" in [ids[peer] for peer in event.get("survivors", ())], **event})
                    if event["step"] == "total" and (name, event["turn"]) in waiting:
                        waiting[name, event["turn"]].set()

            peers[name].daemon.events.subscribe(take)

        for name in NAMES:
            follow(name)
        waiting["alice", 1], waiting["alice", 4] = trio.Event(), trio.Event()
        job = await peers["alice"].daemon.jobs.submit(peers.contract(CONTRACT))
        with trio.fail_after(300):
            await waiting["alice", 1].wait()
            await peers["erin"].stop()
            await waiting["alice", 4].wait()
            shown = screen.job(msgspec.to_builtins(await peers["alice"].daemon.jobs.get(job.id)))
            assert "erin, " in shown
            assert "turns in a row" in shown
            await peers["erin"].start()
            follow("erin")
            ended = [await peer.daemon.jobs.wait(job.id) for peer in peers.values()]
        assert {view.state for view in ended} == {"done"}, [view.error for view in ended]

        totals = {name: [e for e in seen[name] if e["step"] == "total"] for name in NAMES}
        counted = ended[0].outputs[0].values["counted"]
        assert [len(e["survivors"]) for e in totals["alice"]] == counted
        assert counted.count(4) >= 2
        assert len({repr([(e["turn"], e["survivors"]) for e in totals[name]]) for name in NAMES[:4]}) == 1
        assert any(not e["erin"] for e in totals["erin"]), "who was left out is told of it"

        assert {e["step"] for name in NAMES for e in seen[name]} == STEPS | {"total"}
        steps = [e for e in seen["alice"] if e["step"] != "total"]
        assert {e["step"] for e in steps} >= STEPS - {"added"}, "only who owns a slice adds up"
        assert {(e["stage"], e["turn"], e["k"]) for e in steps} == {("count", turn, 0) for turn in range(TURNS + 1)}
        assert all({"sid", "seq"} <= e.keys() for e in steps)
        for name in ("alice", "erin"):
            lines = await peers[name].daemon.jobs.logs(job.id)
            assert [line.facts["turn"] for line in lines if line.event == "sum"][-1] == TURNS
