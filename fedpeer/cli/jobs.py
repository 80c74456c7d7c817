"""`fedpeer job`: what is computed together."""

from __future__ import annotations

import json
from typing import Any

import click

from fedpeer.admin import screen
from fedpeer.admin.client import ENDS, Client
from fedpeer.cli.tree import State, asks, cli, confirm, pass_state, read_input, ref, yes
from fedpeer.errors import JobError, PolicyError, TimedOut, by_code


@cli.group()
def job() -> None:
    """What is computed together."""


@job.command(name="submit", help=asks("job.submit"))
@click.argument("file")
@pass_state
def job_submit(state: State, file: str) -> None:
    view = state.client().call("job.submit", text=read_input(file))
    state.show(view, view["id"])
    if not state.json:
        me = next(p["name"] for p in view["participants"] if p["alias"] == view["me"])
        if waiting := [name for name in view["waiting_for"] if name != me]:
            click.echo(f"it waits for {screen.clean(waiting)}", err=True)
        for stage in view["stages"]:
            if stage["sums"]:
                click.echo(f"sums of {stage['id']}: {screen.protection(stage['sums'])}", err=True)
        click.echo(f"follow it with: fedpeer job watch {view['id'][: screen.SHORT]}", err=True)


@job.command(name="dry-run", help=asks("job.dry-run"))
@click.argument("file")
@pass_state
def job_dry_run(state: State, file: str) -> None:
    view = state.client().call("job.dry-run", text=read_input(file))
    state.show(view, screen.dry_run(view))


@job.command(name="list", help=asks("job.list"))
@pass_state
def job_list(state: State) -> None:
    views = state.client().call("job.list")
    state.show(views, screen.jobs(views))


@job.command(name="show", help=asks("job.show"))
@ref("job")
@pass_state
def job_show(state: State, ref: str) -> None:
    view = state.client().call("job.show", ref=ref)
    state.show(view, screen.job(view))


@job.command(name="watch")
@ref("job")
@pass_state
def job_watch(state: State, ref: str) -> int:
    """Follow a job until it has ended; the exit code tells how. For people, or as JSON lines."""
    client = state.client()
    found = client.call("job.show", ref=ref)["id"]
    try:
        if state.json:
            for event in client.watch(found):
                click.echo(json.dumps(event, ensure_ascii=False))
        else:
            screen.watch(client.watch(found), lambda: _view(client, found))
    except KeyboardInterrupt:
        click.echo("the job goes on; `fedpeer job cancel` would end it", err=True)
        raise
    view = _view(client, found)
    if not state.json:
        click.echo(screen.job(view))
    return _exit_code(view)


@job.command(name="wait", help=asks("job.wait"))
@ref("job")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Exit 7 after this long."
)
@pass_state
def job_wait(state: State, ref: str, timeout: float | None) -> int:
    try:
        view = state.client(timeout).call("job.wait", ref=ref)
    except TimedOut:
        view = state.client(2.0).call("job.show", ref=ref)
        if view["state"] not in ENDS:
            waiting = f", and waits for {screen.clean(view['waiting_for'])}" if view["waiting_for"] else ""
            still = f"the job {view['name']} is still {view['state']} after {timeout:g} s{waiting}"
            raise TimedOut(still) from None
    state.show(view, screen.job(view))
    return _exit_code(view)


@job.command(name="logs", help=asks("job.logs"))
@ref("job")
@pass_state
def job_logs(state: State, ref: str) -> None:
    client = state.client()
    view, lines = client.call("job.show", ref=ref), client.call("job.logs", ref=ref)
    state.show(lines, screen.logs(lines, view))


@job.command(name="cancel", help=asks("job.cancel"))
@ref("job")
@yes
@pass_state
def job_cancel(state: State, ref: str, yes: bool) -> None:
    client = state.client()
    found = client.call("job.show", ref=ref)
    confirm(f"end the job {found['name']} ({found['id'][: screen.SHORT]}) for all its participants?", yes)
    view = client.call("job.cancel", ref=found["id"])
    state.show(view, f"{view['state']} {view['name']}")


def _view(client: Client, id_: str) -> dict[str, Any]:
    view: dict[str, Any] = client.call("job.show", ref=id_)
    return view


def _exit_code(view: dict[str, Any]) -> int:
    """How a job ended: 0 done, 6 refused by a policy, else 1."""
    if view["state"] == "done":
        return 0
    kind = by_code((view.get("error") or {}).get("code", ""))
    return PolicyError.exit_code if issubclass(kind, PolicyError) else JobError.exit_code
