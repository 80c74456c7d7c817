"""`fedpeer policy`: what may be computed on this organization's data."""

from __future__ import annotations

import sys
from typing import Any

import click

from fedpeer.admin import screen
from fedpeer.cli.tree import State, asks, cli, pass_state, read_input
from fedpeer.errors import ConfigError, NotFound, PolicyError, UsageError


@cli.group()
def policy() -> None:
    """What may be computed on this organization's data."""


@policy.command(name="show", help=asks("policy.show"))
@click.option("--waiting", metavar="UID", type=int, help="The text that this user set, and that waits for a second.")
@pass_state
def policy_show(state: State, waiting: int | None) -> None:
    view = state.client().call("policy.show")
    if waiting is None:
        state.show(view, screen.lines(view["text"]))
        _warn(view)
        for one in view["waiting"]:
            hint = f"fedpeer policy show --waiting {one['uid']}"
            click.echo(f"a policy of uid {one['uid']} waits for a second person: {hint}", err=True)
        return
    found = next((one for one in view["waiting"] if one["uid"] == waiting), None)
    if found is None:
        raise NotFound(f"no policy of uid {waiting} waits for a second person", hint="fedpeer policy show")
    state.show(found, screen.lines(found["text"]))


@policy.command(name="set", help=asks("policy.set"))
@click.argument("file")
@pass_state
def policy_set(state: State, file: str) -> None:
    text = read_input(file)
    view = state.client().call("policy.set", text=text)
    state.show(view, _said(view, text))
    _warn(view)


def _warn(view: dict[str, Any]) -> None:
    for doubt in view["doubts"]:
        click.echo(f"warning: {screen.clean(doubt)}", err=True)


def _said(view: dict[str, Any], text: str) -> str:
    if any(one["text"] == text for one in view["waiting"]):
        return "it waits for a second person, who sets the same text (fedpeer policy show --waiting UID)"
    return f"policy {view['number']} counts from now on"


@policy.command(name="edit")
@pass_state
def policy_edit(state: State) -> None:
    """Change the policy in an editor (VISUAL, EDITOR). It counts when it is saved and can be read."""
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to edit on", hint="fedpeer policy set FILE")
    client = state.client()
    view = client.call("policy.show")
    text = view["text"]
    while (edited := click.edit(text, extension=".toml")) is not None and edited != view["text"]:
        try:
            view = client.call("policy.set", text=edited, after=view["number"])
        except ConfigError as error:
            hint = f" ({error.hint})" if error.hint else ""
            click.confirm(f"{error.message}{hint}. Edit it again?", default=True, abort=True, err=True)
            text = edited
            continue
        state.show(view, _said(view, edited))
        _warn(view)
        return
    state.show(view, "nothing was changed")


@policy.command(name="test", help=asks("policy.test"))
@click.option("--job", "file", metavar="FILE", required=True, help="The contract, as `fedpeer job submit` takes it.")
@pass_state
def policy_test(state: State, file: str) -> int:
    view = state.client().call("policy.test", text=read_input(file))
    state.show(view, screen.decision(view))
    return PolicyError.exit_code if view["verdict"] == "refused" else 0
