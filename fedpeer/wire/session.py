"""An established session between two peers: bytes in, events out; commands in, bytes out. No socket, no clock.

Rules
* A channel goes one way: who sends opens it, under a number of its own. Control channels have the numbers
  0 … 15, bulk channels 16 … 18, and (name, bulk) has at most one number at a time.
* Credit: each channel has a window; a data frame costs `len(header) + len(payload) + 64`. It comes back when
  the receiver has handled the message: at once when half of the window is due, or when the channel has become
  idle and all numbers are in use, else with the next bytes that go that way. Sending beyond one's credit ends
  the session.
* A number may be given another name when its whole window is free, so both tables are bounded and nothing is
  ever closed: the channel that was used longest ago makes place.
* Priority: what is sealed next is chosen when the stream takes more: a rekey that is due, pong, ping, credit,
  control in the order it was sent, bulk in the order it was sent. What is sealed stays in order.
* Keys: each side renews the key of its own direction every 1 GiB or 10 minutes: the frame `Rekey` is the last
  under the old key. Under one key at most 2 GiB are accepted.
* Life: nothing came for 10 s: ping; nothing for 30 s: the peer is gone (`tick`). One ping is out at a time.
* Whatever is wrong with what came in is RemoteProtocolError, and the session is over.

Memory is bounded on both sides: what may be queued here is what the other side has given credit for, and what
may come is what we have: 16 × 128 KiB + 3 × 2 MiB.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fedpeer.errors import LocalProtocolError, RemoteProtocolError, SessionError, TrustError
from fedpeer.wire.constants import (
    BULK_CHANNELS,
    BULK_WINDOW,
    CONTROL_CHANNELS,
    CONTROL_WINDOW,
    FRAME_COST,
    KEEPALIVE_S,
    LENGTH_BYTES,
    MAX_HEADER,
    MAX_KEY_BYTES,
    MAX_NOISE_MESSAGE,
    REKEY_BYTES,
    REKEY_S,
    SILENCE_S,
    TAG_BYTES,
)
from fedpeer.wire.frames import Buffer, Credit, Data, Name, Open, Ping, Pong, Rekey, build, parse
from fedpeer.wire.noise import Cipher

MAX_FRAME = LENGTH_BYTES + MAX_NOISE_MESSAGE
TICK_S = 0.001
"""The shortest pause that `tick` asks for: one below the resolution of the clock would never end."""
BATCH = 8 * MAX_FRAME
"""The most that is sealed ahead of the stream, and the most that is read from it at once."""
LARGE = 4096
"""From this size on payloads are not copied to be queued, and frames are opened into buffers that are used again:
fresh memory for every frame costs as much as the encryption."""
SPARE = 8
"""So many buffers are kept for later."""


# events


@dataclass(slots=True)
class Message:
    """A data frame came. `Session.handled` gives its credit back."""

    channel: int
    name: Name
    header: bytes
    payload: memoryview
    cost: int
    buffer: bytearray | None
    """What the payload is a view of, to be used again."""


@dataclass(frozen=True, slots=True)
class Room:
    """Credit came back: what could not be sent may be tried again."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Our ping was answered after so many seconds."""

    seconds: float


Event = Message | Room | Answered


@dataclass(slots=True)
class _Outgoing:
    number: int
    window: int
    credit: int


@dataclass(slots=True)
class _Incoming:
    name: Name
    window: int
    room: int


def _window(number: int) -> int:
    return CONTROL_WINDOW if number < CONTROL_CHANNELS else BULK_WINDOW


class Session:
    """One side of an established session. `now` is monotonic, in seconds, and never goes back."""

    def __init__(self, sender: Cipher, receiver: Cipher, *, now: float) -> None:
        self._sender = sender
        self._receiver = receiver
        # out
        self._out = memoryview(bytearray(MAX_FRAME))  # grows to a batch when that is asked for
        self._plain = memoryview(bytearray(MAX_FRAME))
        self._control: deque[tuple[bytes, Buffer]] = deque()  # head, payload
        self._bulk: deque[tuple[bytes, Buffer]] = deque()
        self._outgoing: dict[tuple[Name, bool], _Outgoing] = {}  # used longest ago first
        self._free = {
            False: list(range(CONTROL_CHANNELS)),
            True: list(range(CONTROL_CHANNELS, CONTROL_CHANNELS + BULK_CHANNELS)),
        }
        self._sent_under_key = 0
        self._rekey_at = now + REKEY_S
        # in
        self._in = memoryview(bytearray(2 * MAX_FRAME))  # grows to a batch and a frame when it was filled
        self._start = self._end = 0
        self._spare: list[bytearray] = []
        self._incoming: dict[int, _Incoming] = {}
        self._unnamed = {CONTROL_WINDOW: CONTROL_CHANNELS, BULK_WINDOW: BULK_CHANNELS}  # numbers not in use
        self._due: dict[int, int] = {}  # credit to give back, by number
        self._due_now = False
        self._received_under_key = 0
        self._heard_at = now
        self.frames_received = 0
        # ping
        self._ping_wanted = False
        self._ping_out: float | None = None  # when it was sealed
        self._pong_owed = False

    # commands

    def send(self, name: Name, header: bytes, payload: Buffer, *, bulk: bool) -> bool:
        """Queue one data frame. False: there is no credit or no channel now; try again after `Room`.

        A payload that could still change (not bytes, nor a view of bytes) is copied. Raises LocalProtocolError
        for what exceeds the caps.
        """
        if len(header) > MAX_HEADER:
            raise LocalProtocolError(f"a header of {len(header)} bytes; at most {MAX_HEADER} are allowed")
        key = (name, bulk)
        channel = self._outgoing.pop(key, None) or self._open(key)
        if channel is None:
            return False
        self._outgoing[key] = channel
        view = memoryview(payload)
        head = build(Data(channel.number, header), view.nbytes)
        cost = len(header) + view.nbytes + FRAME_COST
        if channel.credit < cost:
            return False
        channel.credit -= cost
        still = view.cast("B") if type(view.obj) is bytes and view.c_contiguous else view.tobytes()
        (self._bulk if bulk else self._control).append((head, still))
        return True

    def _open(self, key: tuple[Name, bool]) -> _Outgoing | None:
        name, bulk = key
        free = self._free[bulk]
        idle = (
            None
            if free
            else next((k for k, c in self._outgoing.items() if k[1] == bulk and c.credit == c.window), None)
        )
        if not free and idle is None:
            return None
        number = free[-1] if free else self._outgoing[idle].number  # type: ignore[index]
        opening = build(Open(number, name))
        if free:
            free.pop()
        else:
            del self._outgoing[idle]  # type: ignore[arg-type]
        (self._bulk if bulk else self._control).append((opening, b""))
        return _Outgoing(number, _window(number), _window(number))

    def handled(self, message: Message) -> None:
        """The message was handled: give its credit back."""
        due = self._due.get(message.channel, 0) + message.cost
        self._due[message.channel] = due
        incoming = self._incoming[message.channel]
        idle = due == incoming.window - incoming.room
        self._due_now = self._due_now or 2 * due >= incoming.window or (idle and not self._unnamed[incoming.window])
        if message.buffer is not None and len(self._spare) < SPARE:
            try:
                message.payload.release()
                message.buffer.append(0)  # impossible while anybody still looks into it
            except BufferError:
                return
            message.buffer.pop()
            self._spare.append(message.buffer)

    def ping(self) -> None:
        """Ask for a sign of life; `Answered` follows. One that is already out serves for both."""
        if self._ping_out is None:
            self._ping_wanted = True

    def tick(self, now: float) -> float:
        """Keep the session alive. The seconds until it wants to be called again; SessionError if the peer is silent."""
        silent = now - self._heard_at
        if silent >= SILENCE_S:
            raise SessionError(f"the other side was silent for {SILENCE_S:.0f} seconds")
        if silent < KEEPALIVE_S:
            return max(KEEPALIVE_S - silent, TICK_S)
        self.ping()
        return max(SILENCE_S - silent, TICK_S)

    # bytes out

    @property
    def wants_to_send(self) -> bool:
        return bool(self._pong_owed or self._ping_wanted or self._due_now or self._control or self._bulk)

    def data_to_send(self, now: float, limit: int = BATCH) -> memoryview:
        """The next sealed bytes, about `limit` at most but at least one frame if any; valid until the next call."""
        position = 0
        limit = max(MAX_FRAME, min(limit, BATCH))
        if not self.wants_to_send:
            return self._out[:0]
        if len(self._out) < limit + MAX_FRAME:
            self._out = memoryview(bytearray(limit + MAX_FRAME))  # credit and the like come on top
        if self._sent_under_key >= REKEY_BYTES or now >= self._rekey_at:
            position = self._seal(build(Rekey()), position)
            self._sender.rekey()
            self._sent_under_key = 0
            self._rekey_at = now + REKEY_S
        for number, amount in self._due.items():
            position = self._seal(build(Credit(number, amount)), position)
            self._incoming[number].room += amount
        self._due.clear()
        self._due_now = False
        if self._pong_owed:
            position = self._seal(build(Pong()), position)
            self._pong_owed = False
        if self._ping_wanted:
            position = self._seal(build(Ping()), position)
            self._ping_wanted = False
            self._ping_out = now
        limit += position
        while queue := self._control or self._bulk:
            head, payload = queue[0]
            if position + LENGTH_BYTES + len(head) + len(payload) + TAG_BYTES > limit:
                break
            queue.popleft()
            position = self._seal(head, position, payload)
        return self._out[:position]

    def _seal(self, head: bytes, position: int, payload: Buffer = b"") -> int:
        middle = len(head)
        size = middle + len(payload)
        self._plain[:middle] = head
        self._plain[middle:size] = payload
        body = position + LENGTH_BYTES
        end = body + size + TAG_BYTES
        self._out[position:body] = (end - body).to_bytes(LENGTH_BYTES, "big")
        self._sender.seal_into(self._plain[:size], self._out[body:end])
        self._sent_under_key += end - body
        return end

    # bytes in

    @property
    def buffer(self) -> memoryview:
        """Where the next bytes of the stream are to be put; never empty."""
        return self._in[self._end :]

    def received(self, count: int, now: float) -> list[Event]:
        """`count` bytes were put into `buffer`: what they mean. Raises RemoteProtocolError."""
        events: list[Event] = []
        start, end = self._start, self._end + count
        data = self._in
        while end - start >= LENGTH_BYTES:
            size = (data[start] << 8) | data[start + 1]
            body = start + LENGTH_BYTES
            if size <= TAG_BYTES:
                raise RemoteProtocolError("a frame that is none")
            if end < body + size:
                break
            start = body + size
            self._received_under_key += size
            if self._received_under_key > MAX_KEY_BYTES:
                raise RemoteProtocolError("too much came under one key")
            buffer = None
            try:
                if size < LARGE:
                    frame = memoryview(self._receiver.open(data[body:start]))
                else:
                    buffer = self._spare.pop() if self._spare else bytearray(MAX_FRAME)
                    frame = memoryview(buffer)[: size - TAG_BYTES]
                    self._receiver.open_into(data[body:start], frame)
            except TrustError:
                raise RemoteProtocolError("a frame was changed on its way") from None
            self._heard_at = now
            self.frames_received += 1
            event = self._frame(frame, now, buffer)
            if event is not None:
                events.append(event)
        if start == end:
            start = end = 0
        else:
            if end == len(data) < BATCH:
                self._in = memoryview(bytearray(min(2 * len(data), BATCH + MAX_FRAME)))
            self._in[: end - start] = data[start:end]
            start, end = 0, end - start
        self._start, self._end = start, end
        return events

    def _frame(self, frame: memoryview, now: float, buffer: bytearray | None) -> Event | None:
        head, payload = parse(frame)
        match head:
            case Data(number, header):
                channel = self._incoming.get(number)
                cost = len(header) + len(payload) + FRAME_COST
                if channel is None:
                    raise RemoteProtocolError("data on a channel that is not open")
                if cost > channel.room:
                    raise RemoteProtocolError("more data than credit was given for")
                channel.room -= cost
                return Message(number, channel.name, header, payload, cost, buffer)
            case Credit(number, amount):
                return self._credit(number, amount)
            case Open(number, name):
                self._opened(number, name)
            case Ping():
                if self._pong_owed:
                    raise RemoteProtocolError("a second ping before the first was answered")
                self._pong_owed = True
            case Pong():
                if self._ping_out is None:
                    raise RemoteProtocolError("a pong without a ping")
                seconds, self._ping_out = now - self._ping_out, None
                return Answered(seconds)
            case Rekey():
                self._receiver.rekey()
                self._received_under_key = 0
        return None

    def _credit(self, number: int, amount: int) -> Room:
        for channel in self._outgoing.values():
            if channel.number == number and channel.credit + amount <= channel.window:
                channel.credit += amount
                return Room()
        raise RemoteProtocolError("credit for what was not sent")

    def _opened(self, number: int, name: Name) -> None:
        window = _window(number)
        old = self._incoming.get(number)
        if old is not None and old.room != window:
            raise RemoteProtocolError("a channel was opened anew while its credit was out")
        if any(c.name == name and c.window == window and n != number for n, c in self._incoming.items()):
            raise RemoteProtocolError("one name for two channels")
        self._incoming[number] = _Incoming(name, window, window)
        if old is None:
            self._unnamed[window] -= 1
        if self._due and not self._unnamed[window]:
            self._due_now = True
