"""Runs one seed to its end and says what became of it."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from simulation.checks import judge, leftovers
from simulation.faults import Faults
from simulation.scenario import Scenario, draw
from simulation.world import LogWatch, World

LONGEST_S = 200.0
STILL_S = 3.0
LOGGER = logging.getLogger("pdserve")


@dataclass(frozen=True, slots=True)
class Report:
    """One run. `lines` are there if they were asked for."""

    seed: int
    title: str
    digest: str
    violations: tuple[str, ...]
    counts: Counter[str]
    num_lines: int
    virtual_s: float
    lines: tuple[str, ...] = ()


def run(seed: int, keep_lines: bool = False, prepare: Callable[[World], None] | None = None) -> Report:
    """`prepare` may change the world before it starts: tests of the simulator itself plant bugs with it."""
    return run_scenario(draw(seed), keep_lines, prepare)


def run_scenario(
    scenario: Scenario, keep_lines: bool = False, prepare: Callable[[World], None] | None = None
) -> Report:
    world = World(scenario)
    title = str(scenario)
    watch = LogWatch(world.trace, keep_lines)
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(watch)
    LOGGER.setLevel(logging.DEBUG if keep_lines else logging.ERROR)
    LOGGER.propagate = False
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        world.loop.at(0.0, None, world.start)
        Faults(world).schedule()
        if prepare is not None:
            prepare(world)
        _run_to_the_end(world)
        judge(world)
        report = Report(
            seed=scenario.seed,
            title=title,
            digest=world.trace.digest(),
            violations=tuple(world.trace.violations),
            counts=world.trace.counts,
            num_lines=len(world.trace.lines),
            virtual_s=world.loop.now_s,
            lines=_lines(world, watch) if keep_lines else (),
        )
    finally:
        world.loop.finish()
        LOGGER.removeHandler(watch)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
        if gc_was_on:
            gc.enable()
    return report


def _run_to_the_end(world: World) -> None:
    """Until the calm, until every client has its answer, and until nothing is left or it is clear that it stays."""
    loop, scenario = world.loop, world.scenario
    loop.run_until(scenario.calm_s)
    while loop.now_s < LONGEST_S and not world.trace.violations:
        loop.run_until(loop.now_s + 1.0)
        if _is_over(world):
            loop.run_until(loop.now_s + STILL_S)
            if _is_over(world):
                return


def _is_over(world: World) -> bool:
    return world.clients.num_open == 0 and not leftovers(world)


def _lines(world: World, watch: LogWatch) -> tuple[str, ...]:
    """The trace, with what was logged in its place."""
    logged = dict[int, list[str]]()
    for place, text in watch.shown:
        logged.setdefault(place, []).append(f"{'':10}  {'log':<12} {text}")
    lines: list[str] = []
    for place, line in enumerate(world.trace.lines):
        lines += logged.get(place, [])
        lines.append(str(line))
    return tuple(lines)
