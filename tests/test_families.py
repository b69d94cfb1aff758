"""The tiny checkpoints can notice wrong KV: decided, varied, and dependent on every part of the context."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import (
    EXCUSABLE_GAP,
    FAMILIES,
    SLIDING_WINDOW_TOKENS,
    VOCAB_SIZE,
    Excused,
    Match,
    Mismatch,
    Reference,
    Tally,
    awkward_lengths,
    build_family,
    compare,
    random_prompt,
    reference_generate,
    reference_model,
)
from transformers import AutoConfig, AutoModelForCausalLM

NUM_NEW_TOKENS = 12
# Longer than the sliding window, so that windowed families drop some of the prompt.
PROMPTS = tuple(random_prompt(length, seed) for seed in range(4) for length in (12, SLIDING_WINDOW_TOKENS + 14))
WINDOWED = ("mistral", "gemma2", "gemma3")
every_family = pytest.mark.parametrize("name", FAMILIES)


def references(model_dir: Path) -> list[Reference]:
    return [reference_generate(model_dir, prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]


def share_changed(model_dir: Path, position: int) -> float:
    """Share of prompts whose continuation changes with the one token at `position`."""
    changed = 0
    for prompt, before in zip(PROMPTS, references(model_dir), strict=True):
        other = 3 + (prompt[position] + 97) % (VOCAB_SIZE - 3)
        swapped = (*prompt[:position], other, *prompt[position + 1 :])
        changed += reference_generate(model_dir, swapped, NUM_NEW_TOKENS).token_ids != before.token_ids
    return changed / len(PROMPTS)


@every_family
def test_the_best_token_is_rarely_nearly_tied(name: str, family_dir: Callable[[str], Path]) -> None:
    gaps = [gap for reference in references(family_dir(name)) for gap in reference.gaps]
    assert sum(gap < EXCUSABLE_GAP for gap in gaps) <= 1
    assert sorted(gaps)[len(gaps) // 2] > 0.3


@every_family
def test_most_continuations_do_not_collapse_into_a_loop(name: str, family_dir: Callable[[str], Path]) -> None:
    distinct = [len(set(reference.token_ids)) for reference in references(family_dir(name))]
    assert sorted(distinct)[len(distinct) // 2] >= NUM_NEW_TOKENS // 2
    assert len({reference.token_ids for reference in references(family_dir(name))}) == len(PROMPTS)


@every_family
def test_changing_one_early_prompt_token_changes_most_continuations(
    name: str, family_dir: Callable[[str], Path]
) -> None:
    assert share_changed(family_dir(name), position=3) >= 0.75


@pytest.mark.parametrize("name", WINDOWED)
def test_attending_outside_the_sliding_window_changes_long_continuations(
    name: str, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(family_dir(name))
    assert config.sliding_window == SLIDING_WINDOW_TOKENS
    unwindowed = tmp_path / name
    shutil.copytree(family_dir(name), unwindowed)
    config.sliding_window = config.max_position_embeddings
    config.save_pretrained(unwindowed)
    pairs = zip(PROMPTS, references(family_dir(name)), references(unwindowed), strict=True)
    longer = [(ours, wide) for prompt, ours, wide in pairs if len(prompt) > SLIDING_WINDOW_TOKENS]
    assert sum(ours.token_ids != wide.token_ids for ours, wide in longer) >= 0.75 * len(longer)


@every_family
def test_rounding_errors_stay_far_below_the_excusable_gap(name: str, family_dir: Callable[[str], Path]) -> None:
    """Sharp attention amplifies rounding; were it to reach the gap, right engines would differ from `generate()`."""
    exact = AutoModelForCausalLM.from_pretrained(family_dir(name), dtype=torch.float64, attn_implementation="eager")
    prompt = torch.tensor([PROMPTS[-1]])
    with torch.inference_mode():
        error = (reference_model(family_dir(name))(prompt).logits - exact.eval()(prompt).logits).abs().max().item()
    assert error < EXCUSABLE_GAP / 2


@every_family
def test_the_reference_decodes_past_the_end_of_sequence_token(name: str, family_dir: Callable[[str], Path]) -> None:
    for reference in references(family_dir(name)):
        assert len(reference.token_ids) == len(reference.gaps) == NUM_NEW_TOKENS


def test_the_same_seed_writes_the_same_weights_and_another_seed_does_not(tmp_path: Path) -> None:
    first, again, other = (
        (build_family("llama", tmp_path / folder, seed) / "model.safetensors").read_bytes()
        for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


def test_awkward_lengths_surround_every_edge() -> None:
    assert awkward_lengths(16, 64) == (1, 15, 16, 17, 48, 49, 64, 65, 136)
    assert awkward_lengths(1, 4)[0] == 1


def test_only_a_nearly_tied_step_excuses_a_difference() -> None:
    reference = Reference((5, 6, 7), (1.0, EXCUSABLE_GAP / 2, 1.0))
    assert compare(reference, (5, 6, 7)) == Match()
    assert compare(reference, (5, 9, 9)) == Excused(1, EXCUSABLE_GAP / 2)
    assert compare(reference, (9, 6, 7)) == Mismatch(0, 5, 9, 1.0)
    assert compare(reference, (5, 6)) == Mismatch(2, 7, None, 1.0)
    assert compare(reference, (5, 6, 7, 8)) == Mismatch(3, None, 8, None)


def test_a_tally_fails_on_a_mismatch_on_many_excuses_and_on_nothing() -> None:
    tied = Reference((5,), (0.0,))
    decided = Reference((5,) * 2000, (1.0,) * 2000)
    with pytest.raises(AssertionError, match="nothing was compared"):
        Tally("empty").check()
    tally = Tally("one excuse in many")
    tally.add(tied, (6,))
    tally.add(decided, decided.token_ids)
    tally.check()
    tally.add(tied, (6,))
    tally.add(tied, (6,))
    with pytest.raises(AssertionError, match="tokens excused"):
        tally.check()
    wrong = Tally("wrong")
    wrong.add(decided, (5, 6), case="llama/17")
    with pytest.raises(AssertionError, match="llama/17"):
        wrong.check()
