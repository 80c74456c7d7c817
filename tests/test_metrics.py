"""Counters follow the events; gauges are read when somebody looks."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from fedpeer.events import Events
from fedpeer.metrics import Metrics


def test_metrics_count_ends_of_jobs_and_read_the_parts() -> None:
    events = Events()
    traffic = [10, 20]
    metrics = Metrics(events, traffic=lambda: (traffic[0], traffic[1]), connected=lambda: 3)
    for topic, event in (
        ("job:a", "done"),
        ("job:b", "failed"),
        ("job:b", "sum"),
        ("peer:x", "done"),
        ("job:c", "done"),
    ):
        events.publish(topic, event)
    traffic[0] = 11
    text = metrics.render().decode()
    samples = {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert samples["fedpeer_jobs_total", "done"] == 2
    assert samples["fedpeer_jobs_total", "failed"] == 1
    assert samples["fedpeer_jobs_total", "cancelled"] == 0
    assert samples["fedpeer_sums_total",] == 1
    assert (samples["fedpeer_bytes_total", "sent"], samples["fedpeer_bytes_total", "received"]) == (11, 20)
    assert samples["fedpeer_peers_connected",] == 3
