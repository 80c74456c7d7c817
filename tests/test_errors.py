"""One tree of errors, each with a stable code and a text for people."""

from __future__ import annotations

from fedpeer import errors
from fedpeer.errors import FedpeerError


def tree() -> list[type[FedpeerError]]:
    classes = [FedpeerError]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    return [cls for cls in classes if cls.__module__ == errors.__name__]


def test_every_error_has_a_code_of_its_own_and_a_text() -> None:
    codes = [cls.__dict__.get("code") for cls in tree()]
    assert None not in codes
    assert len(set(codes)) == len(codes)
    assert not [cls for cls in tree() if not cls().message.strip().endswith((".", "follows."))]


def test_every_error_ends_the_command_line_with_a_documented_code() -> None:
    assert {cls.exit_code for cls in tree()} == {1, 2, 3, 4, 5, 6, 7}


def test_an_error_is_found_by_its_code_and_an_unknown_code_is_the_root() -> None:
    assert all(errors.by_code(cls.code) is cls for cls in tree())
    assert errors.by_code("of a later release") is FedpeerError
