"""The command line. tree.py has its rules; a module for each noun has its verbs; `main` is the entry point."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click

from fedpeer.cli import (  # noqa: F401 - each adds its verbs to the tree
    approvals,
    audits,
    budgets,
    datasets,
    here,
    jobs,
    models,
    peers,
    policies,
)
from fedpeer.cli.tree import cli
from fedpeer.errors import FedpeerError

INTERRUPTED = 130


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
