"""The command line: noun, verb. It reads the operator's words, asks the daemon, and shows the answer.

Rules
* `--json` anywhere: one envelope on stdout, {"v": 1, "ok": true, "data": …} or {"v": 1, "ok": false, "error": {code,
  message, hint}}; streams are one JSON object a line, the last of a job with "terminal": true. Without it, errors go to
  stderr with a hint.
* Exit codes: 0 done; 1 it failed, or the job did; 2 usage; 3 the daemon is not reachable; 4 not authorized on its
  socket; 5 not found; 6 refused by a policy; 7 timed out; 130 interrupted.
* What destroys something asks first; --yes answers; without a terminal and --yes it is refused.
* The help of a verb that the daemon carries out is that of the table of commands (admin/commands.py).

The tree of nouns and what all verbs share is here; a module of its own has the verbs of each noun.

Heavy modules (identities, the daemon) are imported by the verbs that need them, so that the others start at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from fedpeer import config
from fedpeer.admin.client import Client
from fedpeer.admin.commands import COMMANDS
from fedpeer.errors import FedpeerError, UsageError

MAX_INPUT = 256 * 1024
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


def read_input(file: str) -> str:
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


def confirm(question: str, yes: bool) -> None:
    """Ask before something is destroyed. Raises UsageError without a terminal and without --yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"not without being asked: {question}", hint="--yes answers it")
    click.confirm(question[0].upper() + question[1:], abort=True, err=True)
