"""What concerns this machine: make a peer, run it, see how it is."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from fedpeer import config
from fedpeer.admin import screen
from fedpeer.cli.tree import State, asks, cli, pass_state
from fedpeer.errors import FedpeerError, NotReachable


@cli.group(name="config")
def config_group() -> None:
    """How this peer is set up."""


@cli.command()
@click.option("--name", required=True, help="What the others call this peer: a-z, 0-9, hyphens.")
@click.option("--listen", multiple=True, metavar="ADDRESS", help="Where to wait for others (host:port); repeatable.")
@click.option("--address", multiple=True, metavar="ADDRESS", help="Where others can dial it (host:port); repeatable.")
@pass_state
def init(state: State, name: str, listen: tuple[str, ...], address: tuple[str, ...]) -> None:
    """Make a peer: its keys, its fedpeer.toml, its card. A key file that is there already is kept."""
    from fedpeer.identity import create_key_file, load_key_file

    home = config.find_home(state.home)
    text = config.new_file(home, name=name, listen=listen or None, addresses=address)
    key_file = home / config.KEY_FILE
    identity = load_key_file(key_file) if key_file.exists() else create_key_file(key_file)
    made = config.write_new(home, text)
    card = identity.card(made.name, made.addresses)
    view = {"id": card.id, "name": card.name, "fingerprint": card.fingerprint, "card": card.text, "home": str(home)}
    state.show(
        view,
        f"made {made.name} ({card.id}) in {home}\n\n"
        f"The card, to give to the other organizations:\n\n{screen.card(view)}\n\n"
        "Compare it with them by voice. Next: `fedpeer run`, then `fedpeer peer add` for each of their cards.",
    )


@cli.command()
@pass_state
def run(state: State) -> int:
    """Run the daemon of this peer in the foreground."""
    from fedpeer.daemon import run as run_daemon

    try:
        code: int = run_daemon(config.find_home(state.home))
    except ExceptionGroup as group:  # a nursery's: told as the one error it is about, if it is one of ours
        ours, others = group.split(FedpeerError)
        if ours is None or others is not None:
            raise
        raise _first(ours) from group
    return code


@config_group.command(name="show")
@pass_state
def config_show(state: State) -> None:
    """Show the effective configuration, and where each value is from."""
    loaded = config.load(config.find_home(state.home))
    values = {name: _plain(getattr(loaded, name)) for name in loaded.origin}
    rows = [(name, json.dumps(value, ensure_ascii=False), loaded.origin[name]) for name, value in values.items()]
    state.show(
        {name: {"value": value, "origin": loaded.origin[name]} for name, value in values.items()},
        screen.table(["key", "value", "from"], rows, empty=""),
    )


@cli.command(help=asks("card"))
@pass_state
def card(state: State) -> None:
    try:
        view = state.client().call("card")
    except NotReachable:  # without a daemon, from the files
        from fedpeer.identity import load_key_file

        loaded = config.load(config.find_home(state.home))
        own = load_key_file(loaded.key_file).card(loaded.name, loaded.addresses)
        view = {"id": own.id, "name": own.name, "fingerprint": own.fingerprint, "card": own.text}
    state.show(view, screen.card(view))


@cli.command(help=asks("status"))
@pass_state
def status(state: State) -> None:
    view = state.client().call("status")
    state.show(view, screen.status(view))


@cli.command()
@click.option("--topic", help='Only these, for example "job:<id>" or "peer:<id>".')
@pass_state
def events(state: State, topic: str | None) -> None:
    """Print what happens in the daemon, until interrupted."""
    with state.client().events(topic) as stream:
        for event in stream:
            line = f"{datetime.now():%H:%M:%S}  {screen.topic(event)}  {screen.event(event)}"  # noqa: DTZ005 - of here
            click.echo(json.dumps(event, ensure_ascii=False) if state.json else line)


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
