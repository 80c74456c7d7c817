"""What happens in the daemon, for whoever watches: the operator's screen, `job watch`, the log.

A subscriber is a plain function; it must return at once and must not fail. No event loop here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Event = Mapping[str, Any]
"""Plain JSON values with at least "event" (what happened) and "topic" ("job:<id>", "peer:<id>", "daemon")."""


class Events:
    def __init__(self) -> None:
        self._subscribers: dict[int, Callable[[Event], None]] = {}
        self._next = 0

    def publish(self, topic: str, event: str, **facts: Any) -> None:
        message = {"topic": topic, "event": event, **facts}
        for subscriber in list(self._subscribers.values()):
            subscriber(message)

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber` with every event from now on; the returned function ends that."""
        key = self._next
        self._next += 1
        self._subscribers[key] = subscriber
        return lambda: self._subscribers.pop(key, None) and None
