"""`fedpeer model`: what came of it."""

from __future__ import annotations

from pathlib import Path

import click

from fedpeer.admin import screen
from fedpeer.cli.tree import Reference, State, asks, cli, pass_state, ref
from fedpeer.errors import UsageError


@cli.group()
def model() -> None:
    """What came of it."""


@model.command(name="list", help=asks("model.list"))
@pass_state
def model_list(state: State) -> None:
    views = state.client().call("model.list")
    state.show(views, screen.models(views))


@model.command(name="show", help=asks("model.show"))
@ref("model")
@pass_state
def model_show(state: State, ref: str) -> None:
    view = state.client().call("model.show", ref=ref)
    state.show(view, screen.model(view))


@model.command(name="predict", help=asks("model.predict"))
@ref("model")
@click.argument("dataset", type=Reference("dataset"))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the CSV there.")
@pass_state
def model_predict(state: State, ref: str, dataset: str, out: Path | None) -> None:
    text = state.client().call("model.predict", ref=ref, dataset=dataset)
    if out is None:
        state.show({"csv": text}, text.rstrip("\n"))
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}") from None
    rows = max(text.count("\n") - 1, 0)
    state.show({"out": str(out), "rows": rows}, f"wrote {rows} rows to {out}")
