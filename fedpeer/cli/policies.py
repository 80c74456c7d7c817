"""`fedpeer policy`: what may be computed on this organization's data."""

from __future__ import annotations

import sys

import click

from fedpeer.admin import screen
from fedpeer.cli.tree import State, asks, cli, pass_state, read_input
from fedpeer.errors import ConfigError, PolicyError, UsageError


@cli.group()
def policy() -> None:
    """What may be computed on this organization's data."""


@policy.command(name="show", help=asks("policy.show"))
@pass_state
def policy_show(state: State) -> None:
    view = state.client().call("policy.show")
    state.show(view, screen.lines(view["text"]))


@policy.command(name="set", help=asks("policy.set"))
@click.argument("file")
@pass_state
def policy_set(state: State, file: str) -> None:
    view = state.client().call("policy.set", text=read_input(file))
    state.show(view, f"policy {view['number']} counts from now on")


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
        state.show(view, f"policy {view['number']} counts from now on")
        return
    state.show(view, "nothing was changed")


@policy.command(name="test", help=asks("policy.test"))
@click.option("--job", "file", metavar="FILE", required=True, help="The contract, as `fedpeer job submit` takes it.")
@pass_state
def policy_test(state: State, file: str) -> int:
    view = state.client().call("policy.test", text=read_input(file))
    state.show(view, screen.decision(view))
    return PolicyError.exit_code if view["verdict"] == "refused" else 0
