"""The gate: what a stage has declared may leave, and nothing else.

The daemon asks it before anything of a worker goes out. It sees tags, receivers, sizes and dtypes, not meanings: what
a number says about a row is the stage's own duty, stated in its declaration.

Rules
* A message leaves if its tag is declared, for my role as the sender and the other's role as the receiver, it is a
  well-formed message value of at most the declared size, and at most `per_turn` of them went to this receiver in this
  turn. Sums and agreed values: at most `per_turn` of a tag in a turn.
* The vector of a sum is the encoding its layout says (secure/fixedpoint.py), every element in range, and the layout
  uses the codecs that are declared.
* A closed gate is GateClosed: nothing was sent, and the job fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedpeer import codec
from fedpeer.codec import Buffer
from fedpeer.errors import FedpeerError, GateClosed
from fedpeer.secure import fixedpoint
from fedpeer.stage import Agreed, Open, Sealed, Stage, Sum

MAX_AGREED_BYTES = 64 << 20


class Gate:
    """For one stage at one participant. `roles`: alias → role of all who take part in it; `me`: my alias."""

    def __init__(self, stage: Stage, roles: Mapping[str, str], me: str) -> None:
        self._stage, self._roles, self._me = stage, dict(roles), me
        self._used: Counter[tuple[str, str]] = Counter()

    def turn(self, _n: int) -> None:
        """A turn begins, or begins again: what is counted by turn starts at 0."""
        self._used.clear()

    def send(self, to: str, tag: str, header: bytes, buffers: Sequence[Buffer]) -> None:
        """A message to another participant."""
        message = self._message(tag, Sealed | Open, "send")
        self._between(tag, message, self._me, to)
        size = len(header) + sum(memoryview(buffer).nbytes for buffer in buffers)
        if size > message.max_bytes:
            raise GateClosed(f"{self._name(tag)} is {size} bytes, where at most {message.max_bytes} are declared")
        try:
            codec.unpack_value(header, buffers)
        except FedpeerError as error:
            raise GateClosed(f"{self._name(tag)} is not a message value: {error.message}") from None
        self._count(tag, to, message.per_turn)

    def receive(self, sender: str, tag: str) -> None:
        """A wish to receive. Nothing leaves by it; asking for what is never sent would wait for ever."""
        self._between(tag, self._message(tag, Sealed | Open, "receive"), sender, self._me)

    def sum(self, tag: str, layout: Any, vector: Any) -> None:
        """A contribution to a secure sum."""
        message = self._message(tag, Sum, "sum")
        try:
            fixedpoint.check(layout, vector, message.codecs)
        except FedpeerError as error:
            raise GateClosed(f"{self._name(tag)} is not what a sum takes: {error.message}") from None
        self._count(tag, "", message.per_turn)

    def agree(self, tag: str, size: int) -> None:
        """A value proposed to all."""
        message = self._message(tag, Agreed, "agree on")
        if size > MAX_AGREED_BYTES:
            raise GateClosed(f"{self._name(tag)} is {size} bytes, where at most {MAX_AGREED_BYTES} are allowed")
        self._count(tag, "", message.per_turn)

    def _message(self, tag: str, kind: Any, verb: str) -> Any:
        message = self._stage.messages.get(tag)
        if not isinstance(message, kind):
            what = "is not declared" if message is None else f"is declared as {message.kind}"
            raise GateClosed(f"{self._stage.name} wanted to {verb} {tag!r}, which {what}")
        return message

    def _between(self, tag: str, message: Sealed | Open, sender: str, receiver: str) -> None:
        if sender == receiver or sender not in self._roles or receiver not in self._roles:
            raise GateClosed(f"{self._name(tag)} from {sender!r} to {receiver!r}: not two participants of this stage")
        roles = self._roles[sender], self._roles[receiver]
        if roles != (message.sender, message.receiver):
            raise GateClosed(
                f"{self._name(tag)} is declared from {message.sender} to {message.receiver}, "
                f"not from {roles[0]} to {roles[1]}"
            )

    def _count(self, tag: str, to: str, most: int) -> None:
        self._used[tag, to] += 1
        if self._used[tag, to] > most:
            raise GateClosed(f"{self._name(tag)} may leave {most} times in a turn, and this is one more")

    def _name(self, tag: str) -> str:
        return f"{self._stage.name}, message {tag!r}"
