"""What people see: answers of the daemon as aligned text, and the live view of a job.

Numbers get units here and nowhere else; JSON has the raw ones. rich is imported only by the live view, on a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Group

SHORT = 12
"""characters of an id that are shown; a prefix of any length is understood"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> str:
    """Columns as wide as their widest cell; `empty` when there is no row."""
    lines = [[clean(cell) for cell in row] for row in rows]
    if not lines:
        return empty
    widths = [max(len(line[i]) for line in [list(head), *lines]) for i in range(len(head))]
    cells = [[title.upper() for title in head], *lines]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """One "name  value" a line; empty values are left out."""
    kept = [(name, value) for name, value in pairs if value not in ("", None, [], ())]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{name.ljust(width)}  {clean(value)}" for name, value in kept)


def clean(value: object) -> str:
    """Text on one line, without control characters: what others wrote must not steer this terminal."""
    if isinstance(value, list | tuple):
        text = ", ".join(map(clean, value))
    else:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return "".join(char if char.isprintable() else "�" for char in text)


def size(count: int) -> str:
    """Bytes with a unit: 999 B, 1.2 kB, 34.5 MB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def status(view: dict[str, Any]) -> str:
    return facts(
        [
            ("name", view["name"]),
            ("id", view["id"]),
            ("fingerprint", view["fingerprint"]),
            ("listening", view["listening"] or "nowhere: it only dials"),
            ("peers", f"{view['connected']} of {view['peers']} connected"),
            ("jobs", f"{view['jobs']} not ended"),
            ("datasets", view["datasets"]),
            ("workers", view["sandbox"]),
            ("traffic", f"{size(view['bytes_sent'])} sent, {size(view['bytes_received'])} received"),
            ("started", view["started"]),
            ("version", view["version"]),
            ("home", view["home"]),
        ]
    )


def card(view: dict[str, Any]) -> str:
    return f"{view['card']}\n\nfingerprint: {view['fingerprint']}"


def peer(view: dict[str, Any]) -> str:
    return facts(
        [
            ("name", view["name"]),
            ("id", view["id"]),
            ("fingerprint", view["fingerprint"]),
            ("addresses", view["addresses"] or "none: it dials"),
            ("connected", f"since {view['since']}" if view["connected"] else "no"),
            ("why not", "" if view["connected"] else view["error"]),
            ("traffic", f"{size(view['bytes_sent'])} sent, {size(view['bytes_received'])} received"),
        ]
    )


def peers(views: list[dict[str, Any]]) -> str:
    rows = [
        (
            v["name"],
            v["id"][:SHORT],
            "yes" if v["connected"] else f"no: {v['error']}" if v["error"] else "no",
            v["addresses"],
        )
        for v in views
    ]
    return table(
        ["name", "id", "connected", "addresses"], rows, empty="no peers yet: fedpeer peer add CARD (and they add yours)"
    )


def accounts(views: list[dict[str, Any]]) -> str:
    rows = [
        (
            v["dataset"],
            v["name"],
            v["epsilon"],
            "no limit" if v["left"] is None else v["left"],
            v["delta"],
            v["stages"],
            v["last"],
        )
        for v in views
    ]
    head = ["dataset", "partner", "epsilon", "left", "delta", "stages", "last"]
    return table(head, rows, empty="nothing was charged in the last year")


def budget(view: dict[str, Any]) -> str:
    limits = [
        (name, "no limit" if view[key] is None else f"ε = {view[key]:g}")
        for name, key in (("a partner and year", "per_year"), ("a job", "per_job"))
    ]
    charges = [
        (v["time"], v["job"][:SHORT], v["stage"], v["run"], v["name"], v["epsilon"], v["delta"])
        for v in view["charges"]
    ]
    head = ["time", "job", "stage", "run", "partner", "epsilon", "delta"]
    return "\n\n".join(
        [
            facts([("dataset", view["dataset"]), *limits, ("answered", _answered(view))]),
            accounts(view["accounts"]),
            table(head, charges, empty="nothing was ever charged"),
        ]
    )


def _answered(view: dict[str, Any]) -> str:
    kept, most = view["remembered"], view["most_remembered"]
    told = f"from {kept} tables of at most {most}, compared with every answer"
    if kept < most:
        return told
    name = view["dataset"]
    return (
        f"{told}: nothing new is answered until a table is a year old, or all are forgotten (`fedpeer dataset remove "
        f"{name} --forget`, and add it again; then answers may tell rows by their difference from earlier ones)"
    )


def dataset(view: dict[str, Any]) -> str:
    about = facts(
        [
            ("name", view["name"]),
            ("uri", view["uri"]),
            ("secret", view["secret"] and f"{view['secret']} (its name)"),
            ("offered", "to partners who ask" if view["offered"] else "to nobody; jobs may name it"),
            ("rows", view["rows"]),
            ("id", view["id"]),
            ("label", view["label"]),
        ]
    )
    return about + "\n\n" + table(["column", "kind"], view["columns"], empty="no columns")


def datasets(views: list[dict[str, Any]]) -> str:
    rows = [(v["name"], v["rows"], len(v["columns"]), v["id"] or "-", v["label"] or "-", v["uri"]) for v in views]
    return table(
        ["name", "rows", "columns", "id", "label", "uri"], rows, empty="no datasets yet: fedpeer dataset add NAME FILE"
    )


def offers(view: dict[str, Any]) -> str:
    """What a partner says of its datasets."""
    rows = []
    for v in view["datasets"]:
        columns = [f"{name} ({kind})" for name, kind in v["columns"]]
        if v["more_columns"]:
            columns.append(f"and {v['more_columns']} more")
        rows.append((v["name"], v["rows"], v["id"] or "-", v["label"] or "-", columns))
    shown = table(["name", "rows", "id", "label", "columns"], rows, empty=f"{clean(view['peer'])} offers no datasets")
    return shown + (f"\nand {view['more']} datasets more" if view["more"] else "")


def job(view: dict[str, Any]) -> str:
    error = view.get("error")
    waiting = f", waiting for {clean(view['waiting_for'])}" if view["waiting_for"] else ""
    lines = [
        facts(
            [
                ("job", view["name"]),
                ("id", view["id"]),
                ("purpose", view["purpose"]),
                ("state", view["state"] + waiting),
                ("created", view["created"]),
                ("finished", view["finished"]),
                ("asks", _asks(view)),
                ("error", f"{error['message']} ({error['code']})" if error else ""),
                ("hint", error["hint"] if error else ""),
            ]
        ),
        table(
            ["participant", "peer", "connected", "answer"],
            [
                (p["alias"], p["name"], "yes" if p["connected"] else "no", f"{p['state']} {p['reason']}".strip())
                for p in view["participants"]
            ],
            empty="no participants",
        ),
        table(
            ["stage", "run", "state", "round", "metrics"],
            [
                (s["id"], s["run"], _state(s), f"{s['round']}/{s['rounds']}" if s["rounds"] else "", metrics(s))
                for s in view["stages"]
            ],
            empty="no stages",
        ),
    ]
    if view["outputs"]:
        rows = [(f"{o['stage']}.{o['name']}", o["kind"], o["digest"][:SHORT]) for o in view["outputs"]]
        lines.append(table(["output", "kind", "digest"], rows, empty=""))
    reports = [leaf for o in view["outputs"] for leaf in _leaves(f"{o['stage']}.{o['name']}", o.get("values") or {})]
    if reports:
        lines.append(facts(reports))
    if told := [pair for stage in view["stages"] for pair in _sums(stage, _names(view))]:
        lines.insert(3, facts(told))
    return "\n\n".join(lines)


def _asks(view: dict[str, Any]) -> str:
    asks = view.get("asks")
    if not asks:
        return ""
    so_far = f"{len(asks['approved'])} of {asks['needs']} approved it, " if asks["needs"] > 1 else ""
    return f"your approval until {asks['until']}: {so_far}fedpeer job approve {view['id'][:SHORT]}"


def protection(sums: dict[str, Any]) -> str:
    """What the secure sums of a stage protect, for who is about to sign."""
    n, pooling, away = len(sums["parties"]), sums["pooling"], sums["may_be_away"]
    text = (
        f"each one's values are hidden among those of at least {sums['hidden_among']} organizations, even if {pooling} "
        f"of the {n} {'tells' if pooling == 1 else 'tell'} others all it sees"
    )
    if sums["profile"] != "byz":
        text += ", if all run unmodified software"
    if not away:
        return f"{text}; the job waits when one is away"
    text += f"; {away} may be away"
    if sums["of_data"]:
        text += ", but who was in the first sum over the data alone is waited for in every other"
    return text


def left_out(sums: dict[str, Any]) -> dict[str, int]:
    """Who is not in the sums of this turn: alias → in how many turns in a row."""
    return {
        alias: last - first + 1 for alias, (first, last) in sorted(sums["left_out"].items()) if last == sums["turn"]
    }


def _sums(stage: dict[str, Any], name_of: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What there is to say of the secure sums of a stage: pairs for `facts`."""
    sums = stage["sums"]
    if sums is None:
        return
    yield f"sums of {stage['id']}", protection(sums)
    if sums["survivors"]:
        who = clean([name_of[alias] for alias in sums["survivors"]])
        yield "  the last", f"turn {sums['turn']}: {len(sums['survivors'])} of {len(sums['parties'])}: {who}"
    if stage["state"] == "running" and (waits := _waits(sums)):
        yield "  the next", waits
    for alias, turns in left_out(sums).items():
        if turns >= 2:
            yield "  left out", f"{clean(name_of[alias])}, {turns} turns in a row"


def _waits(sums: dict[str, Any]) -> str:
    """Whom a sum waits for, and until when; "" if none does."""
    who = f" for {clean(sums['waits_for'])}" if sums["waits_for"] else ""
    return f"waits{who} until {sums['waits_until']}" if sums["waits_until"] else ""


def _names(view: dict[str, Any]) -> dict[str, str]:
    """alias → name"""
    return {participant["alias"]: participant["name"] for participant in view["participants"]}


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The plain values of a report, each with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value


def jobs(views: list[dict[str, Any]]) -> str:
    rows = [
        (
            v["id"][:SHORT],
            v["name"],
            v["state"],
            f"waiting for {clean(v['waiting_for'])}" if v["waiting_for"] else "",
            v["created"],
        )
        for v in views
    ]
    return table(["id", "name", "state", "", "created"], rows, empty="no jobs yet: fedpeer job submit CONTRACT.toml")


def dry_run(view: dict[str, Any]) -> str:
    """What each stage would say for this peer, and how long it took."""
    said = []
    for stage in view["stages"]:
        rows = ", ".join(f"{port}: {count} synthetic rows" for port, count in stage["rows"].items())
        outputs = ", ".join(f"{name} ({kind})" for name, kind in stage["outputs"].items())
        told = [
            (message["tag"], message["kind"], message["count"], size(message["bytes"]), message["text"])
            for message in stage["messages"]
        ]
        about = [
            ("stage", f"{stage['id']} ({stage['run']})"),
            ("participants", f"{len(stage['participants'])} on this machine"),
            ("input", rows),
            ("output", outputs),
            ("took", f"{stage['seconds']:.1f} s"),
        ]
        said += [
            facts(about),
            table(("leaves", "as", "times", "size", "what it tells"), told, empty="nothing leaves"),
            "",
        ]
    return "\n".join([*said, f"{view['name']} ran through in {view['seconds']:.1f} s; nothing was sent or kept"])


def logs(lines: list[dict[str, Any]], view: dict[str, Any]) -> str:
    """`view`: the job they are of."""
    told = [(line["time"], {"event": line["event"], **line["facts"]}) for line in lines]
    return "\n".join(
        f"{time}  {_summed(message, view) if message['event'] == 'sum' else event(message)}" for time, message in told
    )


def _summed(message: dict[str, Any], view: dict[str, Any]) -> str:
    """Who is in a sum, by name."""
    name_of = {participant["peer"]: participant["name"] for participant in view["participants"]}
    names = [name_of.get(peer, peer) for peer in message["survivors"]]
    return event({**message, "event": "sums over", "step": "", "k": "", "survivors": names})


def lines(text: str) -> str:
    """A text of several lines, without control characters."""
    return "\n".join(map(clean, text.splitlines()))


VERDICTS = {"refused": "refused", "ask": "the operator is asked", "auto": "allowed"}


def decision(view: dict[str, Any]) -> str:
    """What the policy says to a contract: every bound with its figures, and the verdict."""
    rows = [
        ("holds" if finding["holds"] else "FAILS", finding["stage"] or "-", finding["rule"], finding["text"])
        for finding in view["findings"]
    ]
    return table(("", "stage", "rule", "why"), rows, empty="") + f"\n\n{VERDICTS[view['verdict']]}"


def model(view: dict[str, Any]) -> str:
    about = [
        ("digest", view["digest"]),
        ("job", f"{view['job_name']} ({view['job'][:SHORT]})"),
        ("stage", view["stage"]),
    ]
    return facts([*about, ("algorithm", view["algorithm"]), ("created", view["created"]), *view["facts"].items()])


def passport(view: dict[str, Any]) -> str:
    """Where a model is from."""
    told = view["passport"]
    lines = [(key, value) for key, value in told.items() if not isinstance(value, dict | list) or key == "contributors"]
    sums = [
        (f"sums over {clean(one['survivors'])}", f"{one['sums']} in turns {one['first_turn']} to {one['last_turn']}")
        for one in told["sums"]
    ]
    spent = [] if told["epsilon"] is not None else [("epsilon", "no noise was added")]
    return facts([*lines, *spent, *sums, *told["metrics"].items(), ("signatures", len(view["signatures"]))])


def models(views: list[dict[str, Any]]) -> str:
    rows = [(v["digest"][:SHORT], v["algorithm"], v["job_name"], v["stage"], v["created"]) for v in views]
    return table(["digest", "algorithm", "job", "stage", "created"], rows, empty="no models yet")


def entries(views: list[dict[str, Any]]) -> str:
    """Entries of the audit log, one a line."""
    rows = [
        (v["number"], v["time"], v["event"], v["job"][:SHORT], event({"event": "", **_facts_of(v)}).strip())
        for v in views
    ]
    return table(["number", "time", "event", "job", "facts"], rows, empty="no entries")


def entry(view: dict[str, Any]) -> str:
    """One entry, with all its facts."""
    own = [(key, view[key]) for key in ("number", "time", "event", "job")]
    return facts([*own, *_leaves("", _facts_of(view))])


def _facts_of(view: dict[str, Any]) -> dict[str, Any]:
    """The facts of an entry; a charge is in whole units there (governance/budget.py)."""
    told: dict[str, Any] = view["facts"]
    if view["event"] != "charged":
        return told
    return {**told, "epsilon": f"{told['epsilon'] / 10**6:g}", "delta": f"{told['delta'] / 10**15:g}"}


def verified(view: dict[str, Any]) -> str:
    """What was found of a log that verifies."""
    hidden = f", {view['hidden']} of them hidden" if view["hidden"] else ""
    told = f"{clean(view['name'])}: all {view['entries']} entries are as they were appended{hidden}"
    signers = [f"{clean(s['name'])} ({s['id']}, up to {s['number']}; {s['fingerprint']})" for s in view["cosigners"]]
    if not signers:
        return f"{told}; nobody else signed it yet"
    return f"{told}; co-signed up to entry {view['signed']} by\n  " + "\n  ".join(signers)


def event(message: dict[str, Any]) -> str:
    """One event on one line."""
    told = [clean(message["event"])]
    for key, value in message.items():
        if key == "metrics":
            told.append(metrics(message))
        elif key == "outputs":
            told += [f"{clean(output['name'])}={output['digest'][:SHORT]}" for output in value]
        elif key not in ("event", "topic", "terminal", "job") and value not in ("", None):
            told.append(f"{key}={clean(value)}")
    return "  ".join(told)


def topic(message: dict[str, Any]) -> str:
    """What an event is about: the kind, and the beginning of the id as other commands take it."""
    kind, _, ref = clean(message.get("topic", "")).partition(":")
    return f"{kind} {ref[:SHORT]}".strip()


def metrics(holder: dict[str, Any]) -> str:
    return " ".join(f"{name}={value:.5g}" for name, value in (holder.get("metrics") or {}).items())


def _state(stage: dict[str, Any]) -> str:
    restarts: int = stage["restarts"]
    return str(stage["state"]) + (f" ({restarts} restart{'s' if restarts > 1 else ''})" if restarts else "")


# the live view


def watch(events: Iterator[dict[str, Any]], refresh: Callable[[], dict[str, Any]]) -> None:
    """Show the events of Client.watch until the job has ended: a picture on a terminal, else a line for each.

    The steps of a sum are one word of the picture. As lines only those are shown that change who is in the sums, or
    tell of an attempt that failed. `refresh` gives the job as it is; it is asked when more has changed than that.
    """
    if not sys.stdout.isatty():
        _lines(events)
        return
    from rich.live import Live

    view: dict[str, Any] = {}
    steps: dict[str, str] = {}  # stage → what its sum is at
    with Live(refresh_per_second=8) as live:
        for message in events:
            if message["event"] == "state":
                view = message["job"]
            elif message["event"] == "progress":
                for stage in view["stages"]:
                    if stage["id"] == message["stage"]:
                        stage |= {
                            "round": message["done"],
                            "rounds": message["of"],
                            "metrics": message.get("metrics") or {},
                        }
            elif message["event"] == "sum" and message["step"] != "total":
                steps[message.get("stage", "")] = SUM_STEPS.get(message["step"], "")
            else:
                view = refresh()
            live.update(_picture(view, steps))


def _lines(events: Iterator[dict[str, Any]]) -> None:
    view: dict[str, Any] = {}
    seen: dict[str, list[str]] = {}  # stage → who was in its last sum
    for message in events:
        match message["event"]:
            case "state":
                view = message["job"]
                click.echo(job(view))
            case "sum" if message["step"] == "total":
                if seen.get(message["stage"]) != message["survivors"]:
                    seen[message["stage"]] = message["survivors"]
                    click.echo(_summed(message, view))
            case "sum":
                if message["step"] in ("aborted", "noise"):
                    click.echo(event({**message, "survivors": "", "sid": ""}))
            case _:
                click.echo(event(message))


SUM_STEPS = {
    "started": "masking",
    "scattered": "masked parts sent",
    "added": "parts added up",
    "committed": "survivors agreed on",
    "released": "survivors agreed on",
    "opened": "taking the masks off",
    "unmasked": "masks are off",
    "final": "",
    "aborted": "another attempt",
    "noise": "noise",
}
"""What people read of the steps of a sum."""


def _picture(view: dict[str, Any], steps: dict[str, str]) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    color = {"done": "green", "failed": "red", "cancelled": "yellow"}.get(view["state"], "cyan")
    title = Text.assemble((clean(view["name"]), "bold"), f"  {view['id'][:SHORT]}  ", (view["state"], color))
    people = Text("  ").join(
        Text(f"{clean(p['alias'])} ", "green" if p["connected"] else "dim") + Text(p["state"], "dim")
        for p in view["participants"]
    )
    stages = Table.grid(padding=(0, 2))
    for stage in view["stages"]:
        done = stage["state"] == "done"
        bar = ProgressBar(
            total=max(stage["rounds"], 1), completed=max(stage["rounds"], 1) if done else stage["round"], width=24
        )
        stages.add_row(
            Text(stage["id"], "bold"),
            Text(_state(stage)),
            bar,
            Text(f"{stage['round']}/{stage['rounds']}"),
            Text(metrics(stage)),
            Text(_step(stage, steps), "dim"),
        )
    parts: list[Any] = [title, people, stages]
    for stage in view["stages"]:
        for alias, turns in left_out(stage["sums"]).items() if stage["sums"] else ():
            name, in_a_row = clean(_names(view)[alias]), f" {turns} turns in a row" if turns >= 2 else ""
            parts.append(Text(f"{stage['id']}: left out of the sums{in_a_row}: {name}", "yellow"))
        if stage["sums"] and stage["state"] == "running" and (waits := _waits(stage["sums"])):
            parts.append(Text(f"{stage['id']}: a sum {waits}", "yellow"))
    if view["waiting_for"]:
        parts.append(Text(f"waiting for {clean(view['waiting_for'])}", "yellow"))
    if view.get("error"):
        parts.append(Text(f"{clean(view['error']['message'])} {clean(view['error']['hint'])}".strip(), "red"))
    return Group(*parts)


def _step(stage: dict[str, Any], steps: dict[str, str]) -> str:
    """Who is in the sums of a running stage, and what the present one is at."""
    sums = stage["sums"]
    if sums is None or stage["state"] != "running":
        return ""
    who = f"{len(sums['survivors'])} of {len(sums['parties'])}" if sums["survivors"] else ""
    return "  ".join(filter(None, (who and f"sum of {who}", steps.get(stage["id"], ""))))
