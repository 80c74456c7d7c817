"""`fedpeer audit`: what was decided and done here, and the proof of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from fedpeer.admin import screen
from fedpeer.cli.tree import State, asks, cli, confirm, pass_state, read_input, ref, yes
from fedpeer.errors import AuditBroken, UsageError

if TYPE_CHECKING:
    from fedpeer.governance.export import Verified


@cli.group()
def audit() -> None:
    """What was decided and done here, and the proof of it."""


@audit.command(name="list", help=asks("audit.list"))
@click.option("--job", default="", metavar="JOB", help="Of this job only.")
@click.option("--since", type=click.IntRange(min=1), metavar="NUMBER", help="From this entry on; else the last ones.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="At most so many.")
@pass_state
def audit_list(state: State, job: str, since: int | None, limit: int) -> None:
    views = state.client().call("audit.list", job=job, since=since or 0, limit=limit)
    state.show(views, screen.entries(views))


@audit.command(name="show", help=asks("audit.show"))
@click.argument("number", type=click.IntRange(min=1))
@pass_state
def audit_show(state: State, number: int) -> None:
    view = state.client().call("audit.show", number=number)
    state.show(view, screen.entry(view))


@audit.command(name="export", help=asks("audit.export"))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--redacted", is_flag=True, help="Hashes stand for the entries: it shows that the log is whole, no more.")
@pass_state
def audit_export(state: State, file: Path, redacted: bool) -> None:
    entries = 0
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            for page in _pages(state, redacted=redacted):
                opened.write(page)
                entries += page.count(b'"number":')
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    view = {"file": str(file), "entries": entries}
    state.show(view, f"wrote {entries} entries to {file}; anybody can check them: fedpeer audit verify {file}")


@audit.command(name="verify")
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--signer", "signers", multiple=True, metavar="CARD", help="Must have co-signed: its id, card or file.")
@pass_state
def audit_verify(state: State, files: tuple[Path, ...], signers: tuple[str, ...]) -> None:
    """Check exported audit logs, without a daemon; or that of the own daemon.

    Several files are checked against each other's signatures too. With --signer, co-signatures of others do not count.
    """
    from fedpeer.governance import export

    trusted = {_signer(given) for given in signers} if signers else None
    with ExitStack() as stack:
        sources = [(str(file), _lines(stack.enter_context(file.open("rb")), export.MAX_LINE + 1)) for file in files]
        found = export.verify(sources or [("the daemon", _own(state))], trusted)
    for log in found:
        lacking = (trusted or set()) - {signer.id for signer in log.cosigners} - {log.id}
        if lacking:
            raise AuditBroken(f"{log.file}, the log of {log.name}, is not co-signed by {', '.join(sorted(lacking))}")
    state.show([_view(log) for log in found], "\n".join(screen.verified(_view(log)) for log in found))


@audit.command(name="accept", help=asks("audit.accept"))
@ref("peer")
@yes
@pass_state
def audit_accept(state: State, ref: str, yes: bool) -> None:
    client = state.client()
    found = client.call("peer.show", ref=ref)
    confirm(f"take the audit log of {found['name']} as it is now, whatever was co-signed before?", yes)
    view = client.call("audit.accept", ref=found["id"])
    state.show(view, f"the next head of {view['name']} is co-signed; before, {view['known']} entries were known")


def _pages(state: State, *, redacted: bool = False) -> Iterator[bytes]:
    """The export of the daemon, piece by piece."""
    client, since = state.client(), 0
    while text := client.call("audit.export", since=since, redacted=redacted):
        page: bytes = text.encode()
        yield page
        since = since + page.count(b"\n") if since else 1


def _own(state: State) -> Iterator[bytes]:
    return (line for page in _pages(state) for line in page.splitlines())


def _lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    while line := file.readline(size):
        yield line


def _signer(given: str) -> str:
    from fedpeer.identity import CARD_PREFIX, Card

    if given.startswith("fp1"):
        return given
    return Card.parse(given if given.startswith(CARD_PREFIX) else read_input(given)).id


def _view(log: Verified) -> dict[str, object]:
    import msgspec

    view: dict[str, object] = msgspec.to_builtins(log)
    return view
