"""What ``/metrics`` tells, in Prometheus's text format."""

from __future__ import annotations

import threading

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STREAMS = (1, 2, 4, 8, 16)


class Metrics:
    """Figures of one server; each has a registry of its own, so that a process can hold several."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        own = {"namespace": "streamvid", "registry": registry}
        self.registry = registry
        self.ready = Gauge("ready", "1 when the model is warm", **own)
        self.sessions = Gauge("sessions", "live streams that advance", **own)
        self.waiting = Gauge("sessions_waiting", "live streams that wait for a place", **own)
        self.clips_waiting = Gauge("clips_waiting", "clips that wait for the worker", **own)
        self.cache_bytes = Gauge("cache_bytes", "memory that caches of live streams hold", **own)
        threads = Gauge("threads", "threads of Python in the process", **own)
        threads.set_function(threading.active_count)
        ProcessCollector(registry=registry)  # memory, time and open files, where /proc tells them
        self.started = Counter("sessions_started", "live streams begun", **own)
        self.ended = Counter("sessions_ended", "live streams ended", ["reason"], **own)
        self.chunks = Counter("chunks", "chunks made", ["kind"], **own)
        self.frames_sent = Counter("frames_sent", "frames sent to viewers", **own)
        self.frames_dropped = Counter("frames_dropped", "frames that slow viewers missed", **own)
        self.deadlines_missed = Counter("deadlines_missed", "chunks that came late", **own)
        self.errors = Counter("errors", "errors told to clients", ["code"], **own)
        self.chunk_seconds = Histogram(
            "chunk_seconds", "time that the model takes per batch of chunks", buckets=SECONDS, **own
        )
        self.batch_streams = Histogram(
            "batch_streams", "live streams that advance together", buckets=STREAMS, **own
        )
        self.first_chunk_seconds = Histogram(
            "first_chunk_seconds", "from session.start to the first chunk", buckets=SECONDS, **own
        )
        self.switch_seconds = Histogram(
            "prompt_switch_seconds",
            "from a new prompt to the first chunk made of it",
            buckets=SECONDS,
            **own,
        )

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
