"""`fedpeer budget`: what partners were told of this organization's data, as differential privacy counts it."""

from __future__ import annotations

import click

from fedpeer.admin import screen
from fedpeer.cli.tree import Reference, State, asks, cli, pass_state


@cli.group()
def budget() -> None:
    """What partners were told of this organization's data."""


@budget.command(name="list", help=asks("budget.list"))
@pass_state
def budget_list(state: State) -> None:
    views = state.client().call("budget.list")
    state.show(views, screen.accounts(views))


@budget.command(name="show", help=asks("budget.show"))
@click.argument("ref", metavar="DATASET", type=Reference("dataset"))
@pass_state
def budget_show(state: State, ref: str) -> None:
    view = state.client().call("budget.show", ref=ref)
    state.show(view, screen.budget(view))
