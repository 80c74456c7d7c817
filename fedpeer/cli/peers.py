"""`fedpeer peer`: the other organizations."""

from __future__ import annotations

from pathlib import Path

import click

from fedpeer.admin import screen
from fedpeer.cli.tree import State, asks, cli, confirm, pass_state, read_input, ref, yes
from fedpeer.errors import UsageError


@cli.group()
def peer() -> None:
    """The other organizations."""


@peer.command(name="add", help=asks("peer.add"))
@click.argument("card")
@pass_state
def peer_add(state: State, card: str) -> None:
    if card.strip().startswith("fedpeer-card-"):
        text = card
    elif card == "-" or Path(card).is_file():
        text = read_input(card).partition("\nfingerprint:")[0]  # as `fedpeer card` prints it
    else:
        raise UsageError(f"{card!r} is neither a card nor a file", hint="a card is one line: fedpeer-card-1.…")
    view = state.client().call("peer.add", card=text)
    state.show(
        view,
        f"added {view['name']} ({view['id']})\nfingerprint: {view['fingerprint']}\n"
        "Compare it with them by voice. They must add your card too: fedpeer card",
    )


@peer.command(name="list", help=asks("peer.list"))
@pass_state
def peer_list(state: State) -> None:
    views = state.client().call("peer.list")
    state.show(views, screen.peers(views))


@peer.command(name="show", help=asks("peer.show"))
@ref("peer")
@pass_state
def peer_show(state: State, ref: str) -> None:
    view = state.client().call("peer.show", ref=ref)
    state.show(view, screen.peer(view))


@peer.command(name="ping", help=asks("peer.ping"))
@ref("peer")
@pass_state
def peer_ping(state: State, ref: str) -> None:
    view = state.client().call("peer.ping", ref=ref)
    state.show(view, f"{view['name']}: {view['seconds'] * 1000:.2f} ms")


@peer.command(name="datasets", help=asks("peer.datasets"))
@ref("peer")
@pass_state
def peer_datasets(state: State, ref: str) -> None:
    view = state.client().call("peer.datasets", ref=ref)
    state.show(view, screen.offers(view))


@peer.command(name="remove", help=asks("peer.remove"))
@ref("peer")
@yes
@pass_state
def peer_remove(state: State, ref: str, yes: bool) -> None:
    client = state.client()
    found = client.call("peer.show", ref=ref)
    confirm(f"take {found['name']} ({found['id']}) off the roster?", yes)
    state.show(client.call("peer.remove", ref=found["id"]), f"removed {found['name']}")
