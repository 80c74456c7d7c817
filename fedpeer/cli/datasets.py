"""`fedpeer dataset`: the tables of this organization."""

from __future__ import annotations

from pathlib import Path

import click

from fedpeer.admin import screen
from fedpeer.cli.tree import State, asks, cli, confirm, pass_state, ref, yes


@cli.group()
def dataset() -> None:
    """The tables of this organization."""


@dataset.command(name="add", help=asks("dataset.add"))
@click.argument("name")
@click.argument("uri")
@click.option("--id", "id_", metavar="COLUMN", help="The column that tells whose row it is.")
@click.option("--label", metavar="COLUMN", help="The column to be predicted.")
@click.option("--text", metavar="COLUMN", multiple=True, help="A column that is text though it looks like numbers.")
@click.option("--secret", metavar="NAME", help="The database's password: a file in secrets/, or a credential.")
@click.option("--offer", is_flag=True, help="Tell partners who ask of its columns, and about how many rows it has.")
@pass_state
def dataset_add(
    state: State,
    name: str,
    uri: str,
    id_: str | None,
    label: str | None,
    text: tuple[str, ...],
    secret: str | None,
    offer: bool,
) -> None:
    where = uri if "://" in uri else str(Path(uri).absolute())  # the daemon's folder is another
    view = state.client().call(
        "dataset.add", name=name, uri=where, id=id_, label=label, text=list(text), secret=secret, offered=offer
    )
    state.show(view, screen.dataset(view))


@dataset.command(name="list", help=asks("dataset.list"))
@pass_state
def dataset_list(state: State) -> None:
    views = state.client().call("dataset.list")
    state.show(views, screen.datasets(views))


@dataset.command(name="show", help=asks("dataset.show"))
@ref("dataset")
@pass_state
def dataset_show(state: State, ref: str) -> None:
    view = state.client().call("dataset.show", ref=ref)
    state.show(view, screen.dataset(view))


@dataset.command(name="offer", help=asks("dataset.offer"))
@ref("dataset")
@click.option("--withdraw", is_flag=True, help="Tell them no more. What they were told they know.")
@pass_state
def dataset_offer(state: State, ref: str, withdraw: bool) -> None:
    view = state.client().call("dataset.offer", ref=ref, offered=not withdraw)
    state.show(view, f"{view['name']} is offered {'to partners who ask' if view['offered'] else 'to nobody'}")


@dataset.command(name="remove", help=asks("dataset.remove"))
@ref("dataset")
@click.option("--forget", is_flag=True, help="Forget also which rows answers were from; see `fedpeer budget show`.")
@yes
@pass_state
def dataset_remove(state: State, ref: str, forget: bool, yes: bool) -> None:
    client = state.client()
    found = client.call("dataset.show", ref=ref)
    more = ", and what was answered from it: later answers may tell single rows by difference" if forget else ""
    confirm(f"forget the dataset {found['name']} ({found['uri']}){more}?", yes)
    state.show(
        client.call("dataset.remove", ref=found["name"], forget=forget), f"removed {found['name']}; its source stays"
    )
