"""Which set-ups a report shows by line and colour, and what each is called.

Pure choices over an `Answer`; knows nothing of how they are drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdserve.cluster.planner.attainment import Attainment
from pdserve.cluster.planner.findings import Answer, Finding, Picture, Setup, Target
from pdserve.proto.types import Role

NUM_RUNNERS_UP = 2
MIN_WIDTH = 0.005


@dataclass(frozen=True, slots=True)
class Series:
    """A set-up that keeps its colour through all figures. `ink` is a name of the palette, `order` picks its marker."""

    finding: Finding
    label: str
    ink: str
    order: int


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture to draw, of a series or of a simulation."""

    picture: Picture
    label: str
    ink: str
    order: int


def best_ones(answer: Answer) -> list[Series]:
    """The best split and the best colocated set-up, as far as they were tried."""
    names = labels(answer)
    found = []
    chosen = ((answer.best_split, "best split", "split"), (answer.best_colocated, "best colocated", "colocated"))
    for order, (index, title, ink) in enumerate(chosen):
        if index is not None:
            found.append(Series(answer.findings[index], f"{names[index]} ({title})", ink, order))
    return found


def of_interest(answer: Answer) -> list[Series]:
    """The best ones and what came next."""
    best = {index for index in (answer.best_split, answer.best_colocated) if index is not None}
    names = labels(answer)
    next_ones = [
        index for index, finding in enumerate(answer.findings) if index not in best and finding.goodput.rate > 0
    ]
    inks = ("third", "fourth")
    runners_up = [
        Series(answer.findings[index], names[index], ink, order + 2)
        for order, (index, ink) in enumerate(zip(next_ones[:NUM_RUNNERS_UP], inks, strict=False))
    ]
    return best_ones(answer) + runners_up


def pictures(answer: Answer) -> list[Shown]:
    """Of the best ones that hold the targets at some rate."""
    return [
        Shown(one.finding.picture, f"{one.label} at {one.finding.picture.rate:.3g} requests/s", one.ink, one.order)
        for one in best_ones(answer)
        if one.finding.picture is not None
    ]


def common_share(targets: Sequence[Target]) -> float | None:
    """What every class is to reach; `None` where it is not the same for all."""
    shares = {target.share for target in targets}
    return shares.pop() if len(shares) == 1 else None


def falling(seen: Sequence[Attainment]) -> list[float]:
    """The curve that never rises and fits best, the surer the value the closer: pool adjacent violators."""
    pools: list[tuple[float, float, int]] = []
    for attainment in seen:
        value, weight, size = attainment.value, 1 / max(attainment.high - attainment.low, MIN_WIDTH) ** 2, 1
        while pools and pools[-1][0] < value:
            before, weight_before, size_before = pools.pop()
            value = (value * weight + before * weight_before) / (weight + weight_before)
            weight, size = weight + weight_before, size + size_before
        pools.append((value, weight, size))
    return [value for value, _, size in pools for _ in range(size)]


def splits(answer: Answer) -> list[Finding]:
    """The best finding of every split, from decode-heavy to prefill-heavy."""
    best: dict[tuple[str, int], Finding] = {}
    for finding in answer.findings:
        if finding.setup.is_split:
            best.setdefault((finding.setup.name, finding.setup.tensor_parallel_size), finding)
    return sorted(best.values(), key=lambda finding: (prefill_share(finding.setup), -finding.setup.num_gpus))


def prefill_share(setup: Setup) -> float:
    """Of the workers, a mixed one counted as half."""
    half = setup.num_workers.get(Role.MIXED, 0) / 2
    return (setup.num_workers.get(Role.PREFILL, 0) + half) / max(1, sum(setup.num_workers.values()))


def labels(answer: Answer) -> list[str]:
    """A name for every finding; set-ups of one name are told apart by what differs."""
    counts = Counter(finding.setup.name for finding in answer.findings)
    return [
        finding.setup.name
        if counts[finding.setup.name] == 1
        else _told_apart(finding.setup, [other.setup for other in answer.findings])
        for finding in answer.findings
    ]


def _told_apart(setup: Setup, all_setups: list[Setup]) -> str:
    rivals = [other for other in all_setups if other.name == setup.name]
    details = {
        "tp": [f"TP {one.tensor_parallel_size}" for one in (setup, *rivals)],
        "chunk": [f"chunk {by_role(one.max_num_batched_tokens)}" for one in (setup, *rivals)],
        "seqs": [f"batch {by_role(one.max_num_seqs)}" for one in (setup, *rivals)],
        "policy": [one.policy for one in (setup, *rivals)],
        "profiles": [by_role(one.profiles) for one in (setup, *rivals)],
    }
    return ", ".join([setup.name, *(values[0] for values in details.values() if len(set(values)) > 1)])


def by_role(sizes: Mapping[Role, int] | Mapping[Role, str]) -> str:
    """One value if all roles agree, else one for each, as in `P 2048, D 512`."""
    if len(set(sizes.values())) <= 1:
        return "".join(str(size) for size in list(sizes.values())[:1])
    return ", ".join(f"{str(role)[0].upper()} {sizes[role]}" for role in Role if role in sizes)
