"""Four organizations, four daemons, one model: the whole way from `fedpeer init` to predictions, on this machine.

Each of four clinics has its own home, key, policy and TCP port, and a quarter of scikit-learn's breast-cancer rows as a
CSV that only its daemon reads. They exchange cards, one proposes a contract, all sign it, and the logistic regression
is trained over masked sums. A fifth of the rows was held out; on it the model is compared with scikit-learn's, trained
on all quarters pooled and on each alone with the same penalty.

Everything is done with the commands that people use (`fedpeer …` as processes), and followed through the client of
the admin sockets; nothing else of fedpeer is imported. What the daemons say they sent is compared with the kernel's
counters. When it ends, however it ends, every process it started is gone, and so is its folder.

    ./scripts/demo              a live view and a table
    ./scripts/demo --json       the last line of stdout is one JSON object
    ./scripts/demo --restart    SIGKILL for one daemon and for another's worker in mid-job. The daemon is started again
                                as systemd would (Restart=on-failure); the worker by its own daemon
    ./scripts/demo --kill 1     five clinics; SIGKILL for one daemon in the middle of a sum. The four others train on
                                without it; when they have a sum without it, it is started again and catches up
    ./scripts/demo --partition SECONDS
                                five clinics; in the middle of a sum one is cut off from all others for so long
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tcp_counters
from daemons import START_S, Daemon, DemoError, children, fedpeer, free_ports, homes, last_words, until
from relay import Relay
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fedpeer.admin.client import AdminError

NAMES = ("north", "east", "south", "west", "center")
COUNTED = {4: "four", 5: "five"}
JOB_S, MAX_PARTITION_S = 120.0, 60.0
REG_LAMBDA = 0.01
MAX_AUC_DIFFERENCE = 0.005
MAX_BYTES_DIFFERENCE = 0.01
DAEMON_VICTIM, WORKER_VICTIM, KILL_AFTER_ROUNDS = 3, 1, 2

CONTRACT = """\
version = 1
name = "breast"
purpose = "one model of all clinics: is the tumour benign?"

[participants]
{participants}

[[stage]]
id = "fit"
run = "horizontal.logistic:fit"
inputs = {{ table = "dataset:breast" }}
params = {{ {params} }}

[[stage]]
id = "evaluate"
run = "horizontal.logistic:evaluate"
inputs = {{ table = "dataset:breast", model = "fit.model" }}

[release]
"fit.model" = "all"
"""

POLICY = """\
# For public rows on one machine: nobody has to be asked, and fewer rows are enough.
approve = "auto"
min_rows = 50
max_parameters_per_row = 0.5
sandbox = "best-effort"
"""

people = Console(stderr=True)
BEGUN = time.monotonic()


# data


class Rows:
    """scikit-learn's breast-cancer rows: a private part for each of these clinics, and a held-out fifth."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        import numpy as np
        from sklearn.datasets import load_breast_cancer
        from sklearn.model_selection import train_test_split

        data = load_breast_cancer()
        self.names = [name.replace(" ", "_") for name in data.feature_names]
        train, test = train_test_split(np.arange(len(data.target)), test_size=0.2, stratify=data.target, random_state=0)
        self.x, self.y = data.data, data.target
        self.train, self.test, self.parts = train, test, np.array_split(train, len(names))
        self.files = [folder / f"{name}.csv" for name in names]
        for path, rows in zip(self.files, self.parts, strict=True):
            self._write(path, rows, label=True)
        self.test_file = folder / "test.csv"
        self._write(self.test_file, test, label=False)

    def _write(self, path: Path, rows: Any, *, label: bool) -> None:
        with path.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["id", *self.names, *["benign"] * label])
            for row in rows:
                out.writerow([f"p{row}", *(repr(float(value)) for value in self.x[row]), *[self.y[row]] * label])

    def auc_of(self, scores: Path) -> float:
        """AUC of a table of ids and scores on the held-out rows."""
        from sklearn.metrics import roc_auc_score

        with scores.open(newline="") as file:
            by_id = {row["id"]: float(row["score"]) for row in csv.DictReader(file)}
        return float(roc_auc_score(self.y[self.test], [by_id[f"p{row}"] for row in self.test]))

    def auc_without_us(self, rows: Any) -> float:
        """AUC on the held-out rows of scikit-learn's model, trained on `rows`.

        fedpeer minimizes the mean log loss + reg_lambda / 2 · |w|², scikit-learn C · the summed log loss + |w|² / 2:
        the same for C = 1 / (reg_lambda · n). Both standardize the columns first.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (REG_LAMBDA * len(rows)), max_iter=1000))
        model.fit(self.x[rows], self.y[rows])
        return float(roc_auc_score(self.y[self.test], model.predict_proba(self.x[self.test])[:, 1]))


# the kernel's view


class Kernel:
    """Compares what the daemons say they sent and received with the kernel's counters of their connections."""

    def __init__(self, daemons: Sequence[Daemon]) -> None:
        self._daemons = daemons
        self._watch = tcp_counters.Watch([daemon.port for daemon in daemons])
        self._owner: dict[int, int] = {}  # inode of a socket → which daemon dialled with it

    def differences(self) -> list[str]:
        """What differs by more than 1 %, once nothing is under way any more; [] when all agree.

        Per daemon where this user may see whose sockets they are (daemons do not let themselves be looked into, except
        by root), else for all together.
        """
        problems: list[str] = []
        for _ in range(30):
            counted = self.counted()
            said = [daemon.client.call("status") for daemon in self._daemons]
            told = [[status["bytes_sent"], status["bytes_received"]] for status in said]
            if counted is None:
                names = ["the daemons"]
                told = [[sum(column) for column in zip(*told, strict=True)]]
                counted = [[sum(c.sent for c in self._watch.read()), sum(c.received for c in self._watch.read())]]
            else:
                names = [daemon.name for daemon in self._daemons]
            problems = [
                f"{name} {verb} {mine} bytes, the kernel counted {kernels}"
                for name, tells, counts in zip(names, told, counted, strict=True)
                for verb, mine, kernels in zip(("sent", "received"), tells, counts, strict=True)
                if abs(mine - kernels) > MAX_BYTES_DIFFERENCE * kernels or kernels == 0
            ]
            if not problems:
                break
            time.sleep(0.1)
        return problems

    def look(self) -> list[tcp_counters.Connection] | None:
        """Note whose sockets there are now; all connections so far, or None where that cannot be seen."""
        try:
            for number, daemon in enumerate(self._daemons):
                self._owner |= dict.fromkeys(tcp_counters.sockets_of(daemon.pid), number)
        except PermissionError:
            return None
        return self._watch.read()

    def counted(self) -> list[list[int]] | None:
        """[sent, received] of each daemon so far; None where that cannot be seen."""
        connections = self.look()
        if connections is None:
            return None
        counted = [[0, 0] for _ in self._daemons]
        listens = {daemon.port: number for number, daemon in enumerate(self._daemons)}
        for connection in connections:
            number = listens.get(connection.port, self._owner.get(connection.inode))
            if number is not None:  # a dial that was refused at once is gone before it is seen
                counted[number][0] += connection.sent
                counted[number][1] += connection.received
        return counted


# the job


def say(text: str) -> None:
    people.print(f"[dim]{time.monotonic() - BEGUN:5.1f} s[/dim]  {text}")


class Job:
    """The job as the daemons tell of it while it runs."""

    def __init__(self, daemons: Sequence[Daemon], job_id: str) -> None:
        self.daemons = daemons
        self.id = job_id
        self._events: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        for number in range(len(daemons)):
            threading.Thread(target=self._follow, args=(number,), daemon=True).start()

    def _follow(self, number: int) -> None:
        """All events of one daemon into the queue, across its restarts; in a thread of its own."""
        while True:
            with contextlib.suppress(AdminError):  # the daemon is being restarted, or does not know the job yet
                for event in self.daemons[number].client.watch(self.id):
                    self._events.put((number, event))
                    if event.get("terminal"):
                        return
            time.sleep(0.05)

    def events(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(which daemon, event) until the job has ended at all of them."""
        ended: set[int] = set()
        end = time.monotonic() + JOB_S
        while len(ended) < len(self.daemons):
            try:
                number, event = self._events.get(timeout=0.2)
            except queue.Empty:
                for daemon in self.daemons:
                    daemon.check()
                if time.monotonic() > end:
                    raise DemoError(f"the job has not ended after {JOB_S:g} s") from None
                continue
            yield number, event
            if event.get("terminal"):
                ended.add(number)

    def views(self) -> list[dict[str, Any]]:
        return [daemon.client.call("job.show", ref=self.id) for daemon in self.daemons]


def stage_of(view: dict[str, Any], stage: str) -> dict[str, Any]:
    return next(entry for entry in view["stages"] if entry["id"] == stage)


class Absence:
    """Takes one daemon away in the middle of a sum, and lets it come back.

    It goes when the survivors of a sum, itself among them, are agreed on and the masks are still to be taken off: so
    that the others need what it has shared of its secrets, and then have sums without it.

    `seconds`: how long it is away; None: until the others have a sum without it.
    """

    def __init__(self, victim: Daemon, leave: Callable[[], None], back: Callable[[], None], seconds: float | None):
        self.victim, self.seconds = victim, seconds
        self.begun = self.over = False
        self.sent_before = 0
        """bytes that the victim said it had sent, shortly before"""
        self.without: set[int] = set()
        """turns of which another daemon has a sum without it"""
        self._leave, self._back = leave, back
        self._peer = victim.client.call("status")["id"]

    def see(self, daemon: Daemon, event: dict[str, Any]) -> None:
        """The next event, of whichever daemon."""
        match event:
            case {"event": "progress", "stage": "fit"} if daemon is self.victim and not self.begun:
                self.sent_before = self.victim.client.call("status")["bytes_sent"]
            case {"event": "sum", "stage": "fit", "step": "committed", "turn": turn}:
                if daemon is self.victim and turn > KILL_AFTER_ROUNDS and not self.begun:
                    self.begun = True
                    self._leave()
                    if self.seconds is not None:
                        threading.Timer(self.seconds, self.come_back).start()
            case {"event": "sum", "stage": "fit", "step": "total", "turn": turn, "survivors": survivors}:
                if daemon is not self.victim and self._peer not in survivors:
                    self.without.add(turn)
                    if self.begun and not self.over and self.seconds is None:
                        self.come_back()

    def come_back(self) -> None:
        self.over = True
        self._back()


def kill_in_mid_job(daemons: Sequence[Daemon], job: Job) -> int:
    """SIGKILL for one daemon and for another's worker, then start the daemon again; the bytes it had sent till then.

    DemoError if training was not on at the others when both were dead.
    """
    workers = [pid for pid, line in children(daemons[WORKER_VICTIM].pid).items() if "fedpeer.worker" in line]
    if len(workers) != 1:
        raise DemoError(f"{NAMES[WORKER_VICTIM]} has {len(workers)} workers in mid-job")
    victim = daemons[DAEMON_VICTIM]
    sent: int = victim.client.call("status")["bytes_sent"]
    os.kill(workers[0], signal.SIGKILL)
    victim.kill()
    for daemon in daemons:
        if daemon is not victim:
            view = daemon.client.call("job.show", ref=job.id)
            fit = stage_of(view, "fit")
            if (view["state"], fit["state"]) != ("running", "running") or not 0 < fit["round"] < fit["rounds"]:
                raise DemoError(f"the kills came at the wrong time: {view['state']}, fit {fit}")
    victim.start()
    victim.wait_ready()
    return sent


def show(job: Job, *, restart: bool, absence: Absence | None) -> int:
    """Follow the job to its end, with a bar for each clinic; in mid-job, kill or cut off what is to be.

    Returned are the bytes that the killed daemon had sent before, which its next life does not count; 0 if none was.
    """
    sent_before = 0
    columns = (TextColumn("{task.description:7}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[says]}"))
    with Progress(*columns, console=people, transient=True, disable=not people.is_terminal) as progress:
        bars = [progress.add_task(daemon.name, total=None, says="waiting for signatures") for daemon in job.daemons]
        training = False
        for number, event in job.events():
            bar = bars[number]
            if absence is not None:
                absence.see(job.daemons[number], event)
            match event["event"]:
                case "progress" if event["stage"] == "fit":
                    if not training:
                        training = True
                        say("the contract is signed by all; training")
                    says = " ".join(f"{name} {value:.3g}" for name, value in event["metrics"].items())
                    progress.update(bar, completed=event["done"], total=event["of"], says=f"training  {says}")
                    if restart and number == WORKER_VICTIM and event["done"] >= KILL_AFTER_ROUNDS:
                        restart = False
                        sent_before = kill_in_mid_job(job.daemons, job)
                        daemon, worker = NAMES[DAEMON_VICTIM], NAMES[WORKER_VICTIM]
                        say(f"killed {daemon}'s daemon (started again as systemd would) and {worker}'s worker")
                case "agreed":
                    progress.update(bar, says="signed by all")
                case "worker_crashed":
                    progress.update(bar, says="its worker was killed; another goes on from the checkpoint")
                case "done":
                    progress.update(bar, total=progress.tasks[number].completed, says="done")
                case "failed" | "cancelled" as how:
                    raise DemoError(f"the job {how} at {job.daemons[number].name}: {event.get('message', '')}")
    if restart or (absence is not None and not absence.over):
        raise DemoError("the job ended before anything was killed or cut off and back")
    return sent_before


# the whole


def introduce(daemons: Sequence[Daemon], relay: Relay | None) -> Callable[[], list[dict[str, Any]]]:
    """Make the peers. Returned is a function that exchanges their cards, once they run, and gives the cards.

    With a `relay` the victim is reached through it only: to it the others give cards without an address, so that it
    dials nobody, and its own has the relay's.
    """
    victim = daemons[DAEMON_VICTIM] if relay else None

    def init(daemon: Daemon, port: int | None) -> tuple[Daemon, list[str]]:
        address = [] if port is None else ["--address", f"127.0.0.1:{port}"]
        return daemon, ["init", "--name", daemon.name, "--listen", f"127.0.0.1:{daemon.port}", *address]

    silent: list[dict[str, Any]] = []
    if relay is not None:
        silent = fedpeer(*(init(daemon, None) for daemon in daemons))
        for daemon in daemons:
            (daemon.home / "fedpeer.toml").unlink()  # made again, with an address; the key stays
    cards = fedpeer(*(init(daemon, relay.port if relay and daemon is victim else daemon.port) for daemon in daemons))

    def exchange() -> list[dict[str, Any]]:
        fedpeer(
            *(
                (daemon, ["peer", "add", card["card"]])
                for daemon in daemons
                for card in (silent if daemon is victim else cards)
                if card["name"] != daemon.name
            )
        )
        for _ in until(START_S, "the daemons are not connected with each other"):
            if all(daemon.client.call("status")["connected"] == len(daemons) - 1 for daemon in daemons):
                break
        return cards

    return exchange


def demo(
    folder: Path, daemons: list[Daemon], *, restart: bool, kill: int, partition: float | None
) -> tuple[dict[str, Any], list[list[str]], list[str]]:
    """Run it all. The numbers of --json, a row of the table for each clinic, and the checks that failed."""
    names = NAMES if kill or partition else NAMES[:-1]
    daemons += [Daemon(name, folder, port) for name, port in zip(names, free_ports(len(names)), strict=True)]
    victim = daemons[DAEMON_VICTIM]
    relay = Relay(victim.port) if partition else None
    disturbed = bool(restart or kill or partition)
    try:
        kernel = None if disturbed else Kernel(daemons)  # a killed daemon's own count is lost with it
    except OSError as error:
        kernel = None
        people.print(f"[yellow]the kernel's counters cannot be read here ({error}): not compared[/yellow]")

    exchange_cards = introduce(daemons, relay)
    for daemon in daemons:
        daemon.start()
    rows = Rows(folder, names)
    for daemon in daemons:
        daemon.wait_ready()
    say(f"{COUNTED[len(daemons)]} daemons run, each with its own home, key and port")

    made = exchange_cards()
    if kernel is not None:
        kernel.look()
    say("cards exchanged; each has an encrypted session with each other")

    policy = folder / "policy.toml"
    policy.write_text(POLICY)
    fedpeer(
        *((daemon, ["policy", "set", str(policy)]) for daemon in daemons),
        *(
            (daemon, ["dataset", "add", "breast", str(path), "--id", "id", "--label", "benign"])
            for daemon, path in zip(daemons, rows.files, strict=True)
        ),
        (daemons[0], ["dataset", "add", "test", str(rows.test_file), "--id", "id"]),
    )
    say(f"{len(rows.train)} rows in {COUNTED[len(daemons)]} private files, {len(rows.test)} held out")

    contract = folder / "contract.toml"
    params = f"reg_lambda = {REG_LAMBDA}"
    if disturbed:  # so small a tol is never met: enough rounds for what happens to fall into the middle
        params += f", max_iter = {30 if restart else 12}, tol = 1e-300"
    contract.write_text(
        CONTRACT.format(participants="\n".join(f'{card["name"]} = "{card["id"]}"' for card in made), params=params)
    )
    (submitted,) = fedpeer((daemons[0], ["job", "submit", str(contract)]))
    job = Job(daemons, submitted["id"])
    absence = None
    if relay is not None and partition:

        def cut() -> None:
            relay.cut()
            say(f"cut {victim.name} off in the middle of a sum, for {partition:g} s")

        def heal() -> None:
            relay.heal()
            say(f"{victim.name} is reached again")

        absence = Absence(victim, cut, heal, partition)
    elif kill:

        def leave() -> None:
            victim.kill()
            say(f"killed {victim.name}'s daemon in the middle of a sum; the others go on without it")

        def back() -> None:
            victim.start()
            victim.wait_ready()
            say(f"they have a sum without {victim.name}, which is started again and catches up")

        absence = Absence(victim, leave, back, None)
    sent_before = show(job, restart=restart, absence=absence)
    views = job.views()
    say("trained and evaluated over masked sums")

    digests = [
        output["digest"]
        for view in views
        for output in view["outputs"]
        if (output["stage"], output["name"]) == ("fit", "model")
    ]
    scores = folder / "scores.csv"
    fedpeer((daemons[0], ["model", "predict", digests[0], "test", "--out", str(scores)]))
    problems = kernel.differences() if kernel is not None else []
    statuses = [daemon.client.call("status") for daemon in daemons]
    result: dict[str, Any] = {
        "peers": len(daemons),
        "auc": rows.auc_of(scores),
        "pooled_auc": rows.auc_without_us(rows.train),
        "alone_auc": [rows.auc_without_us(part) for part in rows.parts],
        "models_identical": len(digests) == len(daemons) and len(set(digests)) == 1,
        "rounds": stage_of(views[0], "fit")["round"],
        "bytes_sent": [status["bytes_sent"] for status in statuses],
    }
    if restart:
        result["bytes_sent"][DAEMON_VICTIM] += sent_before
        workers_back: int = stage_of(views[WORKER_VICTIM], "fit")["restarts"]
        result["restarted"] = 1 + workers_back  # the daemon is back, or there would be no result
        if workers_back != 1:
            problems.append(f"{NAMES[WORKER_VICTIM]}'s worker was restarted {workers_back} times, not once")
    if absence is not None:
        if kill:
            result["bytes_sent"][DAEMON_VICTIM] += absence.sent_before
            result["killed"] = kill
        else:
            result["partition_s"] = partition
        result["rounds_without"] = len(absence.without)
    result["seconds"] = round(time.monotonic() - BEGUN, 2)
    if not result["models_identical"]:
        problems.append(f"the models differ: {digests}")
    if abs(result["auc"] - result["pooled_auc"]) > MAX_AUC_DIFFERENCE:
        problems.append(f"AUC {result['auc']:.4f}, pooled {result['pooled_auc']:.4f}: they differ too much")
    clinics = [
        [daemon.name, f"{len(part)}", f"{alone:.4f}", digest[:16], f"{sent / 1024:.0f} KiB"]
        for daemon, part, alone, digest, sent in zip(
            daemons, rows.parts, result["alone_auc"], digests, result["bytes_sent"], strict=True
        )
    ]
    return result, clinics, problems


def table(result: dict[str, Any], clinics: list[list[str]]) -> None:
    out = Console()
    peers = Table("clinic", "rows", "AUC of a model of its own", "digest of the common model", "sent", box=None)
    for clinic in clinics:
        peers.add_row(*clinic)
    out.print(peers)
    who = f"at all {COUNTED[result['peers']]}"
    identical = f"the same bytes {who}" if result["models_identical"] else f"NOT the same {who}"
    happened = ""
    if "restarted" in result:
        happened = f"; {result['restarted']} processes killed and back"
    elif "rounds_without" in result:
        what = "killed and back" if "killed" in result else f"cut off for {result['partition_s']:g} s and back"
        happened = f"; {NAMES[DAEMON_VICTIM]} {what}, {result['rounds_without']} rounds without it"
    out.print(
        f"\nAUC of the common model {result['auc']:.4f}, of training on all rows in one place "
        f"{result['pooled_auc']:.4f}; the model is {identical}; {result['rounds']} rounds, "
        f"{result['seconds']:.1f} s{happened}"
    )


def seconds(text: str) -> float:
    """A time on the command line."""
    value = float(text)
    if not 0 < value <= MAX_PARTITION_S:
        raise argparse.ArgumentTypeError(f"more than 0 and at most {MAX_PARTITION_S:g} seconds")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description="Organizations train one model on this machine.")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--restart", action="store_true", help="kill a daemon and a worker in mid-job")
    what.add_argument("--kill", type=int, choices=[1], default=0, help="five clinics; kill one daemon in mid-sum")
    what.add_argument(
        "--partition", type=seconds, metavar="SECONDS", help="five clinics; cut one off in mid-sum for so long"
    )
    options = parser.parse_args()

    daemons: list[Daemon] = []
    problems: list[str] = []
    result: dict[str, Any] | None = None
    code = 0
    with homes() as (folder, killed):
        try:
            result, clinics, problems = demo(
                folder, daemons, restart=options.restart, kill=options.kill, partition=options.partition
            )
            if not options.json:
                table(result, clinics)
        except (DemoError, AdminError) as error:
            problems.append(str(error))
            sys.stderr.write(last_words(daemons))
        except KeyboardInterrupt:
            code = 130
    problems += [f"had to be killed: {line}" for line in killed]
    for problem in problems:
        people.print(f"[red]demo: {problem}[/red]", highlight=False)
    if options.json and result is not None:
        print(json.dumps(result))
    return code or int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
