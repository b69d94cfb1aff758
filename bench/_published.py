"""What the comparisons with published results share: public profiles, set-ups of them, and goodputs on both cores.

    public files --converted--> Profile by name --fleet--> Setup --hunts--> Goodput, by the planner's own simulator

Public profiles have a link for each fabric, NVLink within a machine (`cuda_ipc`) and the network between machines
(`nccl`); only the one that a source used is kept. Knows no published result.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pdserve.cluster.arrivals import survey
from pdserve.cluster.planner.capacity import Capacity, Lengths
from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.goodput import Goodput
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.public_profiles import convert
from pdserve.cluster.planner.source import drain
from pdserve.cluster.planner.trials import Found, Hunt
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.cluster.tune_jobs import Problem, perform
from pdserve.proto.types import Role

Result = TypeVar("Result")
Argument = TypeVar("Argument")

SEED = 1
START_ROOM = 0.7
"""A guess from mean lengths is too high where lengths vary; a search that begins too high runs long queues."""

PREFILL_NUM_SEQS = 64
KNOWN = 2.0
"""An interval with ends farther apart than this factor tells nothing."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is simulated: `num_requests` of a run, the precision of a goodput and what it may cost at most."""

    num_requests: int
    precision: float
    max_requests: int


EFFORTS = {"quick": Effort(2_000, 0.1, 40_000), "normal": Effort(12_000, 0.03, 120_000)}


def load_profiles(folder: Path, names: Sequence[str], link: str) -> dict[str, Profile]:
    """The profiles of public files by name, with only the link that their source used."""
    found = {}
    for name in names:
        data = (folder / name).read_bytes()
        text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
        for conversion in convert(text, name):
            profile = conversion.profile
            found[profile.name] = profile.model_copy(update={"links": {link: profile.links[link]}})
    return found


def fleet(workers: Mapping[Role, tuple[Profile, int]], *, chunk_tokens: int = 2048, num_seqs: int = 256) -> Setup:
    """Workers by role, each kind with its profile and its number."""
    tokens = {
        role: max(num_seqs, 512) if role is Role.DECODE else chunk_tokens for role, (_, number) in workers.items()
    }
    seqs = {
        role: PREFILL_NUM_SEQS if role is Role.PREFILL else min(num_seqs, tokens[role])
        for role, (_, number) in workers.items()
    }
    return Setup(
        num_workers={role: number for role, (_, number) in workers.items()},
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        policy="least_loaded",
        profiles={role: profile.name for role, (profile, _) in workers.items()},
    )


def num_gpus(setup: Setup, profiles: Mapping[str, Profile]) -> float:
    """Roles may differ in how many GPUs a worker has."""
    return sum(number * profiles[setup.profiles[role]].num_gpus for role, number in setup.num_workers.items())


def guesses(
    setups: Sequence[Setup], profiles: Mapping[str, Profile], workload: WorkloadSpec, tpot_ms: float
) -> list[float]:
    """About what rate each set-up takes, from mean lengths alone."""
    seen = survey(drain(workload.source(1.0, SEED, 4_000)))
    lengths = Lengths(seen.prompt_tokens / seen.num_requests, seen.output_tokens / seen.num_requests, tpot_ms)
    capacity = Capacity(profiles, lengths)
    return [capacity.rate(setup) for setup in setups]


def goodputs(
    setups: Sequence[Setup], profiles: Mapping[str, Profile], workload: WorkloadSpec, target: Target, effort: Effort
) -> list[Goodput]:
    """Each one's goodput by the planner's search."""
    starts = guesses(setups, profiles, workload, target.tpot_ms)
    jobs = []
    for setup, start in zip(setups, starts, strict=True):
        problem = Problem({name: profiles[name] for name in setup.profiles.values()}, workload, (target,))
        hunt = Hunt(setup, START_ROOM * start, SEED, effort.precision, effort.max_requests)
        jobs.append((hunt, problem))
    return each(_goodput, jobs)


def _goodput(job: tuple[Hunt, Problem]) -> Goodput:
    found = perform(*job)
    assert isinstance(found, Found)
    return found.goodput


def each(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> list[Result]:
    """Of all arguments in their order, on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, arguments))


def is_known(goodput: Goodput) -> bool:
    """Whether the interval says more than that there is one."""
    return bool(goodput.failing) or goodput.high <= KNOWN * goodput.low


def unknown(goodputs_by_name: Mapping[str, Goodput]) -> str:
    """A remark on those whose interval is too wide to tell anything; empty if there are none."""
    names = [name for name, goodput in goodputs_by_name.items() if not is_known(goodput)]
    return f"; wide intervals: {', '.join(names)}" if names else ""


def best(values: Mapping[str, float]) -> str:
    return max(values, key=lambda name: values[name])


def listed(values: Mapping[str, float]) -> str:
    """Every value as a share of the best one."""
    most = max(values.values())
    return ", ".join(f"{name} {value / most:.0%}" for name, value in values.items())
