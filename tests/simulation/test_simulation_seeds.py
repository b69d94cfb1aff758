"""A number of seeds for every run of the tests, and that a seed always takes the same course.

`make simulate` runs thousands.
"""

from __future__ import annotations

from collections import Counter

from simulation.__main__ import MUST_HAPPEN, problems
from simulation.run import Report, run
from simulation.seeds import digests_elsewhere, run_some, seeds_of

SEEDS = range(60)
# Far from all that thousands of seeds must show.
SOON = ("admissions", "parts pulled again", "corruptions detected", "quarantines at the target", "worker deaths")


def test_nothing_is_violated_over_a_number_of_seeds() -> None:
    reports = run_some(list(SEEDS))
    failed = [(report.title, report.violations) for report in reports if report.violations]
    assert not failed
    counts: Counter[str] = sum((report.counts for report in reports), Counter())
    assert not [name for name in SOON if not counts[name]]
    assert counts["ends: finished"] > len(SEEDS)


def test_a_seed_takes_the_same_course_again() -> None:
    for seed in (1, 5, 9):
        first, second = run(seed, keep_lines=True), run(seed, keep_lines=True)
        assert first.lines == second.lines
        assert first.digest == second.digest


def test_a_seed_takes_the_same_course_in_a_process_that_hashes_otherwise() -> None:
    seeds = (2, 7, 11)
    assert digests_elsewhere(seeds, hash_seed=3) == {seed: run(seed).digest for seed in seeds}


def test_seeds_differ() -> None:
    assert run(1).digest != run(2).digest


def test_a_trace_tells_the_story_of_a_request() -> None:
    report = run(0, keep_lines=True)
    story = "\n".join(report.lines)
    for words in ("starts as generation", "gets r", "Expect r", "Prefill r", "fetches r", "admits r", "ends after"):
        assert words in story


def test_what_never_happens_fails_the_command() -> None:
    calm = [Report(seed, "", "", (), Counter({"admissions": 1}), 1, 1.0) for seed in range(500)]
    told = problems(calm, [])
    assert "never happened, so was not tested: leases lapsed" in told
    assert "never happened, so was not tested: admissions" not in told
    assert len(MUST_HAPPEN) == len(set(MUST_HAPPEN))


def test_a_failed_seed_is_named_with_its_replay() -> None:
    failed = Report(17, "seed 17: a cluster", "", ("1.0 d0: something",), Counter(), 1, 1.0)
    told = "\n".join(problems([failed], [failed]))
    assert "something" in told
    assert "make simulate SEEDS=17-17 ARGS=--trace" in told


def test_seeds_are_a_number_or_a_range() -> None:
    assert list(seeds_of("3")) == [0, 1, 2]
    assert list(seeds_of("17-19")) == [17, 18, 19]
