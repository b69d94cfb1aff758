"""Prometheus metrics of hand-offs, seen from the decode side: how long, how many bytes, over which link, which end.

Adds its names to a registry that somebody else serves. Knows nothing of the protocol's states.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

HANDOFF_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 5, 15)
TAIL_BUCKETS_BYTES = (0, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30)
LABELS = ("worker_id", "link")


class HandoffMetrics:
    """Every name once."""

    def __init__(self, worker_id: str, registry: CollectorRegistry) -> None:
        self._worker_id = worker_id
        self._wait = Histogram(
            "pdserve_handoff_wait_seconds",
            "From the last offer until blocks for the prompt were free.",
            ("worker_id",),
            buckets=HANDOFF_BUCKETS_S,
            registry=registry,
        ).labels(worker_id)
        self._seconds = Histogram(
            "pdserve_handoff_seconds",
            "Moving and verifying one part of a hand-off's KV.",
            LABELS,
            buckets=HANDOFF_BUCKETS_S,
            registry=registry,
        )
        self._bytes = Counter("pdserve_handoff_bytes", "KV bytes received.", LABELS, registry=registry)
        self._tail = Histogram(
            "pdserve_handoff_tail_bytes",
            "KV that had not arrived yet when the prompt was computed and its last part was offered.",
            ("worker_id",),
            buckets=TAIL_BUCKETS_BYTES,
            registry=registry,
        ).labels(worker_id)
        self._pulls = Counter(
            "pdserve_handoff_pull_failures",
            "Parts that did not arrive, or arrived wrong, and were fetched again or given up.",
            ("worker_id", "reason"),
            registry=registry,
        )
        self._failures = Counter(
            "pdserve_handoff_failures", "Hand-offs that failed here.", ("worker_id", "reason"), registry=registry
        )

    def completed(self, tail_bytes: int) -> None:
        """The source has computed the whole prompt."""
        self._tail.observe(tail_bytes)

    def waited(self, wait_s: float) -> None:
        self._wait.observe(wait_s)

    def moved(self, link: str, num_bytes: int, seconds: float) -> None:
        self._seconds.labels(self._worker_id, link).observe(seconds)
        self._bytes.labels(self._worker_id, link).inc(num_bytes)

    def pull_failed(self, reason: str) -> None:
        self._pulls.labels(self._worker_id, reason).inc()

    def failed(self, reason: str) -> None:
        self._failures.labels(self._worker_id, reason).inc()
