"""The hand-off protocol, searched exhaustively within small bounds; and that the search would see what is wrong."""

from __future__ import annotations

import pytest
from modelcheck.__main__ import check_mutant
from modelcheck.mutants import MUTANTS, Mutant
from modelcheck.search import Exhausted, Search
from modelcheck.settings import DEEP, FAST, STANDARD
from modelcheck.vocabulary import Setting


@pytest.mark.parametrize("setting", FAST, ids=lambda setting: setting.name)
def test_every_property_holds_within_small_bounds(setting: Setting) -> None:
    result = Search(setting).run()
    assert not result.broken, "\n".join(" | ".join(story) for story in result.trace)
    assert result.num_worlds > 100


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule)
def test_each_rule_is_missed_when_it_is_taken_away(mutant: Mutant) -> None:
    result = mutant.search()
    assert result.property_name in mutant.properties
    assert result.trace


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule)
def test_with_the_rule_nothing_is_broken_where_it_was_without(mutant: Mutant) -> None:
    """Twice as far as the mutant's counterexample, breadth first."""
    try:
        result = Search(mutant.setting, max_worlds=2 * mutant.search().num_worlds).run()
    except Exhausted:
        return
    assert not result.broken


def test_a_counterexample_tells_its_story_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    mutant = next(mutant for mutant in MUTANTS if "wire may write" in mutant.rule)
    assert check_mutant(mutant, with_trace=True)
    told = capsys.readouterr().out
    assert "  1. request A arrives, for p0 and d1" in told
    assert "=> S4: KV of A lands in block 0 of d1: it is free" in told


def test_a_search_that_cannot_be_exhaustive_says_so() -> None:
    with pytest.raises(Exhausted):
        Search(Setting("no fault"), max_worlds=50).run()


def test_settings_have_names_of_their_own() -> None:
    settings = (*STANDARD, *DEEP)
    assert len({setting.name for setting in settings}) == len(settings)


def test_bounds_are_told_in_words() -> None:
    told = Setting("any", targets=(1, 2), crashes=2, losses=1, timers=True).bounds()
    assert told == "2 requests p0-d1+d2, two-sided, 4 blocks, timers, 2 crashes, 1 loss"
