"""The log: one structured line for each thing that happened, and no value from anybody's data in it.

Rules
* What is written is an allow-list: an event whose text is a constant of the program, and the keys of `ALLOWED`. Any
  other key is dropped, and its name (not its value) is told in "dropped". A value that is not a plain number, word or
  flag becomes the name of its type; a long one is cut.
* The text of an exception is never written, for it may quote a row of a table. What is written is its type, the stable
  code of our own errors, and the places it went through. The text goes to the operator who asked (admin socket).
* Where it goes is decided once: the journal's own fields when stderr is the journal (`journalctl FEDPEER_JOB=…`),
  lines for people on a terminal, else one JSON object a line; always on stderr.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import Any

import structlog

from fedpeer.errors import FedpeerError

ALLOWED = frozenset(
    """
    event level timestamp dropped error trace code
    peer name remote address addresses listen source channel reason
    contract job job_event scope stage algorithm run turn round of k role tag kind slot sender receiver seq
    attempt restarts state version digest survivors parties
    bytes size rows count duration_s delay_s signal
    pid uid command method path status socket
    """.split()
)
MAX_TEXT = 200
MAX_FRAMES = 24
JOURNAL = "/run/systemd/journal/socket"
PRIORITY = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}

EventDict = MutableMapping[str, Any]


def configure(level: str = "info") -> None:
    """Set up structlog for this process: `level` is debug, info, warning or error."""
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        describe_exception,
        allow_list,
    ]
    factory: Any = structlog.PrintLoggerFactory(sys.stderr)
    if _stderr_is_journal():
        processors.append(_journal_fields)
        factory = JournalLogger
    elif sys.stderr.isatty():
        processors.append(structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ))
    else:
        processors.append(structlog.processors.JSONRenderer(sort_keys=True))
    structlog.configure(
        processors=processors,
        logger_factory=factory,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        cache_logger_on_first_use=False,  # a test or a second configure() must not meet the first one's stderr
    )


def allow_list(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Keep the allowed keys with plain, short values; tell the names of the others."""
    dropped = sorted(str(key) for key in event if key not in ALLOWED)
    kept: EventDict = {key: _plain(value) for key, value in event.items() if key in ALLOWED and key != "trace"}
    if "trace" in event:
        kept["trace"] = event["trace"]
    if dropped:
        kept["dropped"] = ",".join(dropped)
    return kept


def describe_exception(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Replace exc_info by "error" (type and place), "code" (of our own errors) and "trace": never the text."""
    given = event.pop("exc_info", None)
    for reserved in ("error", "trace"):  # only this function writes them: nobody passes an exception's text in there
        event.pop(reserved, None)
    error = given[1] if isinstance(given, tuple) else sys.exc_info()[1] if given is True else given
    if isinstance(error, BaseException):
        event["error"] = type(error).__name__
        if isinstance(error, FedpeerError):
            event["code"] = error.code
        event["trace"] = "\n".join(_trace(error, ""))
    return event


def _trace(error: BaseException, indent: str) -> list[str]:
    lines = [f"{indent}{type(error).__name__}", *(f"{indent}  {place}" for place in _places(error.__traceback__))]
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions[:4]:
            lines += _trace(inner, indent + "  | ")
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and len(indent) < 16:
        lines += _trace(cause, indent + "  < ")
    return lines


def _places(trace: TracebackType | None) -> list[str]:
    places = []
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{'/'.join(code.co_filename.split('/')[-3:])}:{trace.tb_lineno} in {code.co_name}")
        trace = trace.tb_next
    return places[-MAX_FRAMES:]


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        return value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "…"
    return f"<{type(value).__name__}>"


# the journal


def _stderr_is_journal() -> bool:
    named = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


def _journal_fields(_logger: Any, _method: str, event: EventDict) -> tuple[tuple[dict[str, Any]], dict[str, Any]]:
    fields: dict[str, Any] = {
        "MESSAGE": event.pop("event", ""),
        "PRIORITY": PRIORITY.get(event.pop("level", "info"), 6),
        "SYSLOG_IDENTIFIER": "fedpeer",
    }
    event.pop("timestamp", None)  # the journal has its own
    fields |= {f"FEDPEER_{key.upper()}": value for key, value in event.items()}
    return (fields,), {}


class JournalLogger:
    """A structlog logger that sends native journal records; falls back to JSON lines when one is not accepted."""

    def __init__(self, *_args: Any, path: str = JOURNAL) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def msg(self, fields: Mapping[str, Any]) -> None:
        try:
            self._socket.sendto(encode_record(fields), self._path)
        except OSError:
            print(json.dumps(dict(fields), default=str), file=sys.stderr, flush=True)

    debug = info = warning = error = critical = msg


def encode_record(fields: Mapping[str, Any]) -> bytes:
    """A record of the journal's native protocol: KEY=value, or length-prefixed when the value has a line feed."""
    record = bytearray()
    for key, value in fields.items():
        data = str(value).encode()
        if b"\n" in data:
            record += key.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            record += key.encode() + b"=" + data + b"\n"
    return bytes(record)
