"""The command line: noun, verb. It reads the operator's words, asks the daemon, and shows the answer.

Rules
* `--json` anywhere: one envelope on stdout, {"v": 1, "ok": true, "data": …} or {"v": 1, "ok": false, "error": {code,
  message, hint}}; streams are one JSON object a line, the last of a job with "terminal": true. Without it, errors go to
  stderr with a hint.
* Exit codes: 0 done; 1 it failed, or the job did; 2 usage; 3 the daemon is not reachable; 4 not authorized on its
  socket; 5 not found; 6 refused by a policy; 7 timed out; 130 interrupted.
* What destroys something asks first; --yes answers; without a terminal and --yes it is refused.
* The help of a verb that the daemon carries out is that of the table of commands (admin/commands.py).

Heavy modules (identities, the daemon) are imported by the verbs that need them, so that the others start at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from fedpeer import config
from fedpeer.admin import screen
from fedpeer.admin.client import ENDS, Client
from fedpeer.admin.commands import COMMANDS
from fedpeer.errors import FedpeerError, JobError, NotReachable, PolicyError, TimedOut, UsageError, by_code

MAX_INPUT = 256 * 1024
INTERRUPTED = 130
F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class State:
    """What --home and --json said, wherever they stood."""

    home: Path | None = None
    json: bool = False

    def client(self, timeout_s: float | None = None) -> Client:
        return Client(config.find_socket(self.home), timeout_s=timeout_s)

    def show(self, data: Any, text: str) -> None:
        """The answer: the envelope, or `text` for people."""
        if self.json:
            click.echo(envelope(data))
        elif text:
            click.echo(text)


def envelope(data: Any) -> str:
    return json.dumps({"v": 1, "ok": True, "data": data}, ensure_ascii=False)


# the shape of the tree


def _shared_options() -> list[click.Parameter]:
    def put(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
        def callback(ctx: click.Context, _: click.Parameter, value: Any) -> None:
            if value:
                setattr(ctx.ensure_object(State), name, value)

        return callback

    home = click.Path(path_type=Path, file_okay=False, readable=False)  # else: usage, where it is not authorized
    return [
        click.Option(["--home"], type=home, callback=put("home"), expose_value=False, help="Whose peer: its folder."),
        click.Option(["--json"], is_flag=True, callback=put("json"), expose_value=False, help="Answer as JSON."),
    ]


class Verb(click.Command):
    """A command with the options that stand anywhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _shared_options()


class Noun(click.Group):
    """A group of verbs; `ls` is `list`."""

    command_class = Verb

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _shared_options()

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, "list" if name == "ls" else name)


Noun.group_class = Noun


class Reference(click.ParamType[str]):
    """A name, an id, or a unique prefix of one; the shell completes it from the daemon's list."""

    name = "ref"

    def __init__(self, noun: str) -> None:
        self.noun = noun

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            views = ctx.ensure_object(State).client(2.0).call(f"{self.noun}.list")
        except FedpeerError:
            return []
        known = [(str(view.get("id") or view.get("digest")), str(view.get("name", ""))) for view in views]
        return [CompletionItem(name or id_, help=id_) for id_, name in known if (name or id_).startswith(incomplete)]


def ref(noun: str) -> Callable[[F], F]:
    return click.argument("ref", metavar=noun.upper(), type=Reference(noun))


def asks(name: str) -> str:
    """The help of a verb that the daemon carries out."""
    return COMMANDS[name].help


pass_state = click.make_pass_decorator(State, ensure=True)
yes = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group(cls=Noun, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedpeer")
def cli() -> None:
    """Federated learning between organizations, without a server. One peer for each organization."""


@cli.group()
def peer() -> None:
    """The other organizations."""


@cli.group()
def dataset() -> None:
    """The tables of this organization."""


@cli.group()
def job() -> None:
    """What is computed together."""


@cli.group()
def model() -> None:
    """What came of it."""


@cli.group(name="config")
def config_group() -> None:
    """How this peer is set up."""


# this machine


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
            click.echo(json.dumps(event, ensure_ascii=False) if state.json else screen.event(event))


# peers


@peer.command(name="add", help=asks("peer.add"))
@click.argument("card")
@pass_state
def peer_add(state: State, card: str) -> None:
    if card.strip().startswith("fedpeer-card-"):
        text = card
    elif card == "-" or Path(card).is_file():
        text = _read(card)
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


@peer.command(name="remove", help=asks("peer.remove"))
@ref("peer")
@yes
@pass_state
def peer_remove(state: State, ref: str, yes: bool) -> None:
    client = state.client()
    found = client.call("peer.show", ref=ref)
    _confirm(f"take {found['name']} ({found['id']}) off the roster?", yes)
    state.show(client.call("peer.remove", ref=found["id"]), f"removed {found['name']}")


# datasets


@dataset.command(name="add", help=asks("dataset.add"))
@click.argument("name")
@click.argument("uri")
@click.option("--id", "id_", metavar="COLUMN", help="The column that tells whose row it is.")
@click.option("--label", metavar="COLUMN", help="The column to be predicted.")
@click.option("--text", metavar="COLUMN", multiple=True, help="A column that is text though it looks like numbers.")
@pass_state
def dataset_add(state: State, name: str, uri: str, id_: str | None, label: str | None, text: tuple[str, ...]) -> None:
    where = uri if "://" in uri else str(Path(uri).absolute())  # the daemon's folder is another
    view = state.client().call("dataset.add", name=name, uri=where, id=id_, label=label, text=list(text))
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


@dataset.command(name="remove", help=asks("dataset.remove"))
@ref("dataset")
@yes
@pass_state
def dataset_remove(state: State, ref: str, yes: bool) -> None:
    client = state.client()
    found = client.call("dataset.show", ref=ref)
    _confirm(f"forget the dataset {found['name']} ({found['uri']})?", yes)
    state.show(client.call("dataset.remove", ref=found["name"]), f"removed {found['name']}; its file stays")


# jobs


@job.command(name="submit", help=asks("job.submit"))
@click.argument("file")
@pass_state
def job_submit(state: State, file: str) -> None:
    view = state.client().call("job.submit", text=_read(file))
    state.show(view, view["id"])
    if not state.json:
        me = next(p["name"] for p in view["participants"] if p["alias"] == view["me"])
        if waiting := [name for name in view["waiting_for"] if name != me]:
            click.echo(f"it waits for {screen.clean(waiting)}", err=True)
        for stage in view["stages"]:
            if stage["sums"]:
                click.echo(f"sums of {stage['id']}: {screen.protection(stage['sums'])}", err=True)
        click.echo(f"follow it with: fedpeer job watch {view['id'][: screen.SHORT]}", err=True)


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
    _confirm(f"end the job {found['name']} ({found['id'][: screen.SHORT]}) for all its participants?", yes)
    view = client.call("job.cancel", ref=found["id"])
    state.show(view, f"{view['state']} {view['name']}")


# models


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


# small things


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _view(client: Client, id_: str) -> dict[str, Any]:
    view: dict[str, Any] = client.call("job.show", ref=id_)
    return view


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _read(file: str) -> str:
    """The text of a file, or of standard input for "-". Raises UsageError."""
    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_INPUT + 1)
        else:
            with Path(file).open("rb") as opened:
                data = opened.read(MAX_INPUT + 1)
        if len(data) > MAX_INPUT:
            raise UsageError(f"{file} has more than {MAX_INPUT} bytes")
        return data.decode()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not text") from None


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"not without being asked: {question}", hint="--yes answers it")
    click.confirm(question[0].upper() + question[1:], abort=True, err=True)


def _exit_code(view: dict[str, Any]) -> int:
    """How a job ended: 0 done, 6 refused by a policy, else 1."""
    if view["state"] == "done":
        return 0
    kind = by_code((view.get("error") or {}).get("code", ""))
    return PolicyError.exit_code if issubclass(kind, PolicyError) else JobError.exit_code


# the entry point


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. (`… | head`: click ends the process quietly, with 1.)"""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        code = cli.main(given, prog_name="fedpeer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except FedpeerError as error:
        return _tell(error.code, error.message, error.hint, error.exit_code, as_json)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"{error.ctx.command_path} --help"
        if isinstance(error, click.exceptions.NoArgsIsHelpError) and not as_json:
            error.show()
            return error.exit_code
        return _tell("usage", error.format_message(), hint, error.exit_code, as_json)
    except click.Abort:  # also what click makes of an interrupt
        return _tell("interrupted", "interrupted", "", INTERRUPTED, as_json)


def _tell(code: str, message: str, hint: str, exit_code: int, as_json: bool) -> int:
    if as_json:
        error = {"code": code, "message": message, "hint": hint}
        click.echo(json.dumps({"v": 1, "ok": False, "error": error}, ensure_ascii=False))
    else:
        click.echo(f"fedpeer: {message}" + (f"\n  hint: {hint}" if hint else ""), err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
