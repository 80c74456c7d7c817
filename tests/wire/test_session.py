"""Two sessions joined in memory: no socket, no clock, no mock."""

from __future__ import annotations

from random import Random

import pytest

from fedpeer.errors import LocalProtocolError, RemoteProtocolError, SessionError
from fedpeer.wire import session as module
from fedpeer.wire.constants import (
    BULK_CHANNELS,
    BULK_WINDOW,
    CONTROL_CHANNELS,
    CONTROL_WINDOW,
    FRAME_COST,
    KEEPALIVE_S,
    MAX_HEADER,
    MAX_PAYLOAD,
    PROLOGUE,
    REKEY_BYTES,
    REKEY_S,
    SILENCE_S,
)
from fedpeer.wire.frames import Credit, Data, Head, Open, Ping, Pong, Rekey, build
from fedpeer.wire.noise import Cipher
from fedpeer.wire.session import BATCH, MAX_FRAME, Answered, Event, Message, Room, Session

ONE, TWO = bytes([1]) * 32, bytes([2]) * 32
RECORDS = ("records",)


class Pair:
    """alice and bob, and the bytes between them."""

    def __init__(self) -> None:
        self.alice = Session(Cipher(ONE), Cipher(TWO), now=0.0)
        self.bob = Session(Cipher(TWO), Cipher(ONE), now=0.0)
        self.now = 0.0

    def pump(self, sender: Session, receiver: Session, *, size: int = 1 << 30) -> list[Event]:
        """All that sender wants to send, in parts of `size` bytes; what came out of it. Nothing is handled."""
        events: list[Event] = []
        while data := bytes(sender.data_to_send(self.now)):
            events += feed(receiver, data, self.now, size=size)
        return events

    def settle(self) -> list[tuple[object, bytes, bytes]]:
        """Everything is delivered and handled, both ways, until nothing moves; what came to either."""
        came = []
        moving = True
        while moving:
            moving = False
            for sender, receiver in ((self.alice, self.bob), (self.bob, self.alice)):
                for event in self.pump(sender, receiver):
                    moving = True
                    if isinstance(event, Message):
                        came += texts([event])
                        receiver.handled(event)
        return came


def feed(receiver: Session, data: bytes, now: float, *, size: int = 1 << 30) -> list[Event]:
    events: list[Event] = []
    position = 0
    while position < len(data):
        buffer = receiver.buffer
        count = min(len(buffer), len(data) - position, size)
        buffer[:count] = data[position : position + count]
        events += receiver.received(count, now)
        position += count
    return events


class Mallory:
    """A member who holds the keys and sends what it likes."""

    def __init__(self) -> None:
        self.cipher = Cipher(ONE)
        self.bob = Session(Cipher(TWO), Cipher(ONE), now=0.0)

    def send(self, *frames: Head | bytes, payload: bytes = b"") -> list[Event]:
        events: list[Event] = []
        for frame in frames:
            sealed = self.cipher.seal((frame if isinstance(frame, bytes) else build(frame)) + payload)
            events += feed(self.bob, len(sealed).to_bytes(2, "big") + sealed, 0.0)
        return events


def texts(events: list[Event]) -> list[tuple[object, bytes, bytes]]:
    return [(e.name, e.header, bytes(e.payload)) for e in events if isinstance(e, Message)]


def test_a_stream_may_be_split_at_every_byte() -> None:
    pair = Pair()
    sent = [(RECORDS, b"1", b"one"), (("mail", b"\x00", 3), b"", b"two"), (RECORDS, b"3", b"x" * 5000)]
    for name, header, payload in sent:
        assert pair.alice.send(name, header, payload, bulk=False)
    stream = bytes(pair.alice.data_to_send(0.0))
    for cut in range(len(stream) + 1):
        bob = Session(Cipher(TWO), Cipher(ONE), now=0.0)
        assert texts(feed(bob, stream[:cut], 0.0) + feed(bob, stream[cut:], 0.0)) == sent
    bob = Session(Cipher(TWO), Cipher(ONE), now=0.0)
    assert texts(feed(bob, stream, 0.0, size=1)) == sent


def test_every_truncation_and_every_changed_byte_gives_less_and_never_other() -> None:
    pair = Pair()
    sent = [(RECORDS, bytes([n]), b"payload" * n) for n in range(5)]
    for name, header, payload in sent:
        pair.alice.send(name, header, payload, bulk=False)
    stream = bytes(pair.alice.data_to_send(0.0))
    for position in range(len(stream)):
        bob = Session(Cipher(TWO), Cipher(ONE), now=0.0)
        came = texts(feed(bob, stream[:position], 0.0))
        assert came == sent[: len(came)]
        assert len(came) < len(sent)
        bob = Session(Cipher(TWO), Cipher(ONE), now=0.0)
        changed = bytearray(stream)
        changed[position] ^= 0x40
        try:
            came = texts(feed(bob, bytes(changed), 0.0))
        except RemoteProtocolError:
            continue
        assert came == sent[: len(came)]  # a length that grew: it waits for more
        assert len(came) < len(sent)


def test_a_repeated_or_reordered_frame_is_refused() -> None:
    pair = Pair()
    frames = []
    for n in range(3):
        pair.alice.send(RECORDS, b"", bytes([n]), bulk=False)
        frames.append(bytes(pair.alice.data_to_send(0.0)))
    for order in ((0, 0), (1,), (0, 2), (0, 1, 1)):
        bob = Session(Cipher(TWO), Cipher(ONE), now=0.0)
        with pytest.raises(RemoteProtocolError):
            feed(bob, b"".join(frames[n] for n in order), 0.0)


def test_messages_of_all_sizes_arrive_whole_and_in_order(seed: int) -> None:
    random = Random(seed)
    pair = Pair()
    sent: dict[bool, list[bytes]] = {False: [], True: []}
    came: dict[bool, list[bytes]] = {False: [], True: []}
    for _ in range(400):
        bulk = random.random() < 0.5
        payload = random.randbytes(random.choice([0, 1, 4095, 4096, MAX_PAYLOAD, random.randrange(MAX_PAYLOAD)]))
        while not pair.alice.send(RECORDS, b"", payload, bulk=bulk):
            for event in pair.pump(pair.alice, pair.bob, size=random.choice([1 << 20, 70_000, 9_999])):
                if isinstance(event, Message):
                    came[event.channel >= CONTROL_CHANNELS].append(bytes(event.payload))
                    pair.bob.handled(event)
            pair.pump(pair.bob, pair.alice)
        sent[bulk].append(payload)
    for event in pair.pump(pair.alice, pair.bob):
        assert isinstance(event, Message)
        came[event.channel >= CONTROL_CHANNELS].append(bytes(event.payload))
    assert came == sent


def test_control_goes_before_bulk_that_was_queued_earlier() -> None:
    pair = Pair()
    for _ in range(20):
        assert pair.alice.send(("blob", 1), b"", bytes(MAX_PAYLOAD), bulk=True)
    first = feed(pair.bob, bytes(pair.alice.data_to_send(0.0, MAX_FRAME)), 0.0)
    assert [e.name for e in first if isinstance(e, Message)] == [("blob", 1)]
    assert pair.alice.send(RECORDS, b"urgent", bytes(MAX_PAYLOAD), bulk=False)
    then = feed(pair.bob, bytes(pair.alice.data_to_send(0.0, MAX_FRAME)), 0.0)
    assert [e.name for e in then if isinstance(e, Message)] == [RECORDS]


def test_a_large_control_frame_is_not_overtaken_by_a_small_bulk_frame() -> None:
    pair = Pair()
    for n in range(2):
        assert pair.alice.send(RECORDS, bytes([n]), bytes(40_000), bulk=False)
    assert pair.alice.send(("blob", 1), b"", b"small", bulk=True)
    order = []
    while data := bytes(pair.alice.data_to_send(0.0, MAX_FRAME)):
        order += [e.name for e in feed(pair.bob, data, 0.0) if isinstance(e, Message)]
    assert order == [RECORDS, RECORDS, ("blob", 1)]


def test_no_batch_is_longer_than_asked_for_by_more_than_the_small_frames() -> None:
    pair = Pair()
    for _ in range(30):
        assert pair.alice.send(("blob", 1), b"", bytes(MAX_PAYLOAD), bulk=True)
    pair.alice.ping()
    assert MAX_FRAME * 0.9 < len(pair.alice.data_to_send(0.0, MAX_FRAME)) <= MAX_FRAME + 1024
    assert BATCH * 0.8 < len(pair.alice.data_to_send(0.0)) <= BATCH


@pytest.mark.parametrize(("bulk", "window"), [(False, CONTROL_WINDOW), (True, BULK_WINDOW)])
def test_credit_bounds_what_is_under_way_and_comes_back_when_messages_are_handled(bulk: bool, window: int) -> None:
    pair = Pair()
    cost = MAX_HEADER + MAX_PAYLOAD + FRAME_COST
    for _ in range(window // cost):
        assert pair.alice.send(RECORDS, b"h" * MAX_HEADER, bytes(MAX_PAYLOAD), bulk=bulk)
    assert not pair.alice.send(RECORDS, b"", b"", bulk=bulk)
    arrived = [e for e in pair.pump(pair.alice, pair.bob) if isinstance(e, Message)]
    assert len(arrived) == window // cost
    assert not pair.pump(pair.bob, pair.alice)  # nothing was handled: no credit
    handled = 0
    while not pair.bob.wants_to_send:
        pair.bob.handled(arrived[handled])
        handled += 1
    assert handled * cost * 2 >= window  # half a window
    assert pair.pump(pair.bob, pair.alice) == [Room()]
    for _ in range(handled):
        assert pair.alice.send(RECORDS, b"h" * MAX_HEADER, bytes(MAX_PAYLOAD), bulk=bulk)
    assert not pair.alice.send(RECORDS, b"", b"", bulk=bulk)


def test_a_stalled_bulk_channel_does_not_hold_up_control_or_another_bulk_channel() -> None:
    pair = Pair()
    while pair.alice.send(("blob", 1), b"", bytes(MAX_PAYLOAD), bulk=True):
        pass
    pair.pump(pair.alice, pair.bob)
    assert pair.alice.send(("blob", 2), b"", b"x", bulk=True)
    assert pair.alice.send(RECORDS, b"", b"y", bulk=False)
    assert len(texts(pair.pump(pair.alice, pair.bob))) == 2


@pytest.mark.parametrize(("bulk", "numbers"), [(False, CONTROL_CHANNELS), (True, BULK_CHANNELS)])
def test_names_without_number_share_the_numbers_and_the_one_used_longest_ago_makes_place(
    bulk: bool, numbers: int
) -> None:
    pair = Pair()
    for n in range(numbers):
        assert pair.alice.send(("mail", n), b"", bytes([n]), bulk=bulk)
    assert not pair.alice.send(("mail", "new"), b"", b"", bulk=bulk)  # none is idle
    pair.settle()  # all handled; the credit comes without being asked for
    assert pair.alice.send(("mail", 0), b"", b"", bulk=bulk)
    assert pair.alice.send(("mail", "new"), b"", b"new", bulk=bulk)
    assert ("mail", 1) not in {name for name, _ in pair.alice._outgoing}
    for n in range(50):
        pair.settle()
        assert pair.alice.send(("mail", "many", n), bytes([n]), b"", bulk=bulk)
        assert pair.settle() == [(("mail", "many", n), bytes([n]), b"")]
    assert len(pair.alice._outgoing) == numbers
    assert len(pair.bob._incoming) <= numbers


def test_a_name_is_one_channel_for_control_and_another_for_bulk() -> None:
    pair = Pair()
    assert pair.alice.send(RECORDS, b"", b"a", bulk=False)
    assert pair.alice.send(RECORDS, b"", b"b", bulk=True)
    assert len({e.channel for e in pair.pump(pair.alice, pair.bob) if isinstance(e, Message)}) == 2


def test_a_payload_that_changes_after_send_is_sent_as_it_was() -> None:
    pair = Pair()
    payload = bytearray(b"a" * 8000)
    assert pair.alice.send(RECORDS, b"", payload, bulk=False)
    assert pair.alice.send(RECORDS, b"", memoryview(payload)[10:20], bulk=False)
    payload[:] = b"b" * 8000
    assert [p for _, _, p in texts(pair.pump(pair.alice, pair.bob))] == [b"a" * 8000, b"a" * 10]


def test_a_payload_is_bytes_whatever_the_shape_of_the_view() -> None:
    pair = Pair()
    whole = bytes(range(64))
    assert pair.alice.send(RECORDS, b"", memoryview(whole).cast("d", (2, 4)), bulk=False)
    assert pair.alice.send(RECORDS, b"", memoryview(whole)[::2], bulk=False)
    assert [p for _, _, p in texts(pair.pump(pair.alice, pair.bob))] == [whole, whole[::2]]


def test_a_buffer_somebody_still_looks_into_is_not_used_again() -> None:
    pair = Pair()
    assert pair.alice.send(RECORDS, b"", b"a" * 8000, bulk=False)
    (message,) = pair.pump(pair.alice, pair.bob)
    assert isinstance(message, Message)
    kept = message.payload[100:200]
    pair.bob.handled(message)
    assert pair.alice.send(RECORDS, b"", b"b" * 8000, bulk=False)
    (second,) = pair.pump(pair.alice, pair.bob)
    assert isinstance(second, Message)
    assert bytes(kept) == b"a" * 100
    first_buffer = second.buffer
    pair.bob.handled(second)
    with pytest.raises(ValueError, match="released"):
        bytes(second.payload)
    assert pair.alice.send(RECORDS, b"", b"c" * 8000, bulk=False)
    (third,) = pair.pump(pair.alice, pair.bob)
    assert isinstance(third, Message)
    assert third.buffer is first_buffer


def test_a_key_is_renewed_after_ten_minutes_in_both_directions() -> None:
    pair = Pair()
    keys = {
        (session, way): getattr(session, way)._key
        for session in (pair.alice, pair.bob)
        for way in ("_sender", "_receiver")
    }
    pair.now = REKEY_S - 1
    pair.alice.ping()
    pair.settle()
    assert all(getattr(session, way)._key == key for (session, way), key in keys.items())
    pair.now = REKEY_S
    pair.alice.ping()
    pair.settle()
    assert all(getattr(session, way)._key != key for (session, way), key in keys.items())
    assert pair.alice._sender._key == pair.bob._receiver._key
    assert pair.bob._sender._key == pair.alice._receiver._key
    assert pair.alice.send(RECORDS, b"", b"after", bulk=False)
    assert texts(pair.pump(pair.alice, pair.bob)) == [(RECORDS, b"", b"after")]


def test_a_key_is_renewed_after_a_gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REKEY_BYTES == 1 << 30
    monkeypatch.setattr(module, "REKEY_BYTES", 300_000)
    monkeypatch.setattr(module, "MAX_KEY_BYTES", 600_000 + BATCH)
    pair = Pair()
    seen = [pair.alice._sender._key]
    for _ in range(40):
        while not pair.alice.send(RECORDS, b"", bytes(60_000), bulk=True):
            pair.settle()
        pair.settle()
        if pair.alice._sender._key != seen[-1]:
            seen.append(pair.alice._sender._key)
    assert 6 <= len(seen) <= 9
    monkeypatch.setattr(module, "REKEY_BYTES", 1 << 30)

    def go_on() -> None:
        for _ in range(40):
            pair.alice.send(RECORDS, b"", bytes(60_000), bulk=True)
            pair.settle()

    with pytest.raises(RemoteProtocolError, match="one key"):
        go_on()


def test_a_silent_peer_is_asked_and_then_gone() -> None:
    pair = Pair()
    assert pair.alice.tick(0.0) == KEEPALIVE_S
    assert not pair.alice.wants_to_send
    assert pair.alice.tick(KEEPALIVE_S) == SILENCE_S - KEEPALIVE_S
    assert pair.alice.wants_to_send
    pair.now = KEEPALIVE_S
    pair.pump(pair.alice, pair.bob)
    pair.now = KEEPALIVE_S + 1
    assert pair.pump(pair.bob, pair.alice) == [Answered(1.0)]
    assert pair.alice.tick(pair.now) == KEEPALIVE_S
    with pytest.raises(SessionError, match="silent"):
        pair.alice.tick(pair.now + SILENCE_S)


def test_one_ping_serves_all_who_ask() -> None:
    pair = Pair()
    pair.alice.ping()
    pair.alice.ping()
    pair.pump(pair.alice, pair.bob)
    pair.alice.ping()
    assert not pair.alice.wants_to_send
    pair.now = 0.25
    assert pair.pump(pair.bob, pair.alice) == [Answered(0.25)]


def test_a_header_or_payload_above_the_cap_is_our_own_fault() -> None:
    pair = Pair()
    for header, payload in ((b"h" * (MAX_HEADER + 1), b""), (b"", bytes(MAX_PAYLOAD + 1))):
        with pytest.raises(LocalProtocolError):
            pair.alice.send(RECORDS, header, payload, bulk=False)
    with pytest.raises(LocalProtocolError):
        pair.alice.send(("x" * 300,), b"", b"", bulk=False)
    assert pair.alice.send(RECORDS, b"", b"fine", bulk=False)
    assert texts(pair.pump(pair.alice, pair.bob)) == [(RECORDS, b"", b"fine")]


VIOLATIONS: dict[str, list[Head | bytes]] = {
    "data on a channel that is not open": [Data(0, b"")],
    "credit for what was not sent": [Credit(0, 1)],
    "a pong without a ping": [Pong()],
    "a second ping": [Ping(), Ping()],
    "a number opened anew while its credit is out": [Open(0, ("a",)), Data(0, b"x"), Open(0, ("b",))],
    "one name for two numbers": [Open(0, ("a",)), Open(1, ("a",))],
    "no frame at all": [b"\x01"],
    "an empty frame": [b""],
    "the old key after a rekey": [Rekey(), Ping()],
    "more than the credit of a control channel": [
        Open(0, ("a",)),
        *[Data(0, b"") for _ in range(CONTROL_WINDOW // FRAME_COST + 1)],
    ],
}


@pytest.mark.parametrize("frames", VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_member_who_breaks_the_rules_ends_the_session(frames: list[Head | bytes]) -> None:
    mallory = Mallory()
    mallory.send(*frames[:-1])
    with pytest.raises(RemoteProtocolError):
        mallory.send(frames[-1])


def test_credit_above_the_window_is_refused() -> None:
    pair = Pair()
    assert pair.alice.send(RECORDS, b"", b"x", bulk=False)
    number = next(iter(pair.alice._outgoing.values())).number
    sealed = Cipher(TWO).seal(build(Credit(number, FRAME_COST + 2)))
    with pytest.raises(RemoteProtocolError, match="credit"):
        feed(pair.alice, len(sealed).to_bytes(2, "big") + sealed, 0.0)


def test_prologue_is_the_name_and_the_version_and_nothing_else() -> None:
    assert PROLOGUE == b"fedpeer\x01"
