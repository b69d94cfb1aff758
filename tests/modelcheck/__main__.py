"""`make model-check`: search every configuration to its end, then show that each mutant is caught.

Exit status 1 when a property fails or a mutant survives. `--traces` prints every counterexample in full, a line for
each step; a property that fails in the real protocol is always printed so. `--deep` searches larger bounds as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from modelcheck.mutants import MUTANTS, Mutant
from modelcheck.search import Result, Search
from modelcheck.settings import DEEP, STANDARD
from modelcheck.vocabulary import Setting

MAX_WORLDS = 9_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make model-check", description=__doc__)
    parser.add_argument("--traces", action="store_true", help="print the mutants' counterexamples in full")
    parser.add_argument(
        "--deep", action="store_true", help="larger bounds as well: a quarter of an hour, 4 GB of memory"
    )
    options = parser.parse_args(arguments)
    settings = (*STANDARD, *DEEP) if options.deep else STANDARD
    held = [check_setting(setting) for setting in table(settings)]
    print("\nOne rule taken away                                                   violates  steps to it")
    caught = [check_mutant(mutant, options.traces) for mutant in MUTANTS]
    print(f"\n{sum(held)} of {len(held)} configurations hold, {sum(caught)} of {len(caught)} mutants are caught")
    return 0 if all(held) and all(caught) else 1


def table(settings: Sequence[Setting]) -> Sequence[Setting]:
    print(f"{'Configuration':32}{'worlds':>9}{'steps':>10}{'depth':>7}{'time':>9}  result, and what it covers")
    return settings


def check_setting(setting: Setting) -> bool:
    result = Search(setting, max_worlds=MAX_WORLDS).run()
    numbers = f"{result.num_worlds:9}{result.num_steps:10}{result.depth:7}{result.elapsed_s:8.1f}s"
    print(f"{setting.name:32}{numbers}  {result.broken or 'holds'}: {setting.bounds()}", flush=True)
    print_trace(result)
    return not result.broken


def check_mutant(mutant: Mutant, with_trace: bool) -> bool:
    result = mutant.search()
    is_caught = result.property_name in mutant.properties
    verdict = f"{result.property_name:8}{len(result.trace):5}" if is_caught else f"SURVIVES: {result.broken}"
    print(f"{mutant.rule:70}{verdict}", flush=True)
    if with_trace or not is_caught:
        print_trace(result)
    return is_caught


def print_trace(result: Result) -> None:
    """One line for each step, what follows from it indented below."""
    for number, (what, *consequences) in enumerate(result.trace, 1):
        print(f"    {number:3}. {what}")
        for consequence in consequences:
            print(f"           so {consequence}")
    if result.trace:
        print(f"         => {result.broken}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
