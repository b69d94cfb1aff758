"""Every number the router exports, each name once. Prefix `pdserve_`, suffixes as in vLLM.

Knows prometheus_client and nothing of requests or workers: callers say what happened. Children of labelled
metrics are bound when first used and kept, never looked up per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pdserve.proto.types import SLO, FinishReason, RequestTiming, Role

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
)
ITL_BUCKETS_S = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1),
    *(0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8),
)
E2E_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
STAGES = ("queue", "prefill", "transfer_wait", "transfer", "decode_queue", "decode")
WORKER_STATES = ("starting", "ready", "draining", "unreachable", "dead")
# Ends that the client brought about itself say nothing about the service.
CLIENT_ENDS = ("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "CANCELLED")


def _with_target(buckets: tuple[float, ...], target_ms: float) -> tuple[float, ...]:
    """A histogram can only be asked about a target that is one of its bounds."""
    return tuple(sorted({*buckets, target_ms / 1e3}))


class RouterMetrics:
    """One owner per registry. `slo` is what finished requests are judged by."""

    def __init__(self, registry: CollectorRegistry, slo: SLO) -> None:
        self.slo = slo
        ttft_s, tpot_s = _with_target(TTFT_BUCKETS_S, slo.ttft_ms), _with_target(ITL_BUCKETS_S, slo.tpot_ms)
        self._registry = registry
        self._requests = Counter(
            "pdserve_requests_total",
            "Requests by gRPC status and, when OK, finish reason",
            ["status", "finish_reason"],
            registry=registry,
        )
        self._inflight = self._gauge("pdserve_inflight_requests", "Requests that were admitted and have not ended")
        self._queued = self._gauge("pdserve_queued_requests", "Requests that wait for admission")
        self.time_to_first_token = self._histogram(
            "pdserve_time_to_first_token_seconds", "Arrival to first token written", ttft_s
        )
        self.inter_token_latency = self._histogram(
            "pdserve_inter_token_latency_seconds", "Time between tokens: one observation for each flush", tpot_s
        )
        self._tpot = self._histogram(
            "pdserve_request_time_per_output_token_seconds", "Mean time between tokens of one request", tpot_s
        )
        self._e2e = self._histogram("pdserve_e2e_request_latency_seconds", "Arrival to end", E2E_BUCKETS_S)
        self.prompt_tokens = Counter(
            "pdserve_prompt_tokens_total", "Prompt tokens of admitted requests", registry=registry
        )
        self.generation_tokens = Counter(
            "pdserve_generation_tokens_total", "Tokens written to clients", registry=registry
        )
        self.dropped_events = Counter(
            "pdserve_dropped_events_total",
            "Worker events for requests that have ended or are another's",
            registry=registry,
        )
        self._slo = Counter(
            "pdserve_slo_requests_total", "Requests judged by each target", ["slo", "outcome"], registry=registry
        )
        stages = Histogram(
            "pdserve_request_stage_seconds",
            "Where requests spent their time",
            ["stage"],
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        self._slo_children = {
            (slo_name, met): self._slo.labels(slo_name, "met" if met else "missed")
            for slo_name in ("ttft", "tpot", "all")
            for met in (True, False)
        }

    def watch(
        self, num_inflight: Callable[[], int], num_queued: Callable[[], int], num_workers: Callable[[str, str], int]
    ) -> None:
        """Gauges that are read when scraped, from another thread: the callables must only read."""
        self._inflight.set_function(num_inflight)
        self._queued.set_function(num_queued)
        workers = Gauge("pdserve_workers", "Workers by role and state", ["role", "state"], registry=self._registry)
        for role in Role:
            for state in WORKER_STATES:
                workers.labels(role, state).set_function(partial(num_workers, role, state))

    def finished(self, timing: RequestTiming, stages_s: Mapping[str, float], reason: FinishReason) -> None:
        """A request ended normally: latency, the stages that are known, and the verdict on both targets."""
        self._requests.labels("OK", reason).inc()
        ttft_ms, tpot_ms, e2e_ms = timing.ttft_ms(), timing.tpot_ms(), timing.e2e_ms()
        if e2e_ms is not None:
            self._e2e.observe(e2e_ms / 1e3)
        if ttft_ms is not None:
            self._judge("ttft", ttft_ms <= self.slo.ttft_ms)
        if tpot_ms is not None:
            self._tpot.observe(tpot_ms / 1e3)
            self._judge("tpot", tpot_ms <= self.slo.tpot_ms)
        self._judge("all", timing.meets(self.slo))
        for stage, duration_s in stages_s.items():
            self._stages[stage].observe(duration_s)

    def failed(self, status: str) -> None:
        """A request ended with an error; unless that was the client's doing it missed its targets."""
        self._requests.labels(status, "").inc()
        if status not in CLIENT_ENDS:
            self._judge("all", False)

    def _judge(self, slo_name: str, met: bool) -> None:
        self._slo_children[slo_name, met].inc()

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, registry=self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self._registry)
