"""A set-up as the cluster's configuration: what is simulated is what is written for `pdserve up`.

Knows no YAML and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.profile import Profile
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role
from pdserve.router.config import RouterConfig

MIN_INFLIGHT = 512
DEADLINE_ROOM = 2.0
"""A request may take so many times what its targets allow before the router gives it up: not sooner, or else it is the
deadline that decides what a set-up can do."""


def deadline_s(targets: Sequence[Target], longest_output: int) -> float:
    """What the router must allow for an answer of that many tokens that is within its targets."""
    return DEADLINE_ROOM * max(target.ttft_ms + longest_output * target.tpot_ms for target in targets) / 1e3


def tree_of(
    setup: Setup, profiles: Mapping[str, Profile], model: str, target: Target, least_timeout_s: float = 0.0
) -> dict[str, Any]:
    """The sections that a set-up decides on; everything else is left at its default. `profiles` are by name. The
    router's deadlines are raised to `least_timeout_s` where they are shorter.

    The router lets in as many requests as the workers can run at once, so that what waits does so at the workers, whose
    backlogs the policy sees.
    """
    by_role = {role: profiles[name] for role, name in setup.profiles.items()}
    num_seqs = sum(num * setup.max_num_seqs[role] for role, num in setup.num_workers.items())
    target_section = {"ttft_ms": float(target.ttft_ms), "tpot_ms": float(target.tpot_ms)}
    default = RouterConfig()
    router = {
        "policy": setup.policy,
        "max_inflight_requests": max(MIN_INFLIGHT, num_seqs),
        "slo": target_section,
        **{
            name: math.ceil(least_timeout_s)
            for name in ("default_timeout_s", "max_timeout_s")
            if getattr(default, name) < least_timeout_s
        },
    }
    tree: dict[str, Any] = {
        "model": model,
        **{str(role): _pool(setup, role, by_role.get(role)) for role in Role},
        "router": router,
    }
    if setup.is_split:
        tree["kv_transfer"] = {"links": _links(by_role)}
    return tree


def config_of(
    setup: Setup, profiles: Mapping[str, Profile], target: Target, least_timeout_s: float = 0.0
) -> ClusterConfig:
    """The configuration to simulate. Its model is the profiles' and need not exist."""
    model = next(iter(profiles.values())).model
    return ClusterConfig.model_validate(tree_of(setup, profiles, model, target, least_timeout_s))


def _pool(setup: Setup, role: Role, profile: Profile | None) -> dict[str, Any]:
    if profile is None:
        return {"replicas": 0}
    engine: dict[str, Any] = {
        "max_num_seqs": setup.max_num_seqs[role],
        "max_num_batched_tokens": setup.max_num_batched_tokens[role],
    }
    if not profile.num_gpus:
        # On a GPU the pool is what the weights leave; on a CPU it is what is asked for.
        engine["kv_cache_memory_bytes"] = profile.kv_capacity_tokens * profile.kv_bytes_per_token
    return {"replicas": setup.num_workers[role], "num_gpus": float(profile.num_gpus), "engine": engine}


def _links(by_role: Mapping[Role, Profile]) -> list[str]:
    """Those that both sides were measured with, in order of preference."""
    source, target = by_role[Role.PREFILL], by_role[Role.DECODE]
    common = [str(kind) for kind in KVTransferConfig().links if kind in source.links and kind in target.links]
    if not common:
        raise ConfigError(
            f"links: {source.name} and {target.name} have none in common that workers can use "
            f"({', '.join(KVTransferConfig().links)}); measure one, or try mixed workers only: --splits 8M"
        )
    return common
