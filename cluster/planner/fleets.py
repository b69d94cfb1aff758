"""Fleets: what each role's workers are made of, and how many of them the GPUs, or the money, are enough for.

    profiles, by role ──fleets_of──► fleets ──combinations──► numbers of workers

A combination uses up what is given: no worker more of any kind could be had. It may have prefill, decode and mixed
workers at once, as the router's policies place every request on a pair or on a mixed worker, whichever has less ahead.
Knows nothing of how workers are run, nor of how good a combination is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pdserve.cluster.planner.profile import Profile
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

MAX_WORKERS = 256
LETTERS = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}

Counts = Mapping[Role, int]


@dataclass(frozen=True, slots=True)
class Fleet:
    """Each role's kind of worker. All have the same tensor-parallel degree and number of GPUs."""

    profiles: Mapping[Role, Profile]

    @property
    def tensor_parallel_size(self) -> int:
        return next(iter(self.profiles.values())).tensor_parallel_size

    @property
    def gpus_per_worker(self) -> float:
        """A worker without GPUs counts as one."""
        return next(iter(self.profiles.values())).num_gpus or 1.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What set-ups may use: GPUs, or money per hour. Exactly one is given."""

    num_gpus: float | None = None
    price_per_hour: float | None = None
    price_per_gpu_hour: float | None = None

    def share_of(self, profile: Profile) -> float:
        """How much of the limit one worker uses up."""
        gpus = profile.num_gpus or 1.0
        if self.num_gpus is not None:
            return gpus / self.num_gpus
        assert self.price_per_hour is not None
        price = profile.price_per_gpu_hour if self.price_per_gpu_hour is None else self.price_per_gpu_hour
        if not price:
            raise ConfigError(f"{profile.name}: price_per_gpu_hour: is not known; give --price-per-gpu-hour or --gpus")
        return gpus * price / self.price_per_hour

    def check(self) -> None:
        """
        Raises:
            ConfigError: neither or both, or nothing to share out.
        """
        given = [value for value in (self.num_gpus, self.price_per_hour) if value is not None]
        if len(given) != 1:
            raise ConfigError("give --gpus or --price-per-hour, one of them: how much there is to share out")
        if not (given[0] > 0 and math.isfinite(given[0])):
            what = "--gpus" if self.num_gpus is not None else "--price-per-hour"
            raise ConfigError(f"{what}: {given[0]:g} leaves nothing to plan with; give a positive number")

    def check_size(self, least_share: float) -> None:
        """
        Raises:
            ConfigError: it is enough for more workers of a kind than are planned as one.
        """
        if (num_workers := math.floor(1 / least_share + 1e-9)) > MAX_WORKERS:
            what = "--gpus" if self.num_gpus is not None else "--price-per-hour"
            raise ConfigError(
                f"{what}: enough for {num_workers} workers of a kind, more than the {MAX_WORKERS} that are planned as "
                "one; plan one cell of the fleet, and run as many of them (docs/scale.md)"
            )


def fleets_of(common: Sequence[Profile], by_role: Mapping[Role, Sequence[Profile]]) -> tuple[Fleet, ...]:
    """One for each tensor-parallel degree; where roles have hardware of their own and mixed workers were not said, each
    of them may also be mixed.

    Raises:
        ConfigError: profiles that cannot be compared, or a degree with one side only.
    """
    everything = [*common, *(profile for some in by_role.values() for profile in some)]
    check_comparable(everything)
    fleets: list[Fleet] = []
    for degree in sorted({profile.tensor_parallel_size for profile in everything}):
        shared = _of_degree(common, degree, "")
        own = {role: _of_degree(some, degree, f"{role}=") for role, some in by_role.items()}
        found = {role: own.get(role) or shared for role in Role}
        prefill, decode, mixed = found[Role.PREFILL], found[Role.DECODE], found[Role.MIXED]
        _check_sides(degree, prefill, decode)
        _check_sizes(_distinct(prefill, decode, mixed))
        if prefill and decode:
            sides = {Role.PREFILL: prefill, Role.DECODE: decode}
            fleets.append(Fleet({**sides, **({Role.MIXED: mixed} if mixed else {})}))
        elif mixed:
            fleets.append(Fleet({Role.MIXED: mixed}))
        if not mixed:
            fleets += [Fleet({Role.MIXED: side}) for side in _distinct(prefill, decode)]
    return tuple(fleets)


def _check_sides(degree: int, prefill: Profile | None, decode: Profile | None) -> None:
    """One side alone would be left out of every split, and nobody would see why."""
    if (prefill is None) == (decode is None):
        return
    one, other = (Role.PREFILL, Role.DECODE) if prefill else (Role.DECODE, Role.PREFILL)
    known = prefill or decode
    assert known is not None
    raise ConfigError(
        f"--profile: {one}={known.name} is of tensor_parallel_size {degree}, and there is no {other} profile of that "
        f"degree; both sides of a split must have the same: give {other}=FILE of degree {degree}, or leave {one}= away"
    )


def _check_sizes(profiles: Sequence[Profile]) -> None:
    for profile in profiles[1:]:
        if profile.num_gpus != profiles[0].num_gpus:
            names = f"{profiles[0].name} and {profile.name}"
            raise ConfigError(f"{names}: num_gpus differ; workers must be of equal size")


def _distinct(*some: Profile | None) -> list[Profile]:
    return list({profile.name: profile for profile in some if profile}.values())


def _of_degree(profiles: Sequence[Profile], degree: int, prefix: str) -> Profile | None:
    fitting = _distinct(*(profile for profile in profiles if profile.tensor_parallel_size == degree))
    if len(fitting) > 1:
        names = " and ".join(profile.name for profile in fitting[:2])
        raise ConfigError(
            f"--profile: {prefix}: {names} are both of tensor_parallel_size {degree}; give one for each degree, or say "
            "prefill=FILE, decode=FILE or mixed=FILE"
        )
    return fitting[0] if fitting else None


def check_comparable(profiles: Sequence[Profile]) -> None:
    """
    Raises:
        ConfigError: there are none, they are of several models, or different ones have one name, by which results are
            told apart.
    """
    if not profiles:
        raise ConfigError("--profile: none was given; see `pdserve profile`")
    first, names = profiles[0], dict[str, Profile]()
    for profile in profiles:
        if profile.model != first.model:
            raise ConfigError(
                f"--profile: {profile.name} is of the model {profile.model}, {first.name} of {first.model}; "
                "all profiles must be of one model"
            )
        if names.setdefault(profile.name, profile) != profile:
            raise ConfigError(f"--profile: two different profiles are called {profile.name}; rename one")


def combinations(fleet: Fleet, limit: Limit) -> Iterator[Counts]:
    """All numbers of workers that use up the limit: split ones by their prefill workers, then mixed ones only.

    Where only mixed workers differ those with fewer come first.

    Raises:
        ConfigError: it is enough for more workers of a kind than are planned as one.
    """
    shares = {role: limit.share_of(profile) for role, profile in fleet.profiles.items()}
    limit.check_size(min(shares.values()))
    if Role.PREFILL in shares:
        for num_mixed in range(_fitting(1.0, shares[Role.MIXED]) + 1 if Role.MIXED in shares else 1):
            left = 1.0 - num_mixed * shares.get(Role.MIXED, 0.0)
            for num_prefill in range(1, _fitting(left, shares[Role.PREFILL]) + 1):
                rest = left - num_prefill * shares[Role.PREFILL]
                num_decode = _fitting(rest, shares[Role.DECODE])
                if num_decode and not _fitting(rest - num_decode * shares[Role.DECODE], min(shares.values())):
                    counts = {Role.PREFILL: num_prefill, Role.DECODE: num_decode, Role.MIXED: num_mixed}
                    yield {role: num for role, num in counts.items() if num}
    if Role.MIXED in shares:
        num_mixed = _fitting(1.0, shares[Role.MIXED])
        if num_mixed:
            yield {Role.MIXED: num_mixed}


def _fitting(room: float, share: float) -> int:
    """How many workers of that share."""
    return max(0, math.floor(room / share + 1e-9))


def parse_split(text: str) -> Counts:
    """`2P6D` or `8M`.

    Raises:
        ConfigError: it is neither.
    """
    parts = re.findall(r"(\d+)([PDM])", text.upper())
    counts = {LETTERS[letter]: int(number) for number, letter in parts}
    is_whole = "".join(number + letter for number, letter in parts) == text.upper() and len(counts) == len(parts)
    if not is_whole or not counts or (Role.PREFILL in counts) != (Role.DECODE in counts):
        raise ConfigError(f"--splits: {text!r} is no split; write 2P6D, 8M or 2P5D1M, or all")
    if not all(0 < number <= MAX_WORKERS for number in counts.values()):
        raise ConfigError(f"--splits: {text!r}: give 1 to {MAX_WORKERS} workers of a kind")
    return counts
