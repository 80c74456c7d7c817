"""The life of a job as a table, and its end from what was said, in whatever order it was said."""

from __future__ import annotations

import itertools
import random

import pytest
from test_contract import VERTICAL, find, parse

from fedpeer import codec
from fedpeer.errors import (
    Cancelled,
    ColumnsDiffer,
    DataError,
    FedpeerError,
    GateClosed,
    JobError,
    LocalProtocolError,
    NotEqual,
    PolicyError,
    StageError,
    SumError,
    WorkerCrashed,
)
from fedpeer.jobs import contract, lifecycle
from fedpeer.jobs.lifecycle import Abort, Answer, Done, Event, Heard, State, Verdict, step

CONTRACT = parse()
PEERS = CONTRACT.peers
COMMON = contract.outputs_equal(CONTRACT, find)
EARLY, LATE = CONTRACT.expires, CONTRACT.expires + contract.SKEW_S
YES = Answer(True, "", ())
H = bytes([7]) * 32


def name_of(peer: str) -> str:
    return peer.removeprefix("fp1")


def done(model: bytes = H, fit: bytes = H, evaluate: bytes = H) -> Done:
    return Done((("evaluate", evaluate), ("fit", fit)), (("fit", "model", model),))


def judge(heard: Heard, now: int = EARLY, failure: FedpeerError | None = None) -> Verdict | None:
    return lifecycle.judge(CONTRACT, heard, now, failure, COMMON, name_of)


def everybody(record: object) -> dict:
    return dict.fromkeys(PEERS, record)


MOVES = {
    (State.PROPOSED, Event.AGREE): State.AGREED,
    (State.AGREED, Event.START): State.RUNNING,
    (State.AGREED, Event.FINISH): State.DONE,
    (State.RUNNING, Event.FINISH): State.DONE,
    **{(s, Event.FAIL): State.FAILED for s in (State.PROPOSED, State.AGREED, State.RUNNING)},
    **{(s, Event.CANCEL): State.CANCELLED for s in (State.PROPOSED, State.AGREED, State.RUNNING)},
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_a_job_moves_as_the_table_says_and_never_otherwise(state: State, event: Event) -> None:
    if (state, event) in MOVES:
        assert step(state, event) is MOVES[state, event]
    else:
        with pytest.raises(LocalProtocolError, match=f"{state} cannot be {event}"):
            step(state, event)


def test_three_states_are_ends() -> None:
    assert {State.DONE, State.FAILED, State.CANCELLED} == lifecycle.TERMINAL


def test_it_is_agreed_when_all_have_approved() -> None:
    heard = Heard()
    for peer in PEERS:
        assert not lifecycle.agreed(CONTRACT, heard)
        assert judge(heard) is None
        heard.answers[peer] = YES
    assert lifecycle.agreed(CONTRACT, heard)
    assert judge(heard) is None
    heard.answers[PEERS[2]] = Answer(False, "contract", ())
    assert not lifecycle.agreed(CONTRACT, heard)


def test_it_says_for_whom_it_waits() -> None:
    def waiting(state: State, heard: Heard) -> list[str]:
        return lifecycle.waiting_for(CONTRACT, heard, state, PEERS[0], lambda peer: peer == PEERS[3])

    assert waiting(State.PROPOSED, Heard(answers={PEERS[0]: YES, PEERS[3]: YES})) == [PEERS[1], PEERS[2]]
    assert waiting(State.RUNNING, Heard()) == [PEERS[3]]
    assert waiting(State.RUNNING, Heard(dones={PEERS[0]: done(), PEERS[3]: done()})) == [PEERS[1], PEERS[2]]
    assert waiting(State.DONE, Heard()) == []


ENDS = [
    ("all done", Heard(dones=everybody(done())), None, EARLY, Event.FINISH, None, ""),
    ("all done, late", Heard(dones=everybody(done())), None, LATE, Event.FINISH, None, ""),
    ("one not yet", Heard(dones={peer: done() for peer in PEERS[:3]}), None, EARLY, None, None, ""),
    ("one not yet, late", Heard(dones={peer: done() for peer in PEERS[:3]}, answers=everybody(YES)), None, LATE,
     Event.FAIL, JobError, "waited for west"),
    ("not answered, late", Heard(answers=dict.fromkeys(PEERS[1:], YES)), None, LATE, Event.FAIL, JobError,
     "waited for north"),
    ("not answered, within the skew", Heard(), None, LATE - 1, None, None, ""),
    ("refused", Heard(answers={PEERS[1]: Answer(False, "contract", ())}), None, EARLY, Event.FAIL, JobError,
     "south cannot run this contract"),
    ("refused for what is not known", Heard(answers={PEERS[1]: Answer(False, "x", ())}), None, EARLY, Event.FAIL,
     JobError, "newer release"),
    ("aborted", Heard(aborts={PEERS[2]: Abort("worker_crashed", "killed")}), None, EARLY, Event.FAIL, WorkerCrashed,
     "east ended the job: killed"),
    ("aborted and refused", Heard(answers={PEERS[1]: Answer(False, "data", ())}, aborts={PEERS[2]: Abort("sum", "x")}),
     None, EARLY, Event.FAIL, FedpeerError, "east ended"),
    ("aborted with what is not known", Heard(aborts={PEERS[2]: Abort("x", "y")}), None, EARLY, Event.FAIL,
     FedpeerError, "y"),
    ("cancelled by another", Heard(aborts={PEERS[2]: Abort("cancelled", "")}), None, EARLY, Event.CANCEL, Cancelled,
     "east cancelled"),
    ("cancelled here", Heard(), Cancelled("by me"), EARLY, Event.CANCEL, Cancelled, "by me"),
    ("failed here", Heard(aborts={PEERS[2]: Abort("cancelled", "")}), StageError("mine"), EARLY, Event.FAIL,
     StageError, "mine"),
    ("failed here, all done", Heard(dones=everybody(done())), StageError("mine"), EARLY, Event.FINISH, None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("heard", "failure", "now", "event", "kind", "words"), [e[1:] for e in ENDS],
                         ids=[e[0] for e in ENDS])  # fmt: skip
def test_how_it_ends(heard, failure, now, event, kind, words) -> None:
    verdict = judge(heard, now, failure)
    assert (verdict and verdict.event) == event
    if verdict is not None:
        assert (verdict.error is None) == (kind is None)
        assert words in (verdict.error.message if verdict.error else "")
        assert kind is None or isinstance(verdict.error, kind)


def test_the_end_is_the_same_at_all_whatever_the_order(seed: int) -> None:
    """Each says done or abort. Records arrive in any order; nobody is ever told another end."""
    chance = random.Random(seed)
    for _ in range(300):
        said = [(peer, "abort" if chance.random() < 0.2 else "done") for peer in PEERS]
        ends = set()
        for _ in PEERS:
            heard, verdict = Heard(), None
            for peer, kind in chance.sample(said, len(said)):
                if kind == "done":
                    heard.dones[peer] = done()
                else:
                    heard.aborts[peer] = Abort("sum", "no")
                verdict = verdict or judge(heard)
            assert verdict is not None
            ends.add(verdict.event)
        assert ends == {Event.FAIL if ("abort" in dict(said).values()) else Event.FINISH}


def test_results_that_differ_are_a_failure_that_names_who_differs() -> None:
    for other, what in (
        (done(model=bytes(32)), "the output fit.model"),
        (done(fit=bytes(32)), "stage 'fit'"),
        (done(evaluate=bytes(32)), "stage 'evaluate'"),
        (Done((), ()), "stage 'fit'"),
        (Done(done().histories, ()), "the output fit.model"),
    ):
        verdict = judge(Heard(dones={**everybody(done()), PEERS[1]: other}))
        assert verdict is not None
        assert isinstance(verdict.error, NotEqual)
        assert what in verdict.error.message
        assert "south" in verdict.error.message
        assert "north" not in verdict.error.message


def test_own_parts_may_differ() -> None:
    vertical = parse(VERTICAL)
    dones = {peer: Done((("align", H), ("pick", H)), ()) for peer in vertical.peers}
    lifecycle.compare_results(vertical, dones, contract.outputs_equal(vertical, find), name_of)


# columns


def brought(columns: list[tuple[str, str]], label: str = "y", told: bool = True, dataset: str = "breast"):
    return lifecycle.brought(dataset, bytes(32), b"salt", columns, label, told=told)


def compare(*others: lifecycle.Brought) -> None:
    same = brought([("a", "number"), ("b", "text")])
    answers = {peer: Answer(True, "", (item,)) for peer, item in zip(PEERS, [same, *others], strict=False)}
    answers = {peer: answers.get(peer, Answer(True, "", (same,))) for peer in PEERS}
    lifecycle.compare_columns(CONTRACT, answers, name_of)


def test_members_bring_the_same_columns() -> None:
    compare()
    for other, words in (
        (brought([("a", "number")]), "north has 'b', which south has not"),
        (brought([("a", "number"), ("b", "text"), ("c", "text")]), "south has 'c', which north has not"),
        (brought([("a", "number"), ("b", "number")]), "'b' is text at north and number at south"),
        (brought([("b", "text"), ("a", "number")]), "another order"),
        (brought([("a", "number"), ("b", "text")], "b"), "label column is 'y' at north and 'b' at south"),
        (brought([("a", "number"), ("b", "text")], told=False), "south"),
    ):
        with pytest.raises(ColumnsDiffer) as caught:
            compare(other)
        assert words in caught.value.message
        assert "stage 'fit'" in caught.value.message


def test_who_says_nothing_of_its_columns_is_named() -> None:
    with pytest.raises(ColumnsDiffer, match="south did not say"):
        compare(brought([("a", "number"), ("b", "text")], dataset="other"))


def test_guests_and_hosts_have_columns_of_their_own() -> None:
    vertical = parse(VERTICAL.split('[[stage]]\nid = "pick"')[0] + "[[stage]]" + VERTICAL.split("[[stage]]")[2])
    lifecycle.compare_columns(vertical, dict.fromkeys(vertical.peers, YES), name_of)


def test_too_many_columns_are_compared_by_their_digest_and_fit_a_record() -> None:
    many = [(f"column number {i}", "number") for i in range(5000)]
    item = brought(many)
    assert item.columns == ()
    assert len(codec.encode(Answer(True, "", (item,)))) < 1000
    compare_to = brought([*many[:-1], ("other", "number")])
    answers = {peer: Answer(True, "", (item,)) for peer in PEERS}
    lifecycle.compare_columns(CONTRACT, answers, name_of)
    with pytest.raises(ColumnsDiffer):
        lifecycle.compare_columns(CONTRACT, {**answers, PEERS[3]: Answer(True, "", (compare_to,))}, name_of)


def test_the_commitment_hides_the_version_and_binds_to_it() -> None:
    one = brought([]).commitment
    assert one == brought([]).commitment
    assert one != lifecycle.brought("breast", bytes(32), b"other", [], "", told=True).commitment
    assert one != lifecycle.brought("breast", bytes([1]) * 32, b"salt", [], "", told=True).commitment


def test_columns_of_guests_and_hosts_are_not_told() -> None:
    item = brought([("a", "number")], told=False)
    assert (item.columns, item.columns_digest, item.label) == ((), b"", "")


def test_others_hear_a_code_and_never_a_value() -> None:
    secret = "row 3, column 'age': 'mr smith'"
    for kind in (DataError, StageError, JobError, GateClosed, WorkerCrashed):
        error = kind(secret)
        told = lifecycle.abort_of(error)
        assert told.code == error.code
        assert told.message == kind().message
    assert lifecycle.abort_of(SumError("bob comes with another history")).message == "bob comes with another history"
    assert len(lifecycle.abort_of(SumError("x" * 9999)).message) == 500


def test_whatever_a_policy_found_the_others_read_one_code_and_one_sentence() -> None:
    class Spent(PolicyError):
        """The budget of a dataset is spent."""

        code = "spent"

    told = {lifecycle.abort_of(error) for error in (PolicyError("97 rows, min_rows = 100"), Spent("0.3 of 3.0 left"))}
    (abort,) = told
    assert (abort.code, abort.message) == ("policy", PolicyError().message)
    assert lifecycle.abort_of(GateClosed("a canary")).code == "gate"
