"""10,000 GPUs on paper: cells of several sizes simulated, and what a cell's size costs its router and controller.

    python bench/scale.py [--json] [--trace FILE] [--seconds S] [--only GROUP]

Groups of rows, cheap ones first:

    yardstick    a loop in Python: how fast this machine is now
    router       placing a request among N workers; taking in one step of a worker with B sequences
    process      a whole router process with N pretended workers: a request, a token, a step without tokens
    controller   the fleet message to every watcher, and the links of all pairs
    planner      set-ups that `pdserve tune` has to choose from; simulated requests per second
    loss         a worker dies, in cells of three sizes; failures to be expected a day
    split        traffic dealt out to cells by turns instead of at random
    cells        attainment and latency by cell size and rate, and the goodput per GPU that follows
    whole        all 40 cells of 250 workers at one rate: 10,000 GPUs

One worker is one GPU. Its profile is made up, of the order of a 70-billion-parameter model in 8 bits on a GPU of
141 GB. Lengths are those of a trace if one is given (azure_2023_conv.csv), else synthetic of the same statistics.
The last four simulate; `--seconds` is for how long, of simulated time (small cells of `cells` run for longer).
docs/scale.md says what came out. All of it takes about half an hour on two cores, most of it `cells` and `whole`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from _cluster import Row
from _scale_costs import controller_rows, planner_rows, router_rows, speed_rows, yardstick_rows
from _scale_router import process_rows
from _scale_rows import cell_rows, loss_rows, split_rows, whole_rows

SECONDS = 20.0
OUTPUT_TOKENS = 211.0
"""Of a request, in the mean of Azure's conversations."""

ROW_WIDTH = 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--trace", type=Path, help="azure_2023_conv.csv or another one")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of simulated time")
    parser.add_argument("--only", help="one of the groups above, or one row of them")
    arguments = parser.parse_args()
    trace = None if arguments.trace is None else arguments.trace.resolve()
    for one in wanted(groups(trace, arguments.seconds), arguments.only):
        text = f"{one['name']:>{ROW_WIDTH}} {one['value']:>12} {one['unit']:<11} {one['note']}"
        print(json.dumps(one) if arguments.json else text, flush=True)


def wanted(found: dict[str, Callable[[], Iterator[Row]]], only: str | None) -> Iterator[Row]:
    """Everything, one group, or the first row of a name."""
    chosen = [make for name, make in found.items() if only in (None, name)]
    rows = chain.from_iterable(make() for make in chosen or found.values())
    return rows if chosen else islice((one for one in rows if one["name"] == only), 1)


def groups(trace: Path | None, seconds: float) -> dict[str, Callable[[], Iterator[Row]]]:
    return {
        "yardstick": yardstick_rows,
        "router": router_rows,
        "process": lambda: process_rows(OUTPUT_TOKENS),
        "controller": controller_rows,
        "planner": lambda: chain(planner_rows(), speed_rows(trace)),
        "loss": lambda: loss_rows(trace, seconds),
        "split": lambda: split_rows(trace, seconds),
        "cells": lambda: cell_rows(trace, seconds),
        "whole": lambda: whole_rows(trace, seconds),
    }


if __name__ == "__main__":
    main()
