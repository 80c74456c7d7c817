"""Numbers for Prometheus: counted from the daemon's events, or read from its parts at the moment somebody asks.

One registry for each daemon, no thread and no port: the text is a route of the admin socket (/metrics).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fedpeer.events import Event, Events

JOB_ENDS = ("done", "failed", "cancelled")
COUNTED = {"sum": "fedpeer_sums", "worker_crashed": "fedpeer_worker_crashes", "stage_done": "fedpeer_stages_done"}


class Metrics:
    """`traffic` tells bytes sent and received since the start, `connected` the number of peers with a session."""

    def __init__(self, events: Events, *, traffic: Callable[[], tuple[int, int]], connected: Callable[[], int]) -> None:
        self._traffic = traffic
        self._connected = connected
        self._started = time.time()
        self._counts: Counter[str] = Counter()
        self._jobs: Counter[str] = Counter(dict.fromkeys(JOB_ENDS, 0))
        self._registry = CollectorRegistry()
        self._registry.register(self)
        events.subscribe(self._count)

    def render(self) -> bytes:
        """The exposition text, version 0.0.4."""
        return generate_latest(self._registry)

    def _count(self, event: Event) -> None:
        if str(event.get("topic", "")).startswith("job:") and event["event"] in JOB_ENDS:
            self._jobs[event["event"]] += 1
        elif event["event"] in COUNTED:
            self._counts[event["event"]] += 1

    def collect(self) -> Iterator[Any]:
        """What prometheus_client calls at each rendering."""
        sent, received = self._traffic()
        traffic = CounterMetricFamily("fedpeer_bytes", "Bytes on sockets to peers.", labels=["direction"])
        traffic.add_metric(["sent"], sent)
        traffic.add_metric(["received"], received)
        yield traffic
        jobs = CounterMetricFamily("fedpeer_jobs", "Jobs that ended, by their end.", labels=["result"])
        for result, count in self._jobs.items():
            jobs.add_metric([result], count)
        yield jobs
        for event, name in COUNTED.items():
            yield CounterMetricFamily(name, f"Events of the kind {event}.", value=self._counts[event])
        yield GaugeMetricFamily("fedpeer_peers_connected", "Peers with a session.", value=self._connected())
        yield GaugeMetricFamily("fedpeer_start_time_seconds", "Start of the daemon, unix time.", value=self._started)
