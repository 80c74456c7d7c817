"""A link: an encrypted session with one peer over one stream, with time and tasks.

Rules
* `initiate` and `respond` either return a Link or raise HandshakeError with the stream closed, within 5 s.
* To whoever does not know our key, or whom we do not admit, not one byte is sent.
* A responder returns only when the first frame of the new session came: who repeats a recorded first message
  never becomes a Link. (The initiator's first frame is a ping.)
* `run` serves until the session ends, and always ends with SessionError, whose cause is what the handler raised
  if it did; other errors of the project (a StoreError, say) come out of it as they are.
* One writer: it chooses what comes next (`Session`) when the stream has taken what was chosen before and takes
  more, and seals two frames ahead at most. A socket is given bytes without a turn of the event loop while it
  takes them: turns, not encryption, were what sending cost.

On the stream: message 1 ‖ mac1, message 2, frames; each behind its length, two bytes, big-endian.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from fedpeer.crypto import DhKey, Secret, equal
from fedpeer.errors import FedpeerError, HandshakeError, RemoteProtocolError, SessionError, TrustError
from fedpeer.wire.constants import (
    HANDSHAKE_S,
    LENGTH_BYTES,
    MAC1_BYTES,
    MESSAGE_1_BYTES,
    MESSAGE_2_BYTES,
    PROLOGUE,
    PROTOCOL,
    PSK_UNSET,
    SILENCE_S,
)
from fedpeer.wire.frames import Buffer, Name
from fedpeer.wire.noise import Handshake, mac1
from fedpeer.wire.session import MAX_FRAME, Answered, Event, Message, Session

OnMessage = Callable[[Name, bytes, memoryview], Awaitable[None]]
QUANTUM: Final = 2 * MAX_FRAME
_LOST = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


async def initiate(stream: trio.abc.Stream, own: DhKey, remote: bytes, *, psk: Secret | None = None) -> Link:
    """Agree a session with the peer whose static key is `remote`. Raises HandshakeError, the stream then closed."""
    return await _or_close(stream, _initiate(_Counted(stream), own, remote, psk))


async def respond(
    stream: trio.abc.Stream, own: DhKey, admit: Callable[[bytes], bool], *, psk: Secret | None = None
) -> Link:
    """Let in a peer whose static key `admit` accepts. Raises HandshakeError, the stream then closed."""
    return await _or_close(stream, _respond(_Counted(stream), own, admit, psk))


async def _initiate(stream: _Counted, own: DhKey, remote: bytes, psk: Secret | None) -> Link:
    handshake = Handshake(
        PROTOCOL,
        initiator=True,
        ephemeral=DhKey.random(),
        prologue=PROLOGUE,
        own=own,
        remote=remote,
        psks=[psk or Secret(PSK_UNSET)],
    )
    message = handshake.write()
    await stream.send_message(message + mac1(message, remote))
    try:
        answer = await stream.receive_message(MESSAGE_2_BYTES)
    except SessionError:
        if stream.received:
            raise
        # what a stranger gets: nothing
        raise HandshakeError("no answer: it does not know our key (yet), or is not who we dialled") from None
    handshake.read(answer)
    session = Session(*handshake.split(), now=trio.current_time())
    session.ping()
    await stream.send_all(session.data_to_send(trio.current_time()))
    return Link(stream, session, handshake, [])


async def _respond(stream: _Counted, own: DhKey, admit: Callable[[bytes], bool], psk: Secret | None) -> Link:
    first = await stream.receive_message(MESSAGE_1_BYTES)
    message, mac = first[:-MAC1_BYTES], first[-MAC1_BYTES:]
    if not equal(mac, mac1(message, own.public)):  # before anything that costs more than a hash
        raise HandshakeError("a stranger, or garbage: it does not know our key")
    handshake = Handshake(
        PROTOCOL,
        initiator=False,
        ephemeral=DhKey.random(),
        prologue=PROLOGUE,
        own=own,
        psks=[psk or Secret(PSK_UNSET)],
    )
    handshake.read(message)
    if handshake.remote is None or not admit(handshake.remote):
        raise HandshakeError("a stranger: its key is not known here")
    await stream.send_message(handshake.write())
    session = Session(*handshake.split(), now=trio.current_time())
    events: list[Event] = []
    while not session.frames_received:
        events += session.received(await stream.receive_into(session.buffer), trio.current_time())
    return Link(stream, session, handshake, events)


async def _or_close(stream: trio.abc.Stream, handshake: Awaitable[Link]) -> Link:
    link = None
    try:
        with trio.fail_after(HANDSHAKE_S):
            link = await handshake
        return link
    except trio.TooSlowError:
        raise HandshakeError(f"the handshake was not finished within {HANDSHAKE_S:.0f} seconds") from None
    except HandshakeError:
        raise
    except (SessionError, RemoteProtocolError, TrustError) as error:
        raise HandshakeError(f"no handshake: {error.message}") from None
    finally:
        if link is None:
            await trio.aclose_forcefully(stream)


def _lost(error: Exception) -> SessionError:
    return SessionError(f"the connection was lost: {error or type(error).__name__}")


class _Counted:
    """A stream of any kind: what passed is counted, bytes are read into a buffer, its end is a SessionError."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.sent = 0
        self.received = 0

    async def wait_writable(self) -> None:
        try:
            await self.stream.wait_send_all_might_not_block()
        except _LOST as error:
            raise _lost(error) from None

    def send_now(self, data: memoryview) -> int:
        """How many of these bytes a socket took at once. Other streams take none."""
        if not isinstance(self.stream, trio.SocketStream):
            return 0
        try:
            count = os.write(self.stream.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _lost(error) from None
        self.sent += count
        return count

    async def send_all(self, data: Buffer) -> None:
        try:
            await self.stream.send_all(data)
        except _LOST as error:
            raise _lost(error) from None
        self.sent += len(data)

    async def receive_into(self, buffer: memoryview) -> int:
        """At least one byte."""
        try:
            if isinstance(self.stream, trio.SocketStream):
                count = await self.stream.socket.recv_into(buffer)
            else:
                data = await self.stream.receive_some(len(buffer))
                count = len(data)
                buffer[:count] = data
        except _LOST as error:
            raise _lost(error) from None
        if count == 0:
            raise SessionError("the other side closed the connection")
        self.received += count
        return count

    async def send_message(self, message: bytes) -> None:
        await self.send_all(len(message).to_bytes(LENGTH_BYTES, "big") + message)

    async def receive_message(self, size: int) -> bytes:
        """One handshake message of exactly this size; another length is refused before the message is read."""
        buffer = memoryview(bytearray(LENGTH_BYTES + size))
        filled = 0
        while filled < len(buffer):
            filled += await self.receive_into(buffer[filled : len(buffer) if filled >= LENGTH_BYTES else LENGTH_BYTES])
            if filled == LENGTH_BYTES and int.from_bytes(buffer[:LENGTH_BYTES], "big") != size:
                raise HandshakeError("a handshake message that does not fit: another length")
        return bytes(buffer[LENGTH_BYTES:])


class _Served:
    """What came on one channel number and waits for the handler, and the task that hands it over."""

    def __init__(self) -> None:
        self.waiting: deque[Message] = deque()
        self.arrival = trio.lowlevel.ParkingLot()


class Link:
    """An encrypted session with one peer."""

    def __init__(self, stream: _Counted, session: Session, handshake: Handshake, events: list[Event]) -> None:
        assert handshake.remote is not None
        self.remote: bytes = handshake.remote
        """The static key of the other side."""
        self.initiator = handshake.initiator
        self.handshake_hash = handshake.hash
        """Names this session, at both sides; binds evidence to it."""
        self._stream = stream
        self._session = session
        self._early = events
        self._ended: FedpeerError | None = None
        self._scope = trio.CancelScope()
        self._channels: dict[int, _Served] = {}
        self._writer = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._pong = trio.lowlevel.ParkingLot()
        self._seconds = 0.0

    def __repr__(self) -> str:
        return f"Link(remote={self.remote.hex()[:12]}…, {'initiator' if self.initiator else 'responder'})"

    @property
    def bytes_sent(self) -> int:
        """On the stream, the handshake included."""
        return self._stream.sent

    @property
    def bytes_received(self) -> int:
        """On the stream, the handshake included."""
        return self._stream.received

    async def run(self, on_message: OnMessage) -> None:
        """Serve until the session ends, then raise why: SessionError, or a FedpeerError of `on_message` as it is
        (but RemoteProtocolError, which says that the other side is at fault, as the cause of a SessionError).

        `on_message(name, header, payload)` is called for the messages of one channel in order, one at a time, and
        for different channels concurrently. The payload is valid during the call; the credit of a message goes
        back when the call returns. Called once.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._write)
                    nursery.start_soon(self._guard, self._keep)

                    async def serve(served: _Served) -> None:
                        await self._guard(self._serve, served, on_message)

                    def start(served: _Served) -> None:
                        nursery.start_soon(serve, served)

                    await self._guard(self._read, start)
        finally:
            self._end(SessionError("the session was ended here"))
            await trio.aclose_forcefully(self._stream.stream)
        assert self._ended is not None
        raise self._ended

    async def send(self, name: Name, header: bytes, payload: Buffer = b"", *, bulk: bool = False) -> None:
        """Queue one message; returns when it is queued, which is when the other side has given credit for it.

        The channel is opened at its first use. Messages of one name keep their order among those of equal `bulk`.
        The payload may be changed afterwards (what is not bytes is copied). Raises SessionError once the session
        ended, LocalProtocolError for more than the caps of wire.constants (header 224 bytes, payload 65,280). Not a
        checkpoint unless it waits.
        """
        while True:
            if self._ended is not None:
                raise SessionError(self._ended.message) from self._ended
            if self._session.send(name, header, payload, bulk=bulk):
                break
            await self._room.park()
        self._writer.unpark()

    async def ping(self) -> float:
        """The seconds until the other side answered. Raises SessionError if the session ends before."""
        if self._ended is None:
            self._session.ping()
            self._writer.unpark()
            await self._pong.park()
        if self._ended is not None:
            raise SessionError(self._ended.message) from self._ended
        return self._seconds

    async def aclose(self) -> None:
        """End the session; what is queued is not sent."""
        self._end(SessionError("the session was ended here"))
        await trio.aclose_forcefully(self._stream.stream)

    # the tasks of run

    async def _write(self) -> None:
        session, stream = self._session, self._stream
        while True:
            if not session.wants_to_send:
                await self._writer.park()
                continue
            rest = session.data_to_send(trio.current_time(), QUANTUM)
            rest = rest[stream.send_now(rest) :]
            if rest:
                with trio.move_on_after(SILENCE_S) as patience:
                    await stream.send_all(rest)
                    await stream.wait_writable()
                if patience.cancelled_caught:
                    raise SessionError(f"the other side took nothing for {SILENCE_S:.0f} seconds")

    async def _read(self, start: Callable[[_Served], None]) -> None:
        session, stream = self._session, self._stream
        events, self._early = self._early, []
        while True:
            for event in events:
                match event:
                    case Message(channel=number):
                        served = self._channels.get(number)
                        if served is None:
                            served = self._channels[number] = _Served()
                            start(served)
                        served.waiting.append(event)
                        served.arrival.unpark()
                    case Answered(seconds):
                        self._seconds = seconds
                        self._pong.unpark_all()
                    case _:
                        self._room.unpark_all()
            if session.wants_to_send:
                self._writer.unpark()
            events = session.received(await stream.receive_into(session.buffer), trio.current_time())

    async def _serve(self, served: _Served, on_message: OnMessage) -> None:
        session = self._session
        while True:
            while served.waiting:
                message = served.waiting.popleft()
                await on_message(message.name, message.header, message.payload)
                session.handled(message)
                if session.wants_to_send:
                    self._writer.unpark()
            await served.arrival.park()

    async def _keep(self) -> None:
        while True:
            pause = self._session.tick(trio.current_time())
            self._writer.unpark()
            await trio.sleep(pause)

    async def _guard(self, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run one task of this session; whatever it raises is why the session ended."""
        try:
            await task(*arguments)
        except RemoteProtocolError as error:
            self._end(SessionError(f"the other side broke the protocol: {error.message}"), error)
        except FedpeerError as error:
            self._end(error)
        except Exception as error:
            self._end(SessionError(f"a message could not be handled: {type(error).__name__}"), error)

    def _end(self, error: FedpeerError, cause: Exception | None = None) -> None:
        if self._ended is None:
            self._ended = error
            if cause is not None:
                error.__cause__ = cause
            self._room.unpark_all()
            self._pong.unpark_all()
            self._scope.cancel()
