"""`fedpeer audit verify` and `fedpeer model verify`: offline, with public keys only; exit code and words tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fedpeer import cli, codec
from fedpeer.crypto import Secret
from fedpeer.errors import AuditBroken
from fedpeer.governance import audit, export, heads, passport, tree
from fedpeer.governance.export import Line
from fedpeer.governance.heads import Cosign, SignedHead
from fedpeer.identity import Identity
from fedpeer.mesh import records

ALICE, BOB = (Identity(Secret(name.ljust(32))) for name in (b"alice", b"bob"))
JOB = b"j" * 32
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("FEDPEER_HOME", str(tmp_path / "nobody-is-here"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def signed(signer: Identity, kind: str, slot: str, body: bytes) -> bytes:
    return records.sign(signer.signing, records.Record(JOB, kind, slot, signer.id, body)).raw


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """An exported log of ten entries, co-signed up to the eighth."""
    grown, entries, statements = tree.Growing(), [], []
    for number in range(1, 11):
        body = codec.encode(audit.Entry(number, "t", "happened", JOB, {}, bytes(16)))
        entries.append(Line(number=number, entry=body, nodes=b"".join(grown.add(tree.leaf(number, body)))))
        if number == 8:
            head = SignedHead(8, grown.root(), 0)
            cosign = Cosign(((ALICE.id, 8, grown.root()),))
            statements = [
                Line(head=signed(ALICE, heads.HEAD, "ended", codec.encode(head))),
                Line(cosign=signed(BOB, heads.COSIGN, "0", codec.encode(cosign))),
            ]
    cards = [Line(card=ALICE.card("alice").text), Line(card=BOB.card("bob").text)]
    path = tmp_path / "alice.log"
    path.write_bytes(export.lines([Line(fedpeer_audit=1, owner=ALICE.id), *cards, *statements, *entries]))
    return path


def redact(log: Path, *numbers: int) -> Path:
    lines = [msgspec.json.decode(line, type=Line) for line in log.read_bytes().splitlines()]
    shown = [msgspec.structs.replace(line, entry=b"") if line.number in numbers else line for line in lines]
    path = log.with_name("redacted.log")
    path.write_bytes(export.lines(shown))
    return path


def test_hidden_entries_are_counted_and_their_hashes_hold_as_they_do(run: Run, log: Path) -> None:
    code, out, _ = run("audit", "verify", str(redact(log, *range(1, 11))))
    assert code == 0
    assert "all 10 entries are as they were appended, 10 of them hidden; co-signed up to entry 8" in out
    assert "3 of them hidden" in run("audit", "verify", str(redact(log, 2, 5, 9)))[1]
    assert "hidden" not in run("audit", "verify", str(log))[1]


@pytest.mark.parametrize("number", [1, 2, 7, 8])
def test_a_hidden_entry_cannot_be_another_one_or_be_left_out(run: Run, log: Path, number: int) -> None:
    path = redact(log, *range(1, 11))
    lines = [msgspec.json.decode(line, type=Line) for line in path.read_bytes().splitlines()]
    at = next(i for i, line in enumerate(lines) if line.number == number)
    nodes = lines[at].nodes
    for other in ([], [bytes([nodes[0] ^ 1]) + nodes[1:]], [b""]):
        changed = [msgspec.structs.replace(lines[at], nodes=nodes) for nodes in other]
        path.write_bytes(export.lines([*lines[:at], *changed, *lines[at + 1 :]]))
        assert run("audit", "verify", str(path))[0] != 0


def test_a_hidden_entry_has_a_hash() -> None:
    for nodes in (b"", bytes(31), bytes(33)):
        with pytest.raises(AuditBroken, match="entry 1 is not what it was"):
            audit.Checker({}).add(1, b"", nodes)


def test_a_log_that_is_whole_says_who_signed_it(run: Run, log: Path) -> None:
    code, out, err = run("audit", "verify", str(log))
    assert (code, err) == (0, "")
    assert "alice: all 10 entries are as they were appended; co-signed up to entry 8 by" in out
    assert f"bob ({BOB.id}, up to 8" in out
    (told,) = json.loads(run("audit", "verify", str(log), "--json")[1])["data"]
    assert (told["entries"], told["signed"]) == (10, 8)
    assert run("audit", "verify", str(log), "--signer", BOB.id)[0] == 0
    assert run("audit", "verify", str(log), "--signer", BOB.card("bob").text)[0] == 0
    code, _, err = run("audit", "verify", str(log), "--signer", "fp1other")
    assert (code, "is not co-signed by fp1other" in err) == (1, True)


def test_one_flipped_byte_names_the_entry_and_fails(run: Run, log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    fifth = msgspec.json.decode(lines[9], type=Line)
    changed = Line(number=5, entry=fifth.entry.replace(b"happened", b"happenee"), nodes=fifth.nodes)
    log.write_bytes(b"".join([*lines[:9], export.lines([changed]), *lines[10:]]))
    code, out, err = run("audit", "verify", str(log))
    assert (code, out) == (1, "")
    assert f"{log}, the log of alice: entry 5 is not what it was when it was appended" in err
    assert json.loads(run("audit", "verify", str(log), "--json")[1])["error"]["code"] == "audit"
    log.write_bytes(b"".join([*lines[:9], b"{\n", *lines[10:]]))
    code, _, err = run("audit", "verify", str(log))
    assert (code, err.count(str(log)), "line 10: entry 5 cannot be read" in err) == (1, 1, True)


def test_what_is_no_log_is_refused_with_a_remedy(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"\xff\n" * 3)
    code, _, err = run("audit", "verify", str(tmp_path / "other"))
    assert (code, "is no audit log" in err, "fedpeer audit export" in err) == (1, True, True)
    (tmp_path / "long").write_bytes(b"x" * 10_000_000)
    assert "longer than" in run("audit", "verify", str(tmp_path / "long"))[2]
    (tmp_path / "empty").touch()
    assert "fedpeer audit export" in run("audit", "verify", str(tmp_path / "empty"))[2]
    assert run("audit", "verify", str(tmp_path / "none"))[0] == 2
    assert run("audit", "verify")[0] == 3, "without a file the daemon is asked"


def test_a_passport_that_is_not_signed_by_all_fails_and_names_who_is_missing(run: Run, tmp_path: Path) -> None:
    made = passport.Passport(
        contract=JOB.hex(), job="breast", purpose="", initiator="a", participants={"a": ALICE.id, "b": BOB.id},
        stage="fit", output="model", run="x", declaration="", params={}, contributors=["a", "b"], rounds=1, history="",
        sums=[], sums_left_out=0, epsilon=None, delta=None, model="cd", algorithm="x", metrics={}, metrics_left_out=0,
    )  # fmt: skip
    body = passport.digest(passport.document(made))
    raws = [signed(one, passport.PASSPORT, "fit.model", body) for one in (ALICE, BOB)]
    cards = [ALICE.card("alice").text, BOB.card("bob").text]
    path = tmp_path / "passport.json"
    for signatures, code, text in ((raws, 0, "signed by all"), (raws[:1], 1, "not signed by b")):
        file = passport.File(fedpeer_passport=1, passport=made, cards=cards, signatures=signatures)
        path.write_text(json.dumps(msgspec.to_builtins(file), indent=1))
        found, out, err = run("model", "verify", str(path))
        assert (found, text in out + err) == (code, True)
    path.write_text(path.read_text().replace('"rounds": 1', '"rounds": 2'))
    code, _, err = run("model", "verify", str(path))
    assert (code, "this one was altered" in err) == (1, True)
