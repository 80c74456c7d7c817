"""The command line: what it prints, where, and what it ends with.

A server with the real table answers; each of its rows is given a fixed answer of the real record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import structlog
import trio

from fedpeer import cli
from fedpeer.admin import screen, service
from fedpeer.admin.commands import (
    COMMANDS,
    AccountView,
    BudgetView,
    CardView,
    ChargeView,
    EntryView,
    PolicyView,
    StatusView,
    WaitingView,
)
from fedpeer.crypto import Secret
from fedpeer.data.catalog import DatasetView
from fedpeer.data.offers import OffersView, OfferView
from fedpeer.errors import ConfigError, DataError, FedpeerError, NotAuthorized, NotFound, PolicyError, TimedOut, by_code
from fedpeer.events import Events
from fedpeer.governance import export
from fedpeer.governance import tree as audit_tree
from fedpeer.governance.budget import CHARGED, Privacy
from fedpeer.governance.export import Line
from fedpeer.identity import Identity
from fedpeer.jobs.dryrun.service import DryMessageView, DryRunView, DryStageView
from fedpeer.jobs.views import (
    ApprovalsView,
    AskedView,
    DecisionView,
    ErrorView,
    FindingView,
    JobView,
    LogLine,
    MessageView,
    ModelView,
    OutputView,
    ParticipantView,
    ReadView,
    ReviewView,
    StageReviewView,
    StageView,
    StandingView,
    SumsView,
)
from fedpeer.mesh.roster import PeerView

JOB = "ab12" * 16
CARD = "fedpeer-card-1.xyz"


def job_view(state: str = "done", **more: Any) -> JobView:
    return JobView(
        id=JOB, name="breast", purpose="test", state=state, initiator="fp1a", me="clinic",
        waiting_for=[], created="2026-01-01T00:00:00Z",
        participants=[
            ParticipantView(alias="clinic", peer="fp1a", name="clinic", connected=True, state="approved"),
            ParticipantView(alias="bank", peer="fp1b", name="bank\x1b[2J", connected=False, state="waiting"),
        ],
        stages=[StageView(id="fit", run="horizontal.logistic:fit", state="done", role="member", round=7, rounds=9,
                          metrics={"loss": 0.123456789}, restarts=1)],
        outputs=[
            OutputView(stage="fit", name="model", kind="model", digest="cd" * 32),
            OutputView(
                stage="evaluate",
                name="report",
                kind="report",
                digest="ef" * 32,
                values={"auc": 0.991, "age": {"mean": 1 / 3, "edges": [1.0, 2.5]}},
            ),
        ],
        **more,
    )  # fmt: skip


def sums_view(**more: Any) -> SumsView:
    parties = ["clinic", "bank", "shop", "lab"]
    return SumsView(parties=parties, profile="byz", hidden_among=2, pooling=1, may_be_away=1, of_data=False, **more)


def peer_view(ref: str = "bank") -> PeerView:
    return PeerView(
        id="fp1b" + "b" * 31, name=ref, fingerprint="acid acorn", addresses=["b:1"], connected=False,
        since="", bytes_sent=1234, bytes_received=0, error="does not know us yet",
    )  # fmt: skip


DATASET = DatasetView(
    name="rows", uri="/d.csv", id="id", label="y", rows=3, columns=[["age", "number"], ["y", "boolean"]]
)
OFFERS = OffersView(
    peer="bank\x1b[2J",
    datasets=[
        OfferView(name="loans", rows="about 1200", id="id", label=None, columns=[["age", "number"]], more_columns=2)
    ],
    more=1,
)
MODEL = ModelView(
    digest="cd" * 32,
    job=JOB,
    job_name="breast",
    stage="fit",
    algorithm="horizontal.logistic",
    created="t",
    facts={"n": 3},
)
PASSPORT = {
    "fedpeer_passport": 1,
    "passport": {
        "contract": JOB, "job": "bre\x1b[31mast", "contributors": ["clinic", "bank"], "rounds": 7, "epsilon": None,
        "sums": [{"survivors": ["clinic", "bank"], "first_turn": 1, "last_turn": 7, "sums": 14}],
        "metrics": {"auc": 0.91}, "model": "cd" * 32,
    },
    "cards": [], "signatures": ["AA==", "AA=="],
}  # fmt: skip
ENTRY = EntryView(number=4, time="t", event="peer_added\x1b[31m", job=JOB, facts={"name": "ba\x1b[31mnk"})
DRY_RUN = DryRunView(
    name="quality",
    seconds=2.25,
    stages=[
        DryStageView(
            id="fit", run="horizontal.logistic:fit", participants=["bank", "shop", "telco"], rows={"table": 440},
            seconds=2.0, outputs={"model": "model"},
            messages=[DryMessageView(tag="step", kind="sum", text="a \x1b[31msum", count=4, bytes=120)],
        ),
        DryStageView(
            id="take", run="local.select:run", participants=["bank"], rows={}, seconds=0.2, messages=[], outputs={}
        ),
    ],
)  # fmt: skip
POLICY = PolicyView(number=3, text="# ours\nmin_rows = 50 # \x1b[2J\n", uid=0, time="t")
DECISION = DecisionView(
    verdict="ask",
    findings=[
        FindingView(rule="jobs_per_day", stage="", holds=True, text="0 jobs of bank\x1b[2J, jobs_per_day = 20"),
        FindingView(rule="approve", stage="fit", holds=True, text="approve has the operator asked"),
    ],
)
REVIEW = ReviewView(
    id=JOB, name="breast", purpose="a model\x1b[2J", initiator="bank", participants=["clinic", "bank", "shop"],
    state="asking", until="u", expires="e", needs=1, approved=[], released=["fit.model"], epsilon=0.5, verdict="ask",
    stages=[
        StageReviewView(
            id="fit", run="horizontal.logistic:fit", text="Fits.\n\nAt length.", role="member",
            parties=["clinic", "bank", "shop"], params={"reg_lambda": 0.1},
            reads=[ReadView(dataset="rows", rows=1234, columns=["age", "bmi"], label="y")],
            messages=[MessageView(tag="gradient", kind="sum", sender="", receiver="", text="sum of gradients")],
            sums=sums_view(), epsilon=0.5, delta=1e-6,
        )
    ],
    findings=[FindingView(rule="min_rows", stage="fit", holds=True, text="1234 rows in 'rows', min_rows = 100")],
    compared_with="", differences=[],
)  # fmt: skip
STANDING = StandingView(
    number=7, job=JOB, name="breast", initiator="bank\x1b[2J", datasets=["rows"], new_rows=True, epsilon=0.5,
    people=["ann (1000)"], created="t", expires="e",
)  # fmt: skip
APPROVALS = ApprovalsView(
    asking=[
        AskedView(
            id=JOB, name="breast", purpose="a model", initiator="bank", until="u", needs=2, approved=["ann (1000)"]
        )
    ],
    standing=[STANDING],
)
ACCOUNT = AccountView(
    dataset="rows", partner="fp1b", name="bank\x1b[2J", epsilon=0.8, left=2.2, delta=1e-8, stages=1, last="t"
)
BUDGET = BudgetView(
    dataset="rows", remembered=7, most_remembered=1000, per_year=3.0, per_job=None, accounts=[ACCOUNT],
    charges=[ChargeView(time="t", job=JOB, stage="describe", run="horizontal.statistics:private", partner="fp1b",
                        name="bank\x1b[2J", epsilon=0.8, delta=1e-8)],
)  # fmt: skip
CARD_VIEW = CardView(id="fp1a", name="clinic", fingerprint="acid acorn", card=CARD)
STATUS = StatusView(
    name="clinic", id="fp1a", fingerprint="acid", version="0", home="/h", started="t", listening=[], addresses=[],
    peers=2, connected=1, jobs=0, datasets=0, sandbox="landlock 7, seccomp, limits", bytes_sent=1500, bytes_received=2,
)  # fmt: skip


class Peer:
    """A home, and a server on its admin socket in a thread. `asked` keeps what arrived."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.events = Events()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {
            "status": STATUS, "card": CARD_VIEW, "peer.add": peer_view(), "peer.list": [peer_view()],
            "peer.show": peer_view(), "peer.remove": peer_view(),
            "peer.datasets": OFFERS,
            "peer.ping": {"id": "fp1b", "name": "bank", "seconds": 0.0123},
            "dataset.add": DATASET, "dataset.list": [DATASET], "dataset.show": DATASET, "dataset.remove": None,
            "dataset.offer": DATASET,
            "job.submit": job_view("proposed"), "job.list": [job_view()], "job.show": job_view(),
            "job.wait": job_view(), "job.dry-run": DRY_RUN,
            "job.logs": [
                LogLine(time="t", event="sum", facts={"stage": "fit", "turn": 1, "survivors": ["fp1a", "fp1gone"]})
            ],
            "job.cancel": job_view("cancelled"),
            "job.review": REVIEW, "job.approve": job_view("proposed"), "job.deny": job_view("proposed"),
            "approvals.list": APPROVALS, "approvals.revoke": STANDING,
            "policy.show": POLICY, "policy.set": POLICY, "policy.test": DECISION,
            "budget.list": [ACCOUNT], "budget.show": BUDGET,
            "model.list": [MODEL], "model.show": MODEL, "model.predict": b"id,score\n1,0.5\n2,0.25\n",
            "audit.list": [ENTRY], "audit.show": ENTRY, "audit.accept": {"id": "fp1b", "name": "bank", "known": 7},
            "audit.export": b"", "model.passport": PASSPORT,
        }  # fmt: skip
        self._ready = threading.Event()
        self._heard = threading.Condition()
        self._thread = threading.Thread(target=trio.run, args=(self._run,))

    def _handler(self, name: str) -> Callable[[Any, Any], Any]:
        async def handler(_target: Any, ask: Any) -> Any:
            with self._heard:
                self.asked.append((name, {field: getattr(ask, field) for field in ask.__struct_fields__}))
                self._heard.notify_all()
            answer = self.answers[name]
            if answer == "never":
                await trio.sleep_forever()
            if isinstance(answer, Exception):
                raise answer
            return answer() if callable(answer) else answer

        return handler

    async def _run(self) -> None:
        rows = [dataclasses.replace(row, handler=self._handler(row.name)) for row in COMMANDS.values()]
        log = structlog.testing.CapturingLogger()
        self.server = service.AdminServer(rows, None, self.events, log=log)
        self._token = trio.lowlevel.current_trio_token()
        with service.listening(self.home / "admin" / "admin.sock") as listeners:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.server.serve, *listeners)
                self._scope = nursery.cancel_scope
                self._ready.set()

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call something in the server's thread."""
        return trio.from_thread.run_sync(function, *arguments, trio_token=self._token)

    def wait_until_asked(self, name: str, times: int) -> None:
        with self._heard:
            assert self._heard.wait_for(lambda: [asked for asked, _ in self.asked].count(name) >= times, timeout=30)

    def __enter__(self) -> Peer:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.do(lambda: self._scope.cancel())
        self._thread.join()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDPEER_SOCKET", raising=False)
    monkeypatch.setenv("FEDPEER_HOME", str(tmp_path))


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with Peer(tmp_path) as running:
        yield running


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("named", ["option", "environment"])
def test_a_home_that_this_user_may_not_read_is_not_authorized(request: pytest.FixtureRequest, named: str) -> None:
    folder = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: shutil.rmtree(folder))
    folder.chmod(0)
    program = (
        "import os, sys; from fedpeer import cli; import fedpeer.errors\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["status", "--home", str(folder)] if named == "option" else ["status"]
    asked = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "FEDPEER_HOME": str(folder)} if named == "environment" else None,
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 4, asked.stderr
    assert str(folder) in asked.stderr


VERBS: dict[str, tuple[str, ...]] = {
    "status": ("status",),
    "card": ("card",),
    "peer.add": ("peer", "add", CARD),
    "peer.list": ("peer", "ls"),
    "peer.show": ("peer", "show", "bank"),
    "peer.ping": ("peer", "ping", "bank"),
    "peer.datasets": ("peer", "datasets", "bank"),
    "peer.remove": ("peer", "remove", "bank", "--yes"),
    "dataset.add": ("dataset", "add", "rows", "/d.csv", "--id", "id", "--label", "y"),
    "dataset.list": ("dataset", "list"),
    "dataset.show": ("dataset", "show", "rows"),
    "dataset.offer": ("dataset", "offer", "rows"),
    "dataset.remove": ("dataset", "remove", "rows", "--yes"),
    "job.submit": ("job", "submit", "-"),
    "job.dry-run": ("job", "dry-run", "-"),
    "job.list": ("job", "list"),
    "job.show": ("job", "show", "ab12"),
    "job.wait": ("job", "wait", "ab12"),
    "job.logs": ("job", "logs", "ab12"),
    "job.cancel": ("job", "cancel", "ab12", "--yes"),
    "job.review": ("job", "review", "ab12"),
    "job.approve": ("job", "approve", "ab12", "--yes"),
    "job.deny": ("job", "deny", "ab12"),
    "approvals.list": ("approvals",),
    "approvals.revoke": ("approvals", "revoke", "7"),
    "policy.show": ("policy", "show"),
    "policy.set": ("policy", "set", "-"),
    "policy.test": ("policy", "test", "--job", "-"),
    "budget.list": ("budget", "list"),
    "budget.show": ("budget", "show", "rows"),
    "model.list": ("model", "list"),
    "model.show": ("model", "show", "cd"),
    "model.predict": ("model", "predict", "cd", "rows"),
    "model.passport": ("model", "passport", "cd"),
    "audit.list": ("audit", "list", "--job", "ab12"),
    "audit.show": ("audit", "show", "4"),
    "audit.export": ("audit", "export", os.devnull),
    "audit.accept": ("audit", "accept", "bank", "--yes"),
}


class Stdin:
    """Standard input that is a pipe."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


def test_a_dry_run_shows_what_would_leave(peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"version = 1"))
    code, out, _ = run("job", "dry-run", "-")
    assert code == 0
    words = " ".join(out.split())
    for told in ("fit (horizontal.logistic:fit)", "3 on this machine", "table: 440 synthetic rows", "model (model)"):
        assert told in words
    assert "step sum 4 120 B a" in words
    assert "nothing leaves" in words
    assert out.splitlines()[-1] == "quality ran through in 2.2 s; nothing was sent or kept"


def test_all_verbs_are_tried_here() -> None:
    assert set(VERBS) == {name for name in COMMANDS if not name.startswith("health.")}


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_asks_the_daemon_and_shows_the_answer(
    peer: Peer, run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"version = 1"))
    code, out, _ = run(*VERBS[name])
    assert (code, peer.asked[-1][0]) == (0, name)
    assert out.strip()
    assert "\x1b" not in out, "a name from outside must not steer the terminal"
    monkeypatch.setattr(sys, "stdin", Stdin(b"version = 1"))
    for arguments in (("--json", *VERBS[name]), (*VERBS[name], "--json")):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        envelope = json.loads(out)
        assert (envelope["v"], envelope["ok"]) == (1, True)
        assert name == "dataset.remove" or envelope["data"]
        monkeypatch.setattr(sys, "stdin", Stdin(b"version = 1"))


def test_a_budget_is_shown_with_its_limits_and_its_charges(peer: Peer, run: Run) -> None:
    shown = run("budget", "show", "rows")[1]
    for text in ("a partner and year  ε = 3", "a job               no limit", "horizontal.statistics:private", "2.2",
                 "answered            from 7 tables of at most 1000"):  # fmt: skip
        assert text in shown
    assert "--forget" not in shown
    peer.answers["budget.show"] = msgspec.structs.replace(BUDGET, remembered=1000)
    assert "fedpeer dataset remove rows --forget" in run("budget", "show", "rows")[1]
    peer.answers["budget.list"] = []
    assert run("budget", "list")[1] == "nothing was charged in the last year\n"


def test_the_log_names_who_is_in_a_sum(peer: Peer, run: Run) -> None:
    assert run("job", "logs", "ab12")[1] == "t  sums over  stage=fit  turn=1  survivors=clinic, fp1gone\n"
    assert json.loads(run("job", "logs", "ab12", "--json")[1])["data"][0]["facts"]["survivors"] == ["fp1a", "fp1gone"]


def test_a_log_is_exported_page_by_page_and_that_of_the_own_daemon_verified(
    peer: Peer, run: Run, tmp_path: Path
) -> None:
    alice = Identity(Secret(bytes(32)))
    grown, entries = audit_tree.Growing(), []
    for number in range(1, 6):
        body = b"body %d" % number
        entries.append(Line(number=number, entry=body, nodes=b"".join(grown.add(audit_tree.leaf(number, body)))))
    top = [Line(fedpeer_audit=1, owner=alice.id), Line(card=alice.card("alice").text)]
    pages = [export.lines(top), export.lines(entries[:3]), export.lines(entries[3:]), b""]
    peer.answers["audit.export"] = iter([*pages, *pages]).__next__
    file = tmp_path / "log"
    code, out, _ = run("audit", "export", str(file))
    assert (code, "wrote 5 entries" in out) == (0, True)
    assert [ask["since"] for name, ask in peer.asked if name == "audit.export"] == [0, 1, 4, 6]
    assert file.read_bytes() == b"".join(pages)
    assert file.stat().st_mode & 0o777 == 0o600
    code, out, _ = run("audit", "verify")
    assert (code, "all 5 entries" in out, "nobody else signed it" in out) == (0, True, True)


def test_people_see_units_and_machines_raw_numbers(peer: Peer, run: Run) -> None:
    assert "1.5 kB sent, 2 B received" in run("status")[1]
    assert json.loads(run("status", "--json")[1])["data"]["bytes_sent"] == 1500
    assert "12.30 ms" in run("peer", "ping", "bank")[1]
    shown = run("job", "show", "ab12")[1]
    for text in (
        "7/9",
        "loss=0.12346",
        "done (1 restart)",
        "evaluate.report.auc",
        "0.991",
        "report.age.mean",
        "0.333333",
        "1, 2.5",
    ):
        assert text in shown


def test_what_a_partner_offers_is_shown_with_what_had_no_room(peer: Peer, run: Run) -> None:
    out = run("peer", "datasets", "bank")[1]
    assert "about 1200" in out
    assert "age (number), and 2 more" in out
    assert "and 1 datasets more" in out


def test_a_dataset_is_offered_and_its_secret_named_when_the_owner_says_so(peer: Peer, run: Run) -> None:
    assert run("dataset", "add", "rows", "postgresql://u@h/d?table=t", "--secret", "clinic", "--offer")[0] == 0
    assert peer.asked[-1][1]["uri"] == "postgresql://u@h/d?table=t"
    assert (peer.asked[-1][1]["secret"], peer.asked[-1][1]["offered"]) == ("clinic", True)
    assert "to nobody" in run("dataset", "show", "rows")[1]


def test_a_relative_path_of_a_dataset_is_made_absolute(peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    for uri, sent in (("d.csv", "/d.csv"), ("/x/d.csv", "/x/d.csv"), ("file:///d.csv", "file:///d.csv")):
        assert run("dataset", "add", "rows", uri)[0] == 0
        bare = {"id": None, "label": None, "text": [], "secret": None, "offered": False}
        assert peer.asked[-1][1] == {"name": "rows", "uri": sent, **bare}


def test_columns_that_look_like_numbers_can_be_declared_text(peer: Peer, run: Run) -> None:
    assert run("dataset", "add", "rows", "/d.csv", "--text", "postcode", "--text", "ward")[0] == 0
    assert peer.asked[-1][1]["text"] == ["postcode", "ward"]


def test_a_card_is_taken_as_text_file_or_standard_input(
    peer: Peer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "card.txt").write_text(f"{CARD}\n")
    (tmp_path / "printed.txt").write_text(screen.card(msgspec.to_builtins(CARD_VIEW)))
    monkeypatch.setattr(sys, "stdin", Stdin(f"{CARD}\n".encode()))
    for given in (CARD, str(tmp_path / "card.txt"), str(tmp_path / "printed.txt"), "-"):
        assert run("peer", "add", given)[0] == 0
        assert peer.asked[-1][1]["card"].strip() == CARD
    for given in (str(tmp_path / "nowhere"), str(tmp_path), "hello", ""):
        code, _, err = run("peer", "add", given)
        assert (code, "neither a card nor a file" in err, "fedpeer-card-1" in err) == (2, True, True)


def test_predictions_go_to_stdout_or_to_a_file(peer: Peer, run: Run, tmp_path: Path) -> None:
    assert run("model", "predict", "cd", "rows")[1] == "id,score\n1,0.5\n2,0.25\n"
    out = tmp_path / "out.csv"
    assert run("model", "predict", "cd", "rows", "--out", str(out), "--json")[1].count('"rows": 2') == 1
    assert out.read_text() == "id,score\n1,0.5\n2,0.25\n"
    assert run("model", "predict", "cd", "rows", "--out", str(tmp_path / "no" / "x"))[0] == 2


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (NotFound("there is no job 'x'", hint="look"), 5),
        (PolicyError("no"), 6),
        (NotAuthorized("no"), 4),
        (TimedOut("no"), 7),
        (DataError("row 3"), 1),
        (RuntimeError("secret"), 1),
    ],
)
def test_each_error_has_its_exit_code_its_text_and_its_hint(
    peer: Peer, run: Run, error: Exception, exit_code: int
) -> None:
    peer.answers["job.show"] = error
    code, out, err = run("job", "show", "x")
    assert (code, out) == (exit_code, "")
    assert "secret" not in err
    assert err.startswith("fedpeer: ")
    code, out, err = run("job", "show", "x", "--json")
    envelope = json.loads(out)
    assert (code, err, envelope["ok"]) == (exit_code, "", False)
    if isinstance(error, FedpeerError):
        assert envelope["error"] == {"code": error.code, "message": error.message, "hint": error.hint}
        assert error.hint in run("job", "show", "x")[2]


def test_usage_errors_end_with_2_and_name_the_help(run: Run) -> None:
    for wrong in (
        ("job", "shw", "x"),
        ("job", "show"),
        ("nonsense",),
        ("init",),
        ("job", "wait", "x", "--timeout", "-1"),
    ):
        code, out, err = run(*wrong)
        assert (code, out) == (2, "")
        assert "--help" in err
        code, out, err = run("--json", *wrong)
        assert (code, err) == (2, "")
        assert json.loads(out)["error"]["code"] == "usage"
    assert "Did you mean 'show'?" in run("job", "shw", "x")[2]


def test_no_daemon_ends_with_3(run: Run, tmp_path: Path) -> None:
    code, _, err = run("status")
    assert (code, "fedpeer run" in err) == (3, True)
    service.open_socket(tmp_path / "admin" / "admin.sock").close()  # stale
    assert run("status")[0] == 3


def test_a_socket_that_may_not_be_used_ends_with_4(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket.socket, "connect", refuse)
    code, _, err = run("status")
    assert (code, "fedpeer-admin" in err) == (4, True)


def test_a_home_too_long_for_a_socket_is_named(run: Run, tmp_path: Path) -> None:
    deep = str(tmp_path / ("x" * 108))
    for verb in (("status",), ("init", "--name", "a")):
        code, _, err = run(*verb, "--home", deep)
        assert (code, "at most 107" in err, "FEDPEER_SOCKET" in err) == (1, True, True)
    assert not Path(deep).exists()


def test_what_destroys_is_refused_without_a_terminal_or_a_yes(
    peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"y\n"))
    for name in ("peer.remove", "dataset.remove", "job.cancel"):
        code, _, err = run(*VERBS[name][:-1])
        assert (code, "--yes" in err) == (2, True)
        assert name not in {asked for asked, _ in peer.asked}
        assert run(*VERBS[name])[0] == 0
        assert peer.asked[-1][0] == name


@pytest.mark.parametrize(("answer", "code", "done"), [("y\n", 0, True), ("n\n", 130, False), ("\x03", 130, False)])
def test_on_a_terminal_it_asks(peer: Peer, tmp_path: Path, answer: str, code: int, done: bool) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "fedpeer.cli", "job", "cancel", "ab12"], os.environ)
    said = b""
    with contextlib.suppress(OSError):  # the terminal's other end was closed
        while chunk := os.read(terminal, 1024):
            said += chunk
            if b"[y/N]: " in said and not select.select([terminal], [], [], 0.3)[0]:
                os.write(terminal, answer.encode())
                while not select.select([terminal], [], [], 1)[0]:
                    os.write(terminal, answer.encode())  # an interrupt just before the prompt reads is lost by Python
    os.close(terminal)
    assert b"End the job breast (ab12ab12ab12)" in said
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert ("job.cancel" in {name for name, _ in peer.asked}) is done


@pytest.mark.parametrize(
    ("state", "error_code", "exit_code"),
    [
        ("done", None, 0),
        ("failed", "worker_crashed", 1),
        ("cancelled", "cancelled", 1),
        ("failed", "gate", 6),
        ("failed", "contract", 1),
    ],
)
def test_waiting_ends_as_the_job_did(peer: Peer, run: Run, state: str, error_code: str | None, exit_code: int) -> None:
    error = ErrorView(code=error_code, message="it failed", hint="mend it") if error_code else None
    peer.answers["job.wait"] = peer.answers["job.show"] = job_view(state, error=error)
    code, out, _ = run("job", "wait", "ab12")
    assert code == exit_code
    assert error is None or "it failed" in out
    code, out, _ = run("job", "watch", "ab12", "--json")
    assert code == exit_code
    assert json.loads(out.splitlines()[-1])["terminal"] is True


def test_a_wait_that_takes_too_long_says_for_whom_the_job_waits(peer: Peer, run: Run) -> None:
    view = peer.answers["job.show"] = job_view("running")
    view.waiting_for = ["bank", "shop\x1b"]
    peer.answers["job.wait"] = "never"
    code, _, err = run("job", "wait", "ab12", "--timeout", "0.05")
    assert code == 7
    assert "the job breast is still running after 0.05 s, and waits for bank, shop\ufffd" in err
    view.waiting_for = []
    code, out, _ = run("job", "wait", "ab12", "--timeout", "0.05", "--json")
    error = json.loads(out)["error"]
    assert (code, error["code"], error["message"]) == (7, "timed_out", "the job breast is still running after 0.05 s")


def test_who_submits_reads_the_id_and_for_whom_the_job_waits(peer: Peer, run: Run, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("x")
    view = peer.answers["job.submit"]
    view.waiting_for = ["clinic", "bank", "shop\x1b"]
    view.stages[0].sums = sums_view()
    code, out, err = run("job", "submit", str(tmp_path / "job.toml"))
    assert (code, out) == (0, f"{JOB}\n")
    assert "it waits for bank, shop\ufffd\n" in err
    assert (
        "sums of fit: each one's values are hidden among those of at least 2 organizations, even if 1 of the 4" in err
    )
    assert "; 1 may be away" in err
    told = json.loads(run("job", "submit", str(tmp_path / "job.toml"), "--json")[1])["data"]["stages"][0]["sums"]
    assert (told["hidden_among"], told["may_be_away"], told["pooling"], told["profile"]) == (2, 1, 1, "byz")


def test_a_wait_for_a_silent_daemon_ends_with_7(peer: Peer, run: Run) -> None:
    silent = socket.socket(socket.AF_UNIX)
    path = peer.home / "silent.sock"
    silent.bind(str(path))
    silent.listen()
    os.environ["FEDPEER_SOCKET"] = str(path)
    try:
        assert run("job", "wait", "ab12", "--timeout", "0.05")[0] == 7
    finally:
        del os.environ["FEDPEER_SOCKET"]
        silent.close()


def test_an_event_says_what_it_is_about() -> None:
    assert screen.topic({"topic": f"job:{JOB}", "event": "done"}) == f"job {JOB[: screen.SHORT]}"
    assert screen.topic({"event": "started"}) == ""


def test_a_watch_is_lines_of_events_until_the_last(peer: Peer, run: Run) -> None:
    peer.answers["job.show"] = lambda: job_view("running")

    def publish() -> None:
        peer.wait_until_asked("job.show", 3)  # by the verb, and before and after subscribing
        peer.do(peer.events.publish, "job:other", "done")
        for i in range(3):
            peer.do(
                lambda i=i: peer.events.publish(
                    f"job:{JOB}", "progress", stage="fit", done=i, of=3, metrics={"loss": 0.5}
                )
            )
        peer.answers["job.show"] = lambda: job_view("done")
        peer.do(lambda: peer.events.publish(f"job:{JOB}", "done"))

    for as_json in (True, False):
        peer.asked.clear()
        peer.answers["job.show"] = lambda: job_view("running")
        publisher = threading.Thread(target=publish)
        publisher.start()
        code, out, _ = run("job", "watch", "ab12", *(["--json"] if as_json else []))
        publisher.join()
        assert code == 0
        if as_json:
            lines = [json.loads(line) for line in out.splitlines()]
            assert [line["event"] for line in lines] == ["state", "progress", "progress", "progress", "done"]
            assert [line.get("terminal", False) for line in lines] == [False] * 4 + [True]
            assert lines[0]["job"]["state"] == "running"
        else:
            assert out.count("progress  stage=fit") == 3
            assert "done=2  of=3  loss=0.5" in out


def sum_event(step: str, turn: int, survivors: list[str] | None = None) -> dict[str, Any]:
    facts = {"topic": f"job:{JOB}", "event": "sum", "stage": "fit", "turn": turn, "k": 0, "step": step}
    return facts | ({} if survivors is None else {"survivors": survivors})


SUMS = [
    sum_event("started", 1),
    sum_event("aborted", 1, []),
    sum_event("started", 1),
    sum_event("committed", 1, ["fp1a", "fp1b"]),
    sum_event("total", 1, ["fp1a", "fp1b"]),
    sum_event("final", 2, ["fp1a", "fp1b"]),
    sum_event("total", 2, ["fp1a", "fp1b"]),
    sum_event("total", 3, ["fp1a"]),
    {"topic": f"job:{JOB}", "event": "done"},
]


def test_lines_tell_of_sums_only_who_is_in_them_when_that_changes_and_what_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = {"event": "state", "job": msgspec.to_builtins(job_view("running"))}
    screen.watch(iter([first, *SUMS]), lambda: {})
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-4:]] == [
        "sum stage=fit turn=1 k=0 step=aborted",
        "sums over stage=fit turn=1 survivors=clinic, bank�[2J",
        "sums over stage=fit turn=3 survivors=clinic",
        "done",
    ]


def test_json_has_every_step_of_a_sum(peer: Peer, run: Run) -> None:
    peer.answers["job.show"] = lambda: job_view("running")

    def publish() -> None:
        peer.wait_until_asked("job.show", 3)
        for message in SUMS[:-1]:
            facts = {key: value for key, value in message.items() if key not in ("topic", "event")}
            peer.do(lambda facts=facts: peer.events.publish(f"job:{JOB}", "sum", **facts))
        peer.answers["job.show"] = lambda: job_view("done")
        peer.do(lambda: peer.events.publish(f"job:{JOB}", "done"))

    publisher = threading.Thread(target=publish)
    publisher.start()
    code, out, _ = run("job", "watch", "ab12", "--json")
    publisher.join()
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, lines[1:-1]) == (0, SUMS[:-1])


def test_the_picture_has_a_word_for_what_the_sum_is_at_and_names_who_is_left_out() -> None:
    from rich.console import Console

    view = job_view("running")
    view.stages[0].state = "running"
    waits = {"waits_for": ["shop\x1b"], "waits_until": "2026-01-01T01:00:00Z"}
    view.stages[0].sums = sums_view(turn=4, survivors=["clinic"], left_out={"bank": [2, 4]}, **waits)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(screen._picture(msgspec.to_builtins(view), {"fit": screen.SUM_STEPS["opened"]}))
    said = console.export_text()
    assert "sum of 1 of 4  taking the masks off" in said
    for told in (said, screen.job(msgspec.to_builtins(view))):
        assert "waits for shop\ufffd until 2026-01-01T01:00:00Z" in told
    assert "fit: left out of the sums 3 turns in a row: bank�[2J" in said


def test_the_live_view_is_drawn_on_a_terminal(peer: Peer) -> None:
    peer.answers["job.show"] = lambda: job_view("running")
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "fedpeer.cli", "job", "watch", "ab12"]
        os.execve(sys.executable, command, os.environ | {"TERM": "xterm"})
    peer.wait_until_asked("job.show", 3)  # by the verb, and before and after subscribing
    facts = {"stage": "fit", "done": 8, "of": 9, "metrics": {"loss": 0.0625}}
    peer.do(lambda: peer.events.publish(f"job:{JOB}", "progress", **facts))
    peer.answers["job.show"] = lambda: job_view("done")
    peer.do(lambda: peer.events.publish(f"job:{JOB}", "done"))
    said = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 4096):
            said += chunk
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"breast" in said
    assert "━".encode() in said
    assert b"\x1b[2J" not in said, "a name from outside must not steer the terminal"


def test_interrupting_a_watch_ends_with_130_and_says_the_job_goes_on(peer: Peer) -> None:
    peer.answers["job.show"] = lambda: job_view("running")
    command = [sys.executable, "-m", "fedpeer.cli", "job", "watch", "ab12"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peer.wait_until_asked("job.show", 3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "the job goes on" in err


@pytest.mark.parametrize("rows", [1, 2000])
def test_a_reader_that_goes_away_is_no_traceback(peer: Peer, rows: int) -> None:
    peer.answers["job.list"] = [job_view()] * rows
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fedpeer.cli", "job", "list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode != 0, done.stderr) == (True, "")


# init and what needs no daemon


def test_init_makes_a_peer_and_prints_its_card(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "new"
    address = ("--listen", "tcp://127.0.0.1:7000", "--address", "a.example:7420", "--address", "[::1]:7420")
    code, out, err = run("init", "--name", "hospital-a", *address, "--home", str(home), "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)["data"]
    assert len(made["fingerprint"].split()) == 12
    assert (home / "identity.key").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    shown = json.loads(run("card", "--home", str(home), "--json")[1])["data"]
    assert shown == {key: made[key] for key in ("id", "name", "fingerprint", "card")}
    from fedpeer.identity import Card

    assert Card.parse(made["card"]).body.addresses == ("a.example:7420", "[::1]:7420")
    values = json.loads(run("config", "show", "--home", str(home), "--json")[1])["data"]
    assert values["listen"] == {"value": ["127.0.0.1:7000"], "origin": "fedpeer.toml"}
    assert values["log_level"]["origin"] == "default"


def test_init_never_overwrites_and_keeps_a_key_that_was_restored(run: Run, tmp_path: Path) -> None:
    home = str(tmp_path / "new")
    first = json.loads(run("init", "--name", "a", "--home", home, "--json")[1])["data"]
    before = (tmp_path / "new" / "identity.key").read_bytes()
    assert run("init", "--name", "b", "--home", home)[0] == 1
    (tmp_path / "new" / "fedpeer.toml").unlink()
    again = json.loads(run("init", "--name", "b", "--home", home, "--json")[1])["data"]
    assert (again["id"], again["name"]) == (first["id"], "b")
    assert (tmp_path / "new" / "identity.key").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--name", "Hospital A"), "is not a name"), (("--name", "a", "--listen", "7420"), "is not an address")],
)
def test_init_leaves_nothing_behind_when_it_refuses(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    home = tmp_path / "new"
    code, _, err = run("init", *arguments, "--home", str(home))
    assert (code, said in err, "hint" in err, home.exists()) == (1, True, True, False)


def test_a_misspelt_setting_is_named_by_config_show(run: Run, tmp_path: Path) -> None:
    (tmp_path / "fedpeer.toml").write_text('name = "a"\nlisten_to = []\n')
    code, out, err = run("config", "show")
    assert (code, out) == (1, "")
    assert "unknown key 'listen_to'" in err
    assert "did you mean 'listen'?" in err


def test_a_key_that_others_can_read_is_refused_with_the_remedy(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "new"
    run("init", "--name", "a", "--home", str(home))
    (home / "identity.key").chmod(0o640)
    code, _, err = run("card", "--home", str(home))
    assert (code, "chmod 600" in err) == (1, True)


def test_version_and_help_end_with_0(run: Run) -> None:
    assert run("--version")[0] == 0
    for group in (("--help",), ("job", "-h"), ("job", "watch", "--help")):
        code, out, _ = run(*group)
        assert (code, out.startswith("Usage: fedpeer")) == (0, True)


def test_a_contract_that_the_policy_refuses_ends_the_test_with_6_and_says_why(peer: Peer, run: Run) -> None:
    finding = FindingView(rule="min_rows", stage="fit", holds=False, text="97 rows in 'a', min_rows = 100")
    peer.answers["policy.test"] = DecisionView(verdict="refused", findings=[finding, *DECISION.findings])
    file = peer.home / "job.toml"
    file.write_text("version = 1")
    code, out, _ = run("policy", "test", "--job", str(file))
    assert code == 6
    assert peer.asked[-1][1] == {"text": "version = 1"}
    assert "FAILS  fit    min_rows      97 rows in 'a', min_rows = 100" in out
    assert out.endswith("\n\nrefused\n")
    code, out, _ = run("--json", "policy", "test", "--job", str(file))
    assert (code, json.loads(out)["data"]["verdict"]) == (6, "refused")


def test_the_policy_is_printed_as_it_was_written(peer: Peer, run: Run) -> None:
    assert run("policy", "show")[1] == "# ours\nmin_rows = 50 # �[2J\n"


def test_a_charge_in_the_audit_is_read_as_privacy(peer: Peer, run: Run) -> None:
    cost = Privacy.of(0.25, 1e-8)
    facts = {"partner": "fp1b", "epsilon": cost.epsilon, "delta": cost.delta}
    charged = EntryView(number=3, time="t", event=CHARGED, job=JOB, facts=facts)
    peer.answers["audit.list"], peer.answers["audit.show"] = [charged], charged
    listed, shown = run("audit", "list")[1].split(), run("audit", "show", "3")[1].split()
    assert {"epsilon=0.25", "delta=1e-08"} <= set(listed)
    assert {"0.25", "1e-08"} <= set(shown)
    assert json.loads(run("--json", "audit", "show", "3")[1])["data"]["facts"]["epsilon"] == cost.epsilon


WAITS = msgspec.structs.replace(POLICY, waiting=[WaitingView(uid=1000, text="min_rows = 5\n", time="t")])


def test_a_policy_that_waits_for_a_second_person_is_said_and_shown(peer: Peer, run: Run, tmp_path: Path) -> None:
    peer.answers["policy.set"] = peer.answers["policy.show"] = WAITS
    (file := tmp_path / "ours.toml").write_text("min_rows = 5\n")
    assert "waits for a second person" in run("policy", "set", str(file))[1]
    assert "fedpeer policy show --waiting 1000" in run("policy", "show")[2]
    assert run("policy", "show", "--waiting", "1000")[:2] == (0, "min_rows = 5\n")
    assert run("policy", "show", "--waiting", "7")[0] == 5


def test_what_a_policy_names_that_is_not_there_is_a_warning(peer: Peer, run: Run, tmp_path: Path) -> None:
    doubted = msgspec.structs.replace(POLICY, doubts=["rule 1, partners: 'bnk' matches nobody\x1b"])
    peer.answers["policy.set"] = peer.answers["policy.show"] = doubted
    (file := tmp_path / "ours.toml").write_text("min_rows = 5\n")
    for command in (("set", str(file)), ("show",)):
        code, _, err = run("policy", *command)
        assert (code, "warning: rule 1, partners: 'bnk' matches nobody" in err, "\x1b" in err) == (0, True, False)


class Editor:
    """Instead of an editor and of the person before it: the texts it saves, one after the other; None: nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *saved: str | None) -> None:
        self.opened: list[str] = []
        self._saved = iter(saved)
        monkeypatch.setattr(click, "edit", self._edit)
        monkeypatch.setattr(click, "confirm", lambda *_, **__: True)
        monkeypatch.setattr(sys, "stdin", Terminal(b""))

    def _edit(self, text: str, **_: Any) -> str | None:
        self.opened.append(text)
        return next(self._saved)


class Terminal(Stdin):
    def isatty(self) -> bool:
        return True


def test_an_edited_policy_is_set_in_place_of_the_one_that_was_shown(
    peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Editor(monkeypatch, "min_rows = 60\n")
    assert run("policy", "edit")[0] == 0
    assert peer.asked[-1] == ("policy.set", {"text": "min_rows = 60\n", "after": 3})


@pytest.mark.parametrize("saved", [None, POLICY.text])
def test_an_editor_that_changed_nothing_sets_nothing(
    peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch, saved: str | None
) -> None:
    Editor(monkeypatch, saved)
    assert run("policy", "edit")[1] == "nothing was changed\n"
    assert [name for name, _ in peer.asked] == ["policy.show"]


def test_an_edited_policy_that_cannot_be_read_is_edited_again_and_not_lost(
    peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = Editor(monkeypatch, "min_row = 60\n", "min_rows = 60\n")
    answers = iter([ConfigError("unknown key 'min_row'"), POLICY])

    def answer() -> PolicyView:
        said = next(answers)
        if isinstance(said, Exception):
            raise said
        return said

    peer.answers["policy.set"] = answer
    assert run("policy", "edit")[0] == 0
    assert editor.opened == [POLICY.text, "min_row = 60\n"]
    assert peer.asked[-1][1]["text"] == "min_rows = 60\n"


def test_without_a_terminal_there_is_nothing_to_edit_on(peer: Peer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    code, _, err = run("policy", "edit")
    assert (code, peer.asked) == (2, [])
    assert "fedpeer policy set FILE" in err


def test_every_exit_code_of_the_rules_is_the_one_of_an_error_class() -> None:
    named = {
        "contract": 2,
        "usage": 2,
        "not_reachable": 3,
        "not_authorized": 4,
        "not_found": 5,
        "policy": 6,
        "timed_out": 7,
    }
    assert {code: by_code(code).exit_code for code in named} == named


# what people see


def test_columns_are_aligned_and_what_is_empty_says_what_to_do() -> None:
    assert screen.table(["a", "bb"], [("ccc", 1), ("d", 22)], empty="") == "A    BB\nccc  1\nd    22"
    for text in (screen.peers([]), screen.datasets([]), screen.jobs([])):
        assert "fedpeer" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (34_500_000, "34.5 MB"), (10**13, "10.0 TB")]
)
def test_sizes_have_units(count: int, text: str) -> None:
    assert screen.size(count) == text


def test_control_characters_of_others_are_not_printed() -> None:
    assert screen.clean("a\x1b[31m\nb\u202e") == "a�[31m�b�"
