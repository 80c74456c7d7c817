"""The command line of approvals: what is shown before anybody says yes, and what is asked of the daemon then."""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec
import pytest
import test_cli
from test_cli import REVIEW, Peer, Run, Stdin, job_view

from fedpeer.errors import PolicyError
from fedpeer.jobs.views import AsksView, ChangeView, FindingView, ReadView

peer, run, no_environment = test_cli.peer, test_cli.run, test_cli.no_environment  # fixtures
APPROVE = ("job", "approve", "ab12", "--yes")


def review(peer: Peer, **changes: Any) -> None:
    peer.answers["job.review"] = msgspec.structs.replace(REVIEW, **changes)


def asked(peer: Peer, name: str) -> list[dict[str, Any]]:
    return [arguments for command, arguments in peer.asked if command == name]


def test_before_it_asks_it_shows_what_it_is_about(peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"y\n"))
    code, out, err = run("job", "approve", "ab12")
    assert (code, "--yes" in err) == (2, True)
    assert asked(peer, "job.approve") == []
    for text in (
        "horizontal.logistic:fit, as member", "rows: 1234 rows; 2 columns: age, bmi; label y", "reg_lambda = 0.1",
        "gradient  sum", "sum of gradients", "nobody sees one's part", "values are hidden among those of at least 2",
        "epsilon 0.5", "min_rows: 1234 rows in 'rows'", "the first job of bank",
    ):  # fmt: skip
        assert text in out
    assert "\x1b" not in out


def test_the_job_that_was_shown_is_the_one_that_is_approved(peer: Peer, run: Run) -> None:
    code, out, _ = run(*APPROVE)
    assert (code, out.splitlines()[-1]) == (0, "approved breast")
    assert asked(peer, "job.approve") == [{"ref": REVIEW.id, "always": 0}]


@pytest.mark.parametrize(
    ("options", "always"), [((), 0), (("--always-like-this",), 1), (("--always-like-this", "--on-new-rows"), 2)]
)
def test_how_far_an_approval_goes(peer: Peer, run: Run, options: tuple[str, ...], always: int) -> None:
    assert run(*APPROVE, *options)[0] == 0
    assert asked(peer, "job.approve")[0]["always"] == always


def test_new_rows_go_with_always(peer: Peer, run: Run) -> None:
    code, _, err = run(*APPROVE, "--on-new-rows")
    assert (code, "--always-like-this" in err) == (2, True)
    assert peer.asked == []


def test_every_column_is_named_however_many_they_are(peer: Peer, run: Run) -> None:
    names = [f"c{number}" for number in range(400)]
    wide = msgspec.structs.replace(
        REVIEW.stages[0], reads=[ReadView(dataset="rows", rows=1234, columns=names, label="y")]
    )
    review(peer, stages=[wide])
    for shown in (run("job", "review", "ab12")[1], run(*APPROVE)[1]):
        assert f"400 columns: {', '.join(names)}; label y" in shown


def test_the_second_person_is_called_for(peer: Peer, run: Run) -> None:
    peer.answers["job.approve"] = job_view("proposed", asks=AsksView(until="t", needs=2, approved=["ann (1000)"]))
    assert "another person must approve it" in run(*APPROVE)[1]


def test_what_is_new_is_shown_field_by_field(peer: Peer, run: Run) -> None:
    changes = [ChangeView(field="stages.fit.params.reg_lambda", before="0.1", after="0.01")]
    review(peer, compared_with="cd" * 32, differences=changes)
    shown = run("job", "review", "ab12")[1].split()
    assert shown[-3:] == ["stages.fit.params.reg_lambda", "0.1", "0.01"]
    review(peer, compared_with="cd" * 32, differences=[])
    assert "the same as cdcdcdcdcdcd" in run("job", "review", "ab12")[1]


def test_a_bound_of_the_whole_contract_is_shown_without_a_stage(peer: Peer, run: Run) -> None:
    holds = FindingView(rule="jobs_per_day", stage="", holds=True, text="3 jobs")
    fails = FindingView(rule="sandbox", stage="", holds=False, text="none")
    review(peer, findings=[holds, fails])
    assert "\n  FAILS sandbox: none\n  jobs_per_day: 3 jobs\n" in run("job", "review", "ab12")[1]


def test_what_the_policy_refuses_is_shown_and_said(peer: Peer, run: Run) -> None:
    failed = FindingView(rule="min_rows", stage="fit", holds=False, text="12 rows in 'rows', min_rows = 100")
    review(peer, verdict="refused", findings=[failed])
    peer.answers["job.approve"] = PolicyError("the policy refuses it: fit: 12 rows")
    code, out, err = run("job", "approve", "ab12")
    assert code == 6
    assert "FAILS fit min_rows: 12 rows" in out
    assert "the policy refuses it" in err


def test_machines_read_one_envelope(peer: Peer, run: Run) -> None:
    code, out, err = run("--json", *APPROVE)
    assert (code, err) == (0, "")
    assert json.loads(out)["data"]["name"] == "breast"
    view = json.loads(run("job", "review", "ab12", "--json")[1])["data"]
    assert view["stages"][0]["messages"][0]["kind"] == "sum"


def test_a_denial_takes_a_reason_for_the_own_log(peer: Peer, run: Run) -> None:
    code, out, _ = run("job", "deny", "ab12", "--reason", "not with them")
    assert code == 0
    assert "when the time to answer is over" in out
    assert asked(peer, "job.deny") == [{"ref": "ab12", "reason": "not with them"}]


def test_approvals_alone_lists(peer: Peer, run: Run) -> None:
    shown = run("approvals")[1]
    for text in ("breast", "1 of 2", "rows (new rows, too)", "ann (1000)"):
        assert text in shown
    assert run("approvals", "list")[1] == run("approvals", "ls")[1] == shown
    assert set(json.loads(run("--json", "approvals")[1])["data"]) == {"asking", "standing"}


def test_a_standing_approval_is_revoked_by_its_number(peer: Peer, run: Run) -> None:
    assert run("approvals", "revoke", "7")[0] == 0
    assert asked(peer, "approvals.revoke") == [{"number": 7}]
    assert run("approvals", "revoke", "seven")[0] == 2


def test_a_job_that_asks_says_how_to_answer(peer: Peer, run: Run) -> None:
    peer.answers["job.show"] = job_view("proposed", asks=AsksView(until="2026-01-01", needs=1))
    assert "your approval until 2026-01-01: fedpeer job approve ab12ab12ab12" in run("job", "show", "ab12")[1]
