"""The log says what happened and never a value of anybody's data, in whatever form it is offered."""

from __future__ import annotations

import ast
import base64
import json
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

import fedpeer
from fedpeer import log
from fedpeer.crypto import Secret
from fedpeer.errors import DataError

METHODS = {"debug", "info", "warning", "error", "exception", "critical"}


@pytest.fixture(autouse=True)
def fresh_structlog(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    yield
    structlog.reset_defaults()


def forms(canary: bytes) -> list[str]:
    number = int.from_bytes(canary, "big")
    return [canary.hex(), base64.b64encode(canary).decode(), str(number), repr(canary), repr(number / 7)]


def test_no_form_of_a_value_reaches_the_log(capsys: pytest.CaptureFixture[str], seed: int) -> None:
    log.configure("debug")
    logger = structlog.get_logger()
    canaries = [random.Random(seed + i).randbytes(12) for i in range(200)]
    for canary in canaries:
        logger.info(
            "a row was read", row=canary, table=np.frombuffer(canary, np.uint8), age=int.from_bytes(canary, "big")
        )
        logger.info("a key was made", key=canary.hex(), peer=Secret(canary), round=canary, reason={"x": canary.hex()})
        for form in forms(canary):
            logger.info("a cell", value=form, text=form, error=form, trace=form)
            try:
                try:
                    raise ValueError(f"cannot read {form}")
                except ValueError as error:
                    raise DataError(f"row 3: {form}") from error
            except DataError as error:
                logger.exception("the table could not be read")
                logger.error("once more", exc_info=error)
                logger.error("and in a group", exc_info=ExceptionGroup(form, [error, KeyError(form)]))
    written = capsys.readouterr().err
    assert written.count("\n") == 200 * (2 + 5 * 4)
    assert sum(form in written for canary in canaries for form in forms(canary)) == 0


def test_an_exception_is_told_by_type_code_and_places(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    try:
        try:
            int("secret")
        except ValueError as error:
            raise DataError("secret") from error
    except DataError:
        structlog.get_logger().exception("the table could not be read", job="ab12")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["error"], line["code"], line["job"]) == (
        "the table could not be read", "DataError", "data", "ab12",
    )  # fmt: skip
    assert "test_log.py" in line["trace"]
    assert "ValueError" in line["trace"]


def test_a_key_that_is_not_allowed_is_named_and_its_value_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    structlog.get_logger().info("hello", peer="fp1a", salary=70000, name="x" * 500)
    line = json.loads(capsys.readouterr().err)
    assert (line["peer"], line["dropped"]) == ("fp1a", "salary")
    assert len(line["name"]) == log.MAX_TEXT + 1


def test_the_level_is_respected(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("warning")
    structlog.get_logger().info("not this")
    structlog.get_logger().warning("this")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["this"]


def test_what_happened_is_never_a_text_built_from_values() -> None:
    wrong = []
    for path in Path(fedpeer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                owner = node.func.value
                name = (
                    owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                )
                if name.strip("_") in ("log", "logger") and not (
                    node.args and isinstance(node.args[0], ast.Constant | ast.Name)
                ):
                    wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong, "an f-string in a log call may carry anything; put values under an allowed key"


def test_a_journal_record_has_fields_and_survives_line_feeds(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        fields = log._journal_fields(None, "", {"event": "a\nb", "level": "warning", "timestamp": "t", "job": "ab"})[0][
            0
        ]
        log.JournalLogger(path=path).warning(fields)
        record = journal.recv(65536)
    assert record == (
        b"MESSAGE\n\x03\x00\x00\x00\x00\x00\x00\x00a\nb\nPRIORITY=4\nSYSLOG_IDENTIFIER=fedpeer\nFEDPEER_JOB=ab\n"
    )


def test_stderr_is_the_journal_only_when_it_is_the_very_stream(tmp_path: Path) -> None:
    code = "import sys; from fedpeer import log; sys.exit(log._stderr_is_journal())"
    with (tmp_path / "stream").open("wb") as stream:
        status = os.fstat(stream.fileno())
        for named, expected in ((f"{status.st_dev}:{status.st_ino}", 1), (f"{status.st_dev}:1", 0), ("", 0)):
            done = subprocess.run(
                [sys.executable, "-c", code], stderr=stream, env={"JOURNAL_STREAM": named}, check=False
            )
            assert done.returncode == expected


def test_a_lost_journal_does_not_lose_the_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log.JournalLogger(path=str(tmp_path / "nobody")).info({"MESSAGE": "still here"})
    assert "still here" in capsys.readouterr().err


def test_configuring_again_moves_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    bound = structlog.get_logger().bind(peer="a")
    thread = threading.Thread(target=lambda: bound.info("from a thread"))
    thread.start()
    thread.join()
    assert json.loads(capsys.readouterr().err)["peer"] == "a"
