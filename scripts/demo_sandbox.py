"""What a data owner wants to see before it joins: its daemon decides, all is recorded, no change can be hidden.

Two hospitals and a registry, each with its own patients (a third of scikit-learn's diabetes rows) in a CSV that only
its daemon reads. The registry asks for too much and is refused: it reads that it is not allowed, and why stays in the
hospital's own log. Then it asks properly: hospital-north's operator reads what it is about and approves it, the privacy
budgets are charged, and all have the result. At the end the three audit logs are checked against each other's
signatures, and one byte of one is changed.

Everything is done with the commands that people use; what is shown is what they print, shortened. When it ends, however
it ends, every process it started is gone, and so is its folder.

    ./scripts/demo sandbox              the story
    ./scripts/demo sandbox --json       the story on stderr; the last line of stdout is one JSON object
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from daemons import (
    FEDPEER,
    START_S,
    Daemon,
    DemoError,
    environment,
    fedpeer,
    free_ports,
    homes,
    last_words,
    meet,
    until,
)
from rich.console import Console

from fedpeer.admin.client import AdminError

OWNER, NEIGHBOUR, PARTNER = "hospital-north", "hospital-south", "registry"
NAMES = (OWNER, NEIGHBOUR, PARTNER)
JOB_S = 60.0
ANSWER_S = 6
"""so long a participant may take to answer the first job"""
REFUSED = 6
"""the exit code of `fedpeer job wait`"""
EPSILON = 0.8
COLUMNS = {"age": (0, 100), "bmi": (10, 60)}
"""column → the bounds that the contract cuts its values off at"""
MARGIN = " " * 9
MAX_ERRORS = 6
"""standard errors that a result may be off, at most"""

POLICIES = {
    OWNER: """\
# The strict defaults: min_cell = 10, and the operator is asked about what they allow.
sandbox = "best-effort"                 # a demo runs on any machine
""",
    NEIGHBOUR: """\
approve = "auto"                        # minds less than its neighbour, which makes no difference to that one
min_cell = 1
sandbox = "best-effort"
""",
}
POLICIES[PARTNER] = POLICIES[NEIGHBOUR]

CONTRACT = """\
version = 1
name = "{name}"
purpose = "how old and how heavy are our patients?"

[rules]
answer_s = {answer_s}

[participants]
{participants}

[[stage]]
id = "describe"
run = "horizontal.statistics:{stage}"
inputs = {{ table = "dataset:patients" }}
params = {{ {params} }}
"""


class Story:
    """What is told: sentences, and commands with the parts of their answers that matter."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder, self._console = folder, console
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        self._console.print()
        self._print(f"{self.seconds:5.1f} s  {text}", "bold")

    def shows(self, text: str, style: str = "") -> None:
        self._print(f"{MARGIN}{text}", style)

    def types(self, daemon: Daemon, *words: str, show: str) -> tuple[int, str]:
        """Run a command as this organization's operator would; print what `show` matches in each line of its answer.

        Its exit code, and everything that it printed.
        """
        done = subprocess.run(
            [FEDPEER, "--home", str(daemon.home), *words],
            cwd=self._folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        printed = done.stdout + done.stderr
        self.shows(f"{daemon.name}$ fedpeer {' '.join(words)}", "cyan")
        for line in printed.splitlines():
            if found := re.search(show, line):
                self.shows(f"  {found[0]}")
        return done.returncode, printed

    def _print(self, text: str, style: str) -> None:
        wrapped = textwrap.fill(text, self._console.width, subsequent_indent=f"{MARGIN}    ", break_on_hyphens=False)
        self._console.print(wrapped, style=style, markup=False, highlight=False, soft_wrap=True)


def patients(daemons: Sequence[Daemon], folder: Path) -> dict[str, float]:
    """A file for each organization; the means over all rows, which none of them ever sees."""
    import numpy as np
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    table = data.data[:, [data.feature_names.index(name) for name in COLUMNS]]
    for number, (daemon, part) in enumerate(zip(daemons, np.array_split(table, len(daemons)), strict=True), start=1):
        rows = [f"{number}-{i}," + ",".join(f"{value:g}" for value in row) for i, row in enumerate(part)]
        (folder / f"{daemon.name}.csv").write_text("\n".join([",".join(["id", *COLUMNS]), *rows, ""]))
    return dict(zip(COLUMNS, table.mean(axis=0).tolist(), strict=True))


def write_contracts(folder: Path) -> None:
    participants = "\n".join(f'{name} = "{name}"' for name in NAMES)
    bounds = ", ".join(f"{name} = [{low}, {high}]" for name, (low, high) in COLUMNS.items())
    for name, answer_s, stage, params in (
        ("every-patient", ANSWER_S, "run", "bins = 100, min_cell = 1"),
        ("with-noise", 600, "private", f"epsilon = {EPSILON}, columns = {{ {bounds} }}, bins = 5"),
    ):
        text = CONTRACT.format(name=name, answer_s=answer_s, participants=participants, stage=stage, params=params)
        (folder / f"{name}.toml").write_text(text)


def ask_too_much(story: Story, owner: Daemon, partner: Daemon) -> tuple[dict[str, Any], list[str]]:
    """How it ended and what the partner reads of it, and what went wrong."""
    story.say(f"{PARTNER} asks for exact statistics, with cells of a single patient.")
    story.types(partner, "job", "submit", "every-patient.toml", show="^it waits.*")
    code, printed = story.types(
        partner, "job", "wait", "every-patient", f"--timeout={JOB_S:g}", show="^(state|error).*"
    )
    told = partner.client.call("job.show", ref="every-patient")
    story.say(
        "That is all it reads, whatever the reason, and when the time to answer is over. The figures stay at home:"
    )
    _, own = story.types(owner, "job", "logs", "every-patient", show="why=.*")

    reason = (told["error"] or {}).get("message", "")
    read = printed + json.dumps(partner.client.call("job.logs", ref="every-patient"))
    waited = datetime.fromisoformat(told["finished"]) - datetime.fromisoformat(told["created"])
    how = "refused" if code == REFUSED else told["state"]
    checks = {
        f"it is {how}, and {PARTNER} reads {reason!r}": how == "refused" and OWNER in reason,
        f"{OWNER}'s own log does not say why": "min_cell = 1 in the contract, min_cell = 10" in own,
        f"{PARTNER} reads what {OWNER}'s policy is": "min_cell" not in read,
        f"it took {waited}: by that it is told who decided": waited.total_seconds() >= ANSWER_S - 1,
    }
    return {"first_job": how, "reason": reason}, [
        f"the first job: {what}" for what, holds in checks.items() if not holds
    ]


def ask_properly(
    story: Story, daemons: Sequence[Daemon], owner: Daemon, partner: Daemon, means: dict[str, float]
) -> tuple[dict[str, Any], list[str]]:
    """How it ended and what the owner charged the partner's account with, and what went wrong. Raises DemoError."""
    story.say(f"{PARTNER} asks again: with noise, so that no single patient is seen in the answer.")
    story.types(partner, "job", "submit", "with-noise.toml", show="^it waits.*")
    for _ in until(JOB_S, f"{OWNER} is not asked"):
        if owner.client.call("approvals.list")["asking"]:
            break
    story.say(f"{OWNER}'s policy allows it if the operator does, who reads what it is about, and approves it.")
    story.types(owner, "approvals", show="^(JOB.*APPROVED|[0-9a-f]{12} .* of 1)")
    matters = "^(purpose|proposed|  reads|  privacy|LETS OUT|noisy|policy|the first|approved with|  budget.e).*"
    code, printed = story.types(owner, "job", "approve", "with-noise", "--yes", show=matters)
    if code:
        raise DemoError(f"{OWNER} cannot approve: {printed.strip().splitlines()[-1]}")

    story.types(partner, "job", "wait", "with-noise", f"--timeout={JOB_S:g}", show="^(state|error).*")
    views: list[dict[str, Any]] = []
    for _ in until(JOB_S, "the second job has not ended"):
        views = [daemon.client.call("job.show", ref="with-noise") for daemon in daemons]
        if all(view["finished"] for view in views):
            break
    if states := [view["state"] for view in views if view["state"] != "done"]:
        raise DemoError(f"the second job is {states[0]}: {[view.get('error') for view in views]}")
    reports = [view["outputs"][0] for view in views]
    problems = []
    if len({report["digest"] for report in reports}) != 1:
        problems.append("the organizations have different results")
    story.say("All three have the result; the truth is known to this script alone.")
    for name, truth in means.items():
        told = reports[0]["values"]["columns"][name]
        mean, error = told["mean"], told["standard_error"]["mean"]
        story.shows(f"mean {name} {mean:.1f} ± {error:.1f}, in truth {truth:.1f}")
        if abs(mean - truth) > MAX_ERRORS * error:
            problems.append(f"the mean {name} is {mean:g} ± {error:g}, and {truth:g} in truth")

    story.say("The answer has its price: each owner charged it to the others' accounts before anything left.")
    story.types(owner, "budget", "list", show="^(DATASET.*LEFT|patients +[^ ]+ +[^ ]+ +[^ ]+)")
    accounts = [(daemon.name, account) for daemon in daemons for account in daemon.client.call("budget.list")]
    charged = {(name, account["name"]): account["epsilon"] for name, account in accounts}
    wanted = {(name, other): EPSILON for name in NAMES for other in NAMES if name != other}
    if charged != wanted or reports[0]["values"]["privacy"]["epsilon"] != EPSILON:
        problems.append(f"charged is {charged}")
    return {"second_job": "done", "epsilon_spent": charged.get((OWNER, PARTNER), 0.0)}, problems


def check_audits(
    story: Story, folder: Path, daemons: Sequence[Daemon], owner: Daemon
) -> tuple[dict[str, Any], list[str]]:
    """How many audit logs verify, signed by both others to their ends, and whether a changed byte is found; and what
    went wrong. Raises DemoError."""
    story.say("What was done is in three audit logs. Exported, anybody can check them, with public keys only.")
    logs = [f"{daemon.name}.log" for daemon in daemons]
    files = [str(folder / log) for log in logs]
    verified = 0
    for _ in until(START_S, "the audit logs are not co-signed"):
        fedpeer(*((daemon, ["audit", "export", file]) for daemon, file in zip(daemons, files, strict=True)))
        (found,) = fedpeer((owner, ["audit", "verify", *files]))
        verified = sum(len(log["cosigners"]) == len(daemons) - 1 and log["signed"] == log["entries"] for log in found)
        if verified == len(daemons):
            break
    story.types(owner, "audit", "verify", *logs, show="^[^ ]+: .*|^  [^ ]+")
    story.types(owner, "audit", "list", "--job", "with-noise", show="approved .*|charged .*(?=  delta)")

    entry = next(line for line in owner.client.call("audit.list", job="with-noise") if line["event"] == "charged")
    story.say(f"Could {OWNER} change what it charged? One byte of entry {entry['number']} of its log:")
    changed = folder / "changed.log"
    changed.write_bytes(with_a_byte_changed((folder / logs[daemons.index(owner)]).read_bytes(), entry["number"]))
    code, printed = story.types(owner, "audit", "verify", changed.name, show=".+")
    tampering_found = code == 1 and f"entry {entry['number']} is not what it was" in printed
    problems = [] if tampering_found else ["the changed byte was not found"]
    return {"audits_verified": verified, "tampering_found": tampering_found}, problems


def with_a_byte_changed(log: bytes, number: int) -> bytes:
    """An exported log with one byte of an entry another, which can still be read as an entry."""
    begin = log.index(b'{"number":%d,' % number)
    at = begin + (log.index(b'","nodes"', begin) - begin) * 3 // 4  # of the base64 of what the entry says
    return log[:at] + (b"B" if log[at : at + 1] != b"B" else b"C") + log[at + 1 :]


def demo(folder: Path, daemons: list[Daemon], story: Story) -> tuple[dict[str, Any], list[str]]:
    """Run it all. The numbers of --json, and the checks that failed. Raises DemoError, AdminError."""
    story.say(f"{OWNER}, {NEIGHBOUR} and {PARTNER}: each has patients in a file that only its daemon reads.")
    daemons += [Daemon(name, folder, port) for name, port in zip(NAMES, free_ports(len(NAMES)), strict=True)]
    owner, _, partner = daemons
    means = patients(daemons, folder)
    write_contracts(folder)
    meet(daemons)
    for name, policy in POLICIES.items():
        (folder / f"{name}.policy.toml").write_text(policy)
    fedpeer(
        *((daemon, ["policy", "set", str(folder / f"{daemon.name}.policy.toml")]) for daemon in daemons),
        *(
            (daemon, ["dataset", "add", "patients", str(folder / f"{daemon.name}.csv"), "--id=id"])
            for daemon in daemons
        ),
    )
    story.say("Their daemons run, and are connected: people exchanged their cards. There is no server.")
    story.types(owner, "status", show="^(peers|workers).*")
    story.types(owner, "dataset", "show", "patients", show="^(offered|rows|age|bmi).*")

    parts = (
        ask_too_much(story, owner, partner),
        ask_properly(story, daemons, owner, partner, means),
        check_audits(story, folder, daemons, owner),
    )
    result = {key: value for told, _ in parts for key, value in told.items()}
    problems = [problem for _, wrong in parts for problem in wrong]
    return result | {"seconds": round(story.seconds, 2)}, problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo sandbox", description="A data owner decides, on this machine.")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    options = parser.parse_args()

    console = Console(stderr=options.json)
    daemons: list[Daemon] = []
    problems: list[str] = []
    result: dict[str, Any] | None = None
    code = 0
    with homes() as (folder, killed):
        try:
            result, problems = demo(folder, daemons, Story(folder, console))
        except (DemoError, AdminError) as error:
            problems.append(str(error))
            sys.stderr.write(last_words(daemons))
        except KeyboardInterrupt:
            code = 130
    problems += [f"had to be killed: {line}" for line in killed]
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    if options.json and result is not None:
        print(json.dumps(result, ensure_ascii=False))
    return code or int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
