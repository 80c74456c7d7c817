"""The data owner's story, as a data owner runs it; whatever it starts must be gone at the end, however it ends."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import demo_sandbox
import pytest
import test_demo
from test_demo import Run

folder = test_demo.folder  # a fixture
STORY = Path(demo_sandbox.__file__)


@pytest.mark.system  # half a minute
def test_the_owner_decides_all_is_recorded_and_nothing_is_left(folder: Path) -> None:
    run = Run(folder, "--json", script=STORY)
    assert run.end() == 0, run.said
    result = json.loads(run.lines[-1])
    assert 5 < result.pop("seconds") < 120
    assert result == {
        "first_job": "refused",
        "reason": "hospital-north does not allow it",
        "second_job": "done",
        "epsilon_spent": 0.8,
        "audits_verified": 3,
        "tampering_found": True,
    }
    said = " ".join(run.said.split())
    for text in (
        "error hospital-north does not allow it (policy)",
        "why=the policy: describe: min_cell = 1 in the contract, min_cell = 10",
        "registry 0 of 1",
        "reads patients: 148 rows; 2 columns: age, bmi",
        "privacy epsilon 0.8, delta 1e-08",
        "the first job of registry that is to be approved here",
        "patients registry 0.8 2.2",
        "is not what it was when it was appended",
    ):
        assert text in said
    assert run.left == run.files == []


@pytest.mark.system  # three stories
@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (signal.SIGINT, "each has patients", 130),
        (signal.SIGINT, "job submit every-patient", 130),  # while a command of the story waits
        (signal.SIGTERM, "approved with-noise", 143),
    ],
)
def test_an_interrupted_story_leaves_nothing(folder: Path, number: int, words: str, code: int) -> None:
    run = Run(folder, "--json", script=STORY)
    run.until(words)
    run.signal(number)
    assert run.end() == code, run.said
    assert run.left == run.files == []


def test_one_byte_of_one_entry_is_changed_and_it_can_still_be_read() -> None:
    lines = [b'{"number":%d,"entry":"%s","nodes":"AAAA"}\n' % (number, b"AbBc" * 20) for number in range(1, 31)]
    log = b"".join([b'{"head":"AbBc"}\n', *lines])
    for number in (1, 2, 12, 30):
        changed = demo_sandbox.with_a_byte_changed(log, number)
        assert len(changed) == len(log)
        (at,) = (i for i, (one, other) in enumerate(zip(log, changed, strict=True)) if one != other)
        assert log[:at].count(b"\n") == number
        entry = json.loads(changed.splitlines()[number])
        assert (entry["number"], entry["entry"].isalpha(), entry["nodes"]) == (number, True, "AAAA")


def test_what_the_story_cannot_do_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo sandbox", "--kill"])
    with pytest.raises(SystemExit) as ended:
        demo_sandbox.main()
    assert ended.value.code == 2
    assert "usage: demo sandbox" in capsys.readouterr().err
