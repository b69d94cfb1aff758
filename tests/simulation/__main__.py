"""Simulate many seeds: `python -m simulation 2000`, `... 100-199`, or one of them with its trace: `... 17-17 --trace`.

Two processes share the seeds. A seed that fails is named with the command that replays it. Some seeds are run again in
processes that hash strings differently: their traces must be the same, or nothing could be replayed. Over many seeds
every counter of `MUST_HAPPEN` must have moved: what never happens is not tested.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch
from simulation.run import Report
from simulation.seeds import digests_elsewhere, run_all, seeds_of, try_run

NUM_REPEATED = 6
HASH_SEED = 1
NUM_SHOWN = 10
ENOUGH_SEEDS = 500
MUST_HAPPEN = (
    *("admissions", "admissions with a held prefix", "parts fetched from their middle", "parts pulled again"),
    *("fetches over gloo", "fetches over shm", "corruptions detected", "bytes flipped", "blocks swapped"),
    *("blocks forgotten", "wires broken", "wires hung", "writes into quarantine", "receivers that could not stop"),
    *("leases lapsed", "renewals too late", "offers repeated", "offers refused", "redemptions refused"),
    *("prefills stopped", "quarantines at the source", "quarantines at the target", "held prefixes given back"),
    *("preemptions", "prefix hits", "worker deaths", "router deaths", "freezes", "cuts", "resets", "streams broken"),
    *("messages lost", "messages doubled", "messages late", "messages held by a cut", "messages lost in a cut"),
    *("ends: finished", "ends: cancelled", "ends: DeadlineExceeded", "ends: Overloaded", "ends: WorkerLost"),
    *("ends: TransferFailed", "ends: CorruptKV", "ends: InternalError", "ends: Unavailable"),
    *("seeds without faults", "workers that failed closed"),
)


def show(reports: list[Report], seconds: float, failed: list[Report]) -> None:
    counts: Counter[str] = sum((report.counts for report in reports), Counter())
    for name, number in sorted(counts.items()):
        print(f"{number:10d}  {name}")
    virtual_s = sum(report.virtual_s for report in reports)
    print(f"{len(reports)} seeds, {virtual_s / 3600:.1f} simulated hours in {seconds:.0f} s; {len(failed)} failed")


def problems(reports: list[Report], failed: list[Report]) -> list[str]:
    """Why this run of the command fails."""
    found = []
    for report in failed[:NUM_SHOWN]:
        found.append(report.title)
        found += [f"    {violation}" for violation in report.violations[:3]]
        found.append(f"    replay: make simulate SEEDS={report.seed}-{report.seed} ARGS=--trace")
    if len(failed) > NUM_SHOWN:
        found.append(f"and {len(failed) - NUM_SHOWN} more: {[report.seed for report in failed[NUM_SHOWN:]]}")
    if len(reports) >= ENOUGH_SEEDS:
        counts: Counter[str] = sum((report.counts for report in reports), Counter())
        found += [f"never happened, so was not tested: {name}" for name in MUST_HAPPEN if not counts[name]]
    return found


def unrepeatable(reports: list[Report]) -> list[str]:
    """Seeds that took another course in a process that hashes strings otherwise."""
    digests = {report.seed: report.digest for report in reports[:NUM_REPEATED]}
    again = digests_elsewhere(digests, HASH_SEED)
    return [f"seed {seed} took another course the second time" for seed in digests if again[seed] != digests[seed]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("seeds", nargs="?", default="2000", help="how many, or from-to")
    parser.add_argument("--trace", action="store_true", help="show everything that happens; for one seed")
    parser.add_argument("--digests", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.digests:
        for seed in map(int, options.digests.split(",")):
            print(seed, try_run(seed).digest)
        return 0
    seeds = seeds_of(options.seeds)
    if options.trace:
        for seed in seeds:
            report = try_run(seed, keep_lines=True)
            print(report.title, *report.lines, *report.violations, sep="\n")
        return 0
    started_s = time.monotonic()
    reports = list(run_all(seeds))
    failed = [report for report in reports if report.violations]
    show(reports, time.monotonic() - started_s, failed)
    found = problems(reports, failed) + unrepeatable(reports)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
