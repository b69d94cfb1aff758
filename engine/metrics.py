"""A worker's Prometheus metrics: every name once, observed once per turn of the engine.

One registry and one HTTP endpoint a worker. Names carry vLLM's suffixes under our prefix. Knows nothing of requests'
texts or ids: labels are bounded (model, role, worker, state).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pdserve.engine.turn import Turn
from pdserve.proto.metrics_server import MetricsServer
from pdserve.proto.types import Role

STEP_BUCKETS_S = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6)
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LABELS = ("model_name", "role", "worker_id")


class EngineMetrics:
    """Owner of one worker's registry and endpoint."""

    def __init__(self, worker_id: str, role: Role, model_name: str) -> None:
        self.registry = CollectorRegistry()
        values = (model_name, role.value, worker_id)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, LABELS, registry=self.registry).labels(*values)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, LABELS, registry=self.registry).labels(*values)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, LABELS, buckets=buckets, registry=self.registry).labels(*values)

        self._running = gauge("pdserve_num_requests_running", "Sequences in the batch.")
        self._waiting = gauge("pdserve_num_requests_waiting", "Sequences queued for the batch.")
        self._usage = gauge("pdserve_kv_cache_usage_perc", "Share of KV blocks that are claimed, 0 to 1.")
        text = "KV blocks by state. `cached` is a part of `free`; `reserved` is promised, not taken."
        blocks = Gauge("pdserve_kv_blocks", text, (*LABELS, "state"), registry=self.registry)
        states = ("free", "cached", "running", "leased", "receiving", "quarantined", "reserved")
        self._blocks = {state: blocks.labels(*values, state) for state in states}
        self._prompt_tokens = counter("pdserve_worker_prompt_tokens", "Prompt and recomputed tokens computed here.")
        self._generation_tokens = counter("pdserve_worker_generation_tokens", "Tokens sampled here.")
        self._preemptions = counter("pdserve_num_preemptions", "Sequences preempted for lack of KV blocks.")
        self._prefix_queries = counter(
            "pdserve_prefix_cache_queries_tokens", "Tokens of sequences that started, looked up in the prefix cache."
        )
        self._prefix_hits = counter("pdserve_prefix_cache_hits_tokens", "Those of them that were found.")
        self._busy = counter("pdserve_busy_seconds", "Time spent inside engine steps.")
        self._step = histogram("pdserve_step_seconds", "Duration of one engine step.", STEP_BUCKETS_S)
        self._step_tokens = histogram("pdserve_iteration_tokens", "Tokens computed by one engine step.", TOKEN_BUCKETS)
        self._server: MetricsServer | None = None

    def serve(self, host: str) -> str:
        """Serve `/metrics` on a free port of `host`; its address."""
        self._server = MetricsServer(host, 0, self.registry)
        return self._server.address

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def observe(self, turn: Turn) -> None:
        pool = turn.pool
        self._running.set(turn.num_running)
        self._waiting.set(turn.num_waiting)
        self._usage.set(1 - pool.free / pool.total)
        for state, gauge in self._blocks.items():
            gauge.set(getattr(pool, state))
        if turn.step is not None:
            step = turn.step
            self._prompt_tokens.inc(step.num_prefill_tokens)
            self._generation_tokens.inc(sum(one.token is not None for one in step.sequences))
            self._preemptions.inc(len(step.preempted))
            self._prefix_queries.inc(step.num_prefix_query_tokens)
            self._prefix_hits.inc(step.num_prefix_hit_tokens)
            self._busy.inc(step.duration_s)
            self._step.observe(step.duration_s)
            self._step_tokens.observe(step.num_tokens)
