"""`fedpeer model`: what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fedpeer.admin import screen
from fedpeer.cli.tree import Reference, State, asks, cli, pass_state, ref
from fedpeer.errors import TrustError, UsageError


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


@model.command(name="passport", help=asks("model.passport"))
@ref("model")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it there.")
@pass_state
def model_passport(state: State, ref: str, out: Path | None) -> None:
    view = state.client().call("model.passport", ref=ref)
    if out is None:
        state.show(view, screen.passport(view))
        return
    try:
        out.write_text(json.dumps(view, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}") from None
    signatures = len(view["signatures"])
    text = f"wrote the passport with {signatures} signatures to {out}; to check it: fedpeer model verify {out}"
    state.show({"out": str(out), "signatures": signatures}, text)


@model.command(name="verify")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@pass_state
def model_verify(state: State, file: Path) -> None:
    """Check a model's passport, without a daemon: unaltered, and signed by all who made the model."""
    import msgspec

    from fedpeer.governance import passport

    try:
        with file.open("rb") as opened:
            found = passport.verify(opened.read(passport.MAX_FILE + 1))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    if found.missing:
        raise TrustError(f"{file}: not signed by {', '.join(found.missing)}", hint="ask one of the signers for theirs")
    signers = "\n  ".join(screen.clean(signer) for signer in found.signed_by)
    told = f"the passport of model {found.model} is as it was signed by all who made it:\n  {signers}"
    state.show(msgspec.to_builtins(found), told)
