"""Small clusters to simulate, and a profile whose figures can be added up by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.profile import (
    DecodeRegion,
    Domain,
    LinkCost,
    Overheads,
    PrefillRegion,
    Profile,
    Range,
)
from pdserve.cluster.planner.simulation import Outcome, simulate
from pdserve.cluster.planner.source import OpenLoop
from pdserve.proto.types import Role

PREFILL_FIXED_S, TOKEN_S = 0.010, 0.0001
DECODE_FIXED_S, SEQUENCE_S, CONTEXT_S = 0.005, 0.0005, 1e-7
LATENCY_S, BANDWIDTH = 0.001, 1e9
REQUEST_S, HANDOFF_S, DELIVERY_S = 0.004, 0.002, 0.0005
KV_BYTES = 100_000


def everything() -> Range:
    return Range(smallest=0, largest=1e9)


def make_profile(**changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "format": 1,
        "name": "made up",
        "model": "model",
        "hardware": "none",
        "source": "predicted",
        "origin": "a test",
        "num_gpus": 1,
        "kv_bytes_per_token": KV_BYTES,
        "kv_capacity_tokens": 64_000,
        "max_model_len": 8_192,
        "prefill": (PrefillRegion(num_samples=0, fixed_s=PREFILL_FIXED_S, per_token_s=TOKEN_S, per_pair_s=0.0),),
        "decode": (
            DecodeRegion(
                num_samples=0, fixed_s=DECODE_FIXED_S, per_sequence_s=SEQUENCE_S, per_context_token_s=CONTEXT_S
            ),
        ),
        "domain": Domain(
            chunk_tokens=everything(),
            context_tokens=everything(),
            decode_batch=everything(),
            decode_context_tokens=everything(),
        ),
        "links": {"gloo": LinkCost(latency_s=LATENCY_S, bandwidth_bytes_per_s=BANDWIDTH)},
        "overheads": Overheads(request_s=REQUEST_S, handoff_s=HANDOFF_S, token_s=DELIVERY_S),
        "startup_s": 10.0,
        "flip_s": 1.0,
    }
    return Profile(**fields | changes)


def make_config(prefill: int = 1, decode: int = 1, mixed: int = 0, **sections: Any) -> ClusterConfig:
    sizes = {"prefill": {"replicas": prefill}, "decode": {"replicas": decode}, "mixed": {"replicas": mixed}}
    engine = {"max_num_batched_tokens": 512, "max_num_seqs": 64, **sections.pop("engine", {})}
    return ClusterConfig.model_validate({"model": "model", "engine": engine, **sizes, **sections})


def run(config: ClusterConfig, arrivals: Iterable[Arrival], **changes: Any) -> Outcome:
    profile = make_profile(**changes)
    return simulate(config, dict.fromkeys(Role, profile), OpenLoop(iter(arrivals)))
