"""What people see of approvals: the page that they read before they say yes, and what waits for them.

Texts of others (the job's name, its purpose, names) cannot steer the terminal: all goes through `screen.clean`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedpeer.admin.screen import SHORT, clean, facts, protection, table

WAYS = {"sum": "nobody sees one's part", "agreed": "derived from totals", "sealed": "its receiver cannot read it"}
"""What the kind of a message means; an open one is read by its receiver."""


def review(view: dict[str, Any]) -> str:
    """What runs on which columns, what it tells whom, what it costs, what the policy says, and what is new."""
    approved = f"{len(view['approved'])} of {view['needs']}"
    parts = [
        facts(
            [
                ("job", view["name"]),
                ("id", view["id"]),
                ("purpose", view["purpose"] or "none is given"),
                ("proposed by", view["initiator"]),
                ("participants", view["participants"]),
                ("state", view["state"]),
                ("answer until", view["until"]),
                ("approved by", f"{approved}: {clean(view['approved'])}" if view["approved"] else approved),
                ("released to all", view["released"] or "nothing more than what its stages let out"),
                ("privacy cost", _cost(view["epsilon"])),
            ]
        )
    ]
    for stage in view["stages"]:
        parts += _stage(stage)
    parts.append(_findings(view))
    parts.append(_differences(view))
    return "\n\n".join(parts)


def _stage(stage: dict[str, Any]) -> Iterator[str]:
    """What it does, and what it lets out."""
    about = [
        (f"stage {stage['id']}", f"{stage['run']}, as {stage['role']}"),
        ("  does", stage["text"].partition("\n\n")[0].replace("\n", " ")),
        ("  with", stage["parties"]),
        ("  parameters", [f"{name} = {clean(value)}" for name, value in stage["params"].items()]),
    ]
    about += [("  reads", _reads(item)) for item in stage["reads"]]
    if not stage["reads"]:
        about.append(("  reads", "nothing of this peer's datasets"))
    if stage["epsilon"]:
        about.append(("  privacy", _cost(stage["epsilon"], stage["delta"])))
    if stage["sums"]:
        about.append(("  sums", protection(stage["sums"])))
    yield facts(about)
    rows = [
        (
            message["tag"],
            message["kind"],
            f"{message['sender']} to {message['receiver']}" if message["sender"] else "all",
            message["text"],
            WAYS.get(message["kind"], "its receiver reads it"),
        )
        for message in stage["messages"]
    ]
    yield table(["lets out", "kind", "among", "what it tells", ""], rows, empty="  lets nothing out")


def _reads(item: dict[str, Any]) -> str:
    columns = item["columns"]  # all of them: one that is not named is approved all the same
    label = f"; label {clean(item['label'])}" if item["label"] else ""
    return f"{clean(item['dataset'])}: {item['rows']} rows; {len(columns)} columns: {clean(columns)}{label}"


def _cost(epsilon: float, delta: float = 0.0) -> str:
    if not epsilon:
        return "no noise is added: what leaves is exact, and nothing is charged"
    return f"epsilon {epsilon:g}" + (f", delta {delta:g}" if delta else "")


def _findings(view: dict[str, Any]) -> str:
    failed = [finding for finding in view["findings"] if not finding["holds"]]
    head = f"policy: {len(view['findings']) - len(failed)} of {len(view['findings'])} bounds and rules hold"
    told = [("FAILS", finding) for finding in failed]
    told += [("", finding) for finding in view["findings"] if finding["holds"]]
    lines = [
        f"  {' '.join(clean(word) for word in (mark, f['stage'], f['rule']) if word)}: {clean(f['text'])}"
        for mark, f in told
    ]
    return "\n".join([head, *lines])


def _differences(view: dict[str, Any]) -> str:
    if not view["compared_with"]:
        return f"the first job of {clean(view['initiator'])} that is to be approved here"
    last = view["compared_with"][:SHORT]
    rows = [(change["field"], change["before"] or "-", change["after"] or "-") for change in view["differences"]]
    told = table(["different", f"in {last}", "now"], rows, empty="")
    return told or f"the same as {last}, which was approved last, in everything but nonce and expiry"


def approvals(view: dict[str, Any]) -> str:
    """What waits, and what is approved in advance."""
    asking = [
        (v["id"][:SHORT], v["name"], v["initiator"], f"{len(v['approved'])} of {v['needs']}", v["until"], v["purpose"])
        for v in view["asking"]
    ]
    parts = [
        table(
            ["job", "name", "proposed by", "approved", "answer until", "purpose"], asking, empty="no job waits for you"
        )
    ]
    if view["standing"]:
        rows = [
            (
                v["number"],
                v["name"],
                v["initiator"],
                ", ".join(v["datasets"]) + (" (new rows, too)" if v["new_rows"] else ""),
                f"{v['epsilon']:g}" if v["epsilon"] else "-",
                v["people"],
                v["expires"],
            )
            for v in view["standing"]
        ]
        head = ["always", "like", "proposed by", "datasets", "epsilon", "given by", "until"]
        parts.append(table(head, rows, empty=""))
    return "\n\n".join(parts)
