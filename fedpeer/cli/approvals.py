"""`fedpeer approvals`, `fedpeer job review | approve | deny`: what the operators of this peer say to jobs."""

from __future__ import annotations

import click

from fedpeer.admin import review, screen
from fedpeer.cli.jobs import job
from fedpeer.cli.tree import State, asks, cli, confirm, pass_state, ref, yes


@cli.group(invoke_without_command=True)
@pass_state
@click.pass_context
def approvals(context: click.Context, state: State) -> None:
    """The jobs that wait for this peer's operators, and what they approved in advance."""
    if context.invoked_subcommand is None:
        _list(state)


@approvals.command(name="list", help=asks("approvals.list"))
@pass_state
def approvals_list(state: State) -> None:
    _list(state)


@approvals.command(name="revoke", help=asks("approvals.revoke"))
@click.argument("number", type=int)
@pass_state
def approvals_revoke(state: State, number: int) -> None:
    view = state.client().call("approvals.revoke", number=number)
    state.show(view, f"revoked {view['number']}: jobs like {view['name']} are asked about again")


@job.command(name="review", help=asks("job.review"))
@ref("job")
@pass_state
def job_review(state: State, ref: str) -> None:
    view = state.client().call("job.review", ref=ref)
    state.show(view, review.review(view))


@job.command(name="approve", help=asks("job.approve"))
@ref("job")
@click.option("--always-like-this", is_flag=True, help="And every job that is the same, for 30 days.")
@click.option("--on-new-rows", is_flag=True, help="With --always-like-this: also when the datasets have other rows.")
@yes
@pass_state
def job_approve(state: State, ref: str, always_like_this: bool, on_new_rows: bool, yes: bool) -> None:
    if on_new_rows and not always_like_this:
        raise click.UsageError("--on-new-rows goes with --always-like-this")
    client = state.client()
    view = client.call("job.review", ref=ref)
    if not state.json:
        click.echo(review.review(view) + "\n")
    if view["state"] == "asking" and view["verdict"] != "refused":  # else the daemon says why not
        like = " and every job like it for 30 days" if always_like_this else ""
        confirm(f"approve {screen.clean(view['name'])} of {screen.clean(view['initiator'])}{like}?", yes)
    done = client.call("job.approve", ref=view["id"], always=always_like_this + on_new_rows)
    more = "; another person must approve it, too" if done["asks"] else ""
    state.show(done, f"approved {screen.clean(done['name'])}{more}")


@job.command(name="deny", help=asks("job.deny"))
@ref("job")
@click.option("--reason", default="", help="For the own log; the others never read it.")
@pass_state
def job_deny(state: State, ref: str, reason: str) -> None:
    view = state.client().call("job.deny", ref=ref, reason=reason)
    state.show(view, f"denied {screen.clean(view['name'])}; the others read so when the time to answer is over")


def _list(state: State) -> None:
    view = state.client().call("approvals.list")
    state.show(view, review.approvals(view))
