"""How workers are run: the sizes and policies that may be chosen, where a search begins, and the steps from there.

    numbers of workers ──start──► a set-up ──neighbours──► set-ups that differ in one choice

Knows nothing of how good a set-up is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pdserve.cluster.planner.findings import Setup
from pdserve.cluster.planner.fleets import Counts, Fleet, Limit, combinations, parse_split
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role
from pdserve.router.policy import POLICIES

CHUNK_SIZES = (256, 512, 1024, 2048, 4096, 8192)
MAX_NUM_SEQS = (32, 64, 128, 256, 512)
PREFILL_NUM_SEQS = 64
"""A prefill step of a few thousand tokens has room for no more prompts."""

DECODE_TOKENS = 512
"""A decode worker computes one token for each of its sequences; it needs no more than that."""

START_CHUNK = {Role.PREFILL: 2048, Role.MIXED: 1024}
START_NUM_SEQS = 256
START_POLICY = "least_loaded"

Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """What may be chosen, in ascending order. `splits` are names as `2P6D`; `None` is every combination."""

    chunk_sizes: tuple[int, ...] = CHUNK_SIZES
    max_num_seqs: tuple[int, ...] = MAX_NUM_SEQS
    policies: tuple[str, ...] = tuple(sorted(POLICIES))
    splits: tuple[str, ...] | None = None

    def check(self) -> None:
        """
        Raises:
            ConfigError: naming the option.
        """
        for option, sizes in (("--chunk-sizes", self.chunk_sizes), ("--max-num-seqs", self.max_num_seqs)):
            if not sizes or min(sizes) < 1:
                raise ConfigError(f"{option}: give positive numbers such as 512,1024")
        if self.chunk_sizes[-1] < self.max_num_seqs[0]:
            raise ConfigError(
                f"--chunk-sizes: {self.chunk_sizes[-1]} is below --max-num-seqs {self.max_num_seqs[0]}; every running "
                "sequence computes a token in each step"
            )
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown or not self.policies:
            raise ConfigError(f"--policies: {', '.join(unknown) or 'none'}: give some of {', '.join(sorted(POLICIES))}")


def wanted(fleet: Fleet, limit: Limit, choices: Choices) -> list[Counts]:
    """The combinations to try with one fleet: all, or those that were named, of which each must fit."""
    if choices.splits is None:
        return list(combinations(fleet, limit))
    named = [parse_split(text) for text in choices.splits]
    for counts, text in zip(named, choices.splits, strict=True):
        fits = sum(num * limit.share_of(fleet.profiles[role]) for role, num in counts.items() if role in fleet.profiles)
        if fits > 1 + 1e-9:
            raise ConfigError(f"--splits: {text} needs more than there is; raise --gpus (or the price) or leave it out")
    return [counts for counts in named if set(counts) <= set(fleet.profiles)]


def clipped(choices: Choices, fleet: Fleet) -> Choices:
    """Without sizes that nobody measured, as far as that leaves any."""
    profiles = fleet.profiles.values()
    chunk = max(profile.domain.chunk_tokens.largest for profile in profiles)
    batch = max(profile.domain.decode_batch.largest for profile in profiles)
    return replace(
        choices, chunk_sizes=_clip(choices.chunk_sizes, chunk), max_num_seqs=_clip(choices.max_num_seqs, batch)
    )


def _clip(sizes: tuple[int, ...], largest: float) -> tuple[int, ...]:
    return tuple(size for size in sizes if size <= largest) or (max(1, min(sizes[0], int(largest))),)


def start(fleet: Fleet, counts: Counts, choices: Choices) -> Setup:
    """A set-up with sizes in the middle of what may be chosen."""
    num_seqs = {role: _nearest(START_NUM_SEQS, choices.max_num_seqs) for role in counts}
    tokens = {role: _nearest(START_CHUNK.get(role, 0), choices.chunk_sizes) for role in counts}
    setup = Setup(
        num_workers=dict(counts),
        max_num_batched_tokens=tokens,
        max_num_seqs=num_seqs,
        policy=START_POLICY if START_POLICY in choices.policies else choices.policies[0],
        tensor_parallel_size=fleet.tensor_parallel_size,
        gpus_per_worker=fleet.gpus_per_worker,
        profiles={role: fleet.profiles[role].name for role in counts},
    )
    return _consistent(setup, choices)


def _nearest(size: int, sizes: Sequence[int]) -> int:
    return min(sizes, key=lambda one: (abs(math.log(one / max(1, size))), one))


def _consistent(setup: Setup, choices: Choices) -> Setup:
    """With what follows from the sizes that are chosen: how many prompts a prefill step takes, and room for a token of
    every running sequence."""
    tokens, num_seqs = dict(setup.max_num_batched_tokens), dict(setup.max_num_seqs)
    if Role.PREFILL in tokens:
        num_seqs[Role.PREFILL] = min(PREFILL_NUM_SEQS, tokens[Role.PREFILL])
    if Role.DECODE in tokens:
        tokens[Role.DECODE] = max(num_seqs[Role.DECODE], DECODE_TOKENS)
    if Role.MIXED in tokens and tokens[Role.MIXED] < num_seqs[Role.MIXED]:
        fitting = [size for size in choices.max_num_seqs if size <= tokens[Role.MIXED]]
        num_seqs[Role.MIXED] = fitting[-1] if fitting else tokens[Role.MIXED]
    return replace(setup, max_num_batched_tokens=tokens, max_num_seqs=num_seqs)


def neighbours(setup: Setup, choices: Choices) -> Iterator[tuple[str, Setup]]:
    """What differs in one choice by one step, each with a word for the step."""
    sized = {"chunk": (Role.PREFILL, Role.MIXED), "sequences": (Role.DECODE, Role.MIXED)}
    for role in (role for role in Role if setup.num_workers.get(role)):
        for what, roles in sized.items():
            if role not in roles:
                continue
            is_chunk = what == "chunk"
            sizes = choices.chunk_sizes if is_chunk else choices.max_num_seqs
            before = setup.max_num_batched_tokens if is_chunk else setup.max_num_seqs
            lower = [size for size in sizes if size < before[role]][-1:]
            higher = [size for size in sizes if size > before[role]][:1]
            for direction, found in (("down", lower), ("up", higher)):
                for size in found:
                    sizes_after = {**before, role: size}
                    moved = (
                        replace(setup, max_num_batched_tokens=sizes_after)
                        if is_chunk
                        else replace(setup, max_num_seqs=sizes_after)
                    )
                    moved = _consistent(moved, choices)
                    if key_of(moved) != key_of(setup):
                        yield f"{role} {what} {direction}", moved
    for policy in choices.policies:
        if policy != setup.policy:
            yield f"policy {policy}", replace(setup, policy=policy)


def with_sizes(setup: Setup, other: Setup, choices: Choices) -> Setup:
    """The set-up with the other's sizes and policy, for the roles that both have."""
    tokens = {role: other.max_num_batched_tokens.get(role, size) for role, size in setup.max_num_batched_tokens.items()}
    num_seqs = {role: other.max_num_seqs.get(role, size) for role, size in setup.max_num_seqs.items()}
    moved = replace(setup, max_num_batched_tokens=tokens, max_num_seqs=num_seqs, policy=other.policy)
    return _consistent(moved, choices)


def place_of(setup: Setup) -> Key:
    """What set-ups share that differ in sizes and policy only."""
    counts = tuple((str(role), setup.num_workers.get(role, 0)) for role in Role)
    return counts, setup.tensor_parallel_size, tuple(sorted((str(role), name) for role, name in setup.profiles.items()))


def key_of(setup: Setup) -> Key:
    """Equal for equal set-ups, and hashable."""
    sizes = tuple(
        (str(role), setup.max_num_batched_tokens[role], setup.max_num_seqs[role])
        for role in Role
        if setup.num_workers.get(role)
    )
    return *place_of(setup), sizes, setup.policy
