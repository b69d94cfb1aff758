"""Whether a goodput's 95 % interval holds the truth: many searches with different seeds, and ten times longer runs.

    python bench/goodput_coverage.py [--json] [--seeds N] [--precision P]

Rows, for each set-up:

    coverage_<set-up>          share of the searches whose interval holds the truth
    requests_<set-up>          simulated requests of a search, median: the tool chooses, not the user
    width_<set-up>             the interval's half width by the rate, median

The truth is the rate at which attainment, over runs that together are ten times as long as all that the median search
simulates, falls to the target. Two small clusters over the conversation workload at a tenth of its lengths.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from _cluster import Row, row
from simulator import made_up_profile

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner.attainment import OutcomeLog, Outcomes
from pdserve.cluster.planner.crossing import cross
from pdserve.cluster.planner.goodput import Goodput, find_goodput
from pdserve.cluster.planner.simulation import simulate
from pdserve.cluster.planner.virtual_router import Record
from pdserve.cluster.planner.workload import parse_workload
from pdserve.proto.types import SLO, Role

WORKLOAD = "synthetic?prompt=120/460&output=16/48&rate=10"
TARGET_SHARE = 0.9
TARGET_COVERAGE = 0.9
SIZES = {"1P1D": (1, 1, 0), "2M": (0, 0, 2)}
SLOS = {"1P1D": SLO(60.0, 12.0), "2M": SLO(60.0, 16.0)}
TRUTH_RUNS = 20
TRUTH_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Case:
    name: str

    def __call__(self, rate: float, seed: int, num_requests: int) -> Outcomes:
        prefill, decode, mixed = SIZES[self.name]
        pools = {"prefill": {"replicas": prefill}, "decode": {"replicas": decode}, "mixed": {"replicas": mixed}}
        engine = {"max_num_batched_tokens": 1024, "max_num_seqs": 64, "num_blocks": 4000}
        config = ClusterConfig.model_validate({"model": "simulated", "engine": engine, **pools})
        log, slo = OutcomeLog(), SLOS[self.name]

        def keep(record: Record) -> None:
            log.add(record.timing(), slo, failed=bool(record.failure))

        source = parse_workload(WORKLOAD).source(rate, seed, num_requests)
        simulate(config, dict.fromkeys(Role, made_up_profile()), source, on_record=keep)
        return log.outcomes()


@dataclass(frozen=True, slots=True)
class Search:
    case: Case
    seed: int
    precision: float
    start_rate: float

    def find(self) -> Goodput:
        return find_goodput(
            self.case, TARGET_SHARE, seed=self.seed, precision=self.precision, start_rate=self.start_rate
        )


@dataclass(frozen=True, slots=True)
class TruthRun:
    case: Case
    rate: float
    seed: int
    num_requests: int

    def run(self) -> tuple[float, Outcomes]:
        return self.rate, self.case(self.rate, self.seed, self.num_requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--precision", type=float, default=0.05)
    arguments = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        for name in SIZES:
            for found in rows(pool, name, arguments.seeds, arguments.precision):
                text = f"{found['name']:>20} {found['value']:>10} {found['unit']:<9} {found['note']}"
                print(json.dumps(found) if arguments.json else text, flush=True)


def rows(pool: ProcessPoolExecutor, name: str, num_seeds: int, precision: float) -> Iterator[Row]:
    case = Case(name)
    guess = Search(case, TRUTH_SEED, precision, 20.0).find().rate
    searches = [Search(case, seed, precision, guess * (0.6 + seed % 5 * 0.2)) for seed in range(num_seeds)]
    found = list(pool.map(Search.find, searches))
    median_requests = statistics.median(one.num_requests for one in found)
    truth = true_rate(pool, case, statistics.median(one.rate for one in found), int(10 * median_requests))
    covered = [one.low <= truth <= one.high for one in found]
    share = sum(covered) / num_seeds
    off = statistics.median(abs(one.rate - truth) / truth for one in found)
    note = f"truth {truth:.3f}/s; {num_seeds} seeds; estimates are {off:.1%} off (median)"
    yield row(f"coverage_{name}", share, "share", TARGET_COVERAGE, share >= TARGET_COVERAGE, note)
    yield row(f"requests_{name}", median_requests, "requests", None, None, f"at +-{precision:.0%}")
    width = statistics.median((one.high - one.low) / 2 / one.rate for one in found)
    yield row(f"width_{name}", width, "share", None, None, "half of the interval by the rate")


def true_rate(pool: ProcessPoolExecutor, case: Case, center: float, num_requests: int) -> float:
    """Where the curve through long runs at rates close to the boundary crosses."""
    each = num_requests // TRUTH_RUNS
    jobs = [
        TruthRun(case, center * (0.98 + 0.04 * number / (TRUTH_RUNS - 1)), TRUTH_SEED + number, each)
        for number in range(TRUTH_RUNS)
    ]
    crossing = cross(list(pool.map(TruthRun.run, jobs)), TARGET_SHARE)
    assert crossing is not None, "attainment does not fall with the rate"
    return crossing.rate


if __name__ == "__main__":
    main()
