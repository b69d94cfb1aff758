"""With KV that is found instead of computed, the engine still says token for token what `transformers` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_runs import BLOCK_SIZE, CHUNK_TOKENS, Clock, FamilyDir, check_parity, output, request, run, tiny_engine
from families import FAMILIES, awkward_lengths, random_prompt

from pdserve.engine.block_pool import BlockState
from pdserve.engine.engine import Engine
from pdserve.engine.plan import ComputedPart
from pdserve.engine.sequence import Sequence

LENGTHS = awkward_lengths(BLOCK_SIZE, CHUNK_TOKENS)


def greedy(prompt: tuple[int, ...], max_tokens: int = 16, hand_off: bool = False) -> Sequence:
    return Sequence(request(prompt, max_tokens), 0.0, hand_off)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_seen_before_is_decoded_as_generate_does(family: str, family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir(family), num_blocks=128)
    prompts = [random_prompt(n, n) for n in LENGTHS]
    run(engine, map(greedy, prompts))
    again = list(map(greedy, prompts))
    results = run(engine, again)
    for sequence in again:
        assert sequence.num_cached_tokens == (sequence.num_prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert sum(result.num_prefix_query_tokens for result in results) == sum(LENGTHS)
    assert sum(result.num_prefix_hit_tokens for result in results) == sum(one.num_cached_tokens for one in again)
    check_parity(family_dir(family), again, family)
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi"])
def test_prompts_that_begin_alike_share_while_they_run(family: str, family_dir: FamilyDir) -> None:
    engine, clock = tiny_engine(family_dir(family)), Clock()
    common = random_prompt(70, 1)
    cuts = ((70, 1), (70, 40), (64, 3), (33, 20), (16, 50))
    prompts = [common[:cut] + random_prompt(tail, cut) for cut, tail in cuts]
    sequences = [greedy(prompt, 24) for prompt in prompts]
    waiting = list(sequences)
    most_claims = 0
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop(0))
        engine.step(clock)
        engine.step(clock)
        most_claims = max([most_claims, *map(engine.pool.num_claims, range(engine.pool.num_blocks))])
    assert most_claims >= 4
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 64, 64, 32, 16]
    check_parity(family_dir(family), sequences, family)
    engine.pool.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_conversation_goes_on_from_what_was_said(family: str, family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir(family))
    prompt, turns = random_prompt(37, 5), []
    for turn in range(4):
        sequence = greedy(prompt, 23)
        run(engine, [sequence])
        turns.append(sequence)
        prompt = (*sequence.token_ids, *random_prompt(5, turn))
    # The last token said was never computed.
    known = [0, *(len(sequence.token_ids) - 1 for sequence in turns[:-1])]
    assert [sequence.num_cached_tokens for sequence in turns] == [num // BLOCK_SIZE * BLOCK_SIZE for num in known]
    check_parity(family_dir(family), turns, family)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("num_blocks", [9, 11, 13])
def test_preemption_among_sequences_that_share_changes_nothing(
    family: str, num_blocks: int, family_dir: FamilyDir
) -> None:
    engine = tiny_engine(family_dir(family), num_blocks=num_blocks, max_model_len=9 * BLOCK_SIZE)
    common = random_prompt(40, 1)
    first = greedy(common, 4)
    run(engine, [first])
    sequences = [greedy(common[:cut] + random_prompt(4, cut), 60) for cut in (33, 40, 32, 17, 1, 36)]
    results = run(engine, sequences)
    assert any(result.preempted for result in results)
    assert sum(sequence.num_cached_tokens for sequence in sequences) > 0
    check_parity(family_dir(family), [first, *sequences], f"{num_blocks} blocks")
    assert engine.pool.num_free == num_blocks


def test_what_is_evicted_for_others_is_computed_again(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("qwen3"), num_blocks=12, max_model_len=100)
    sequences = [greedy(random_prompt(60, seed), 16) for seed in (0, 1, 0, 2, 3, 0, 1, 2, 2, 3)]
    for sequence in sequences:
        run(engine, [sequence])
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 0, 48, 0, 0, 48, 0, 0, 48, 0]
    check_parity(family_dir("qwen3"), sequences, "evictions")


def test_switched_off_nothing_is_found_and_nothing_is_held(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("llama"), prefix_caching=False)
    sequences = [greedy(random_prompt(40, 1)) for _ in range(2)]
    for sequence in sequences:
        results = run(engine, [sequence])
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 0]
    assert sum(result.num_prefix_query_tokens for result in results) == 0
    assert engine.hold_prefix(random_prompt(40, 1)) == []
    check_parity(family_dir("llama"), sequences, "off")


def prefill_in_parts(source: Engine, sequence: Sequence) -> list[ComputedPart]:
    return [part for result in run(source, [sequence]) for part in result.parts]


def redeem(source: Engine, target: Engine, sequence: Sequence, parts: list[ComputedPart]) -> tuple[Sequence, int]:
    """Hold what the target knows, copy the rest, and let the source's leases go. Also the number of held blocks."""
    prompt = sequence.request.prompt_token_ids
    held = target.hold_prefix(prompt)
    sent = [block for part in parts for block in part.block_ids]
    received = target.pool.take(len(sent) - len(held), BlockState.RECEIVING)
    target.cache.bytes_view()[received] = source.cache.bytes_view()[sent[len(held) :]]
    target.pool.move(received, BlockState.RECEIVING, BlockState.RUNNING)
    source.pool.release(sent, BlockState.LEASED)
    first_token = parts[-1].first_token
    assert first_token is not None
    return Sequence.redeemed(sequence.request, first_token, held + received, 0.0), len(held)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_hand_off_in_parts_of_a_prefix_known_on_either_side(family: str, family_dir: FamilyDir) -> None:
    model_dir = family_dir(family)
    source, target = tiny_engine(model_dir), tiny_engine(model_dir)
    target.pool.take(3, BlockState.QUARANTINED)  # so that block ids differ
    common = random_prompt(100, 1)
    cuts = ((100, 30), (100, 30), (96, 0), (64, 64), (7, 9))
    prompts = [common[:cut] + random_prompt(tail, cut) for cut, tail in cuts]
    redeemed, num_held, num_parts = [], [], []
    for prompt in prompts:
        sequence = greedy(prompt, hand_off=True)
        parts = prefill_in_parts(source, sequence)
        one, held = redeem(source, target, sequence, parts)
        run(target, [one])
        redeemed.append(one)
        num_held.append(held)
        num_parts.append(len(parts))
    assert num_held == [0, 8, 6, 4, 0]
    assert num_parts == [3, 1, 1, 2, 1]
    check_parity(model_dir, redeemed, family)
    assert source.pool.num_free == source.pool.num_blocks
    assert target.pool.num_free == target.pool.num_blocks - 3


def test_a_failed_sequence_leaves_nothing_to_be_found_and_spares_those_that_share_its_prefix(
    family_dir: FamilyDir,
) -> None:
    poisoned = 3
    bans: dict[str, Any] = {"logit_bias": ((poisoned, -1e9),)}
    common = tuple(token for token in random_prompt(60, 2) if token != poisoned)[: 3 * BLOCK_SIZE]
    alone = Sequence(request((*common, 5), 30, **bans), 0.0)
    run(tiny_engine(family_dir("llama")), [alone])
    engine, clock = tiny_engine(family_dir("llama")), Clock()
    model: Any = engine.loaded.model
    model.get_input_embeddings().weight.data[poisoned] = float("nan")
    healthy = Sequence(request((*common, 5), 30, **bans), 0.0)
    engine.add(healthy)
    engine.step(clock)
    engine.step(clock)
    victim = Sequence(request((*common, poisoned, *random_prompt(BLOCK_SIZE, 4)), 8, **bans), 0.0)
    results = run(engine, [victim])
    assert victim.num_cached_tokens == 3 * BLOCK_SIZE
    assert [step.sequence for result in results for step in result.sequences if step.error] == [victim]
    assert output(healthy) == output(alone)
    assert engine.hold_prefix(victim.request.prompt_token_ids) == []
    assert bool(torch.isfinite(engine.cache.tensor).all())
    assert engine.pool.num_free == engine.pool.num_blocks


def test_seeded_sampling_is_the_same_over_found_kv(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("llama"))

    def sampled() -> Sequence:
        return Sequence(request(random_prompt(50, 3), 40, seed=11, temperature=0.9, top_p=0.95), 0.0)

    first, second = sampled(), sampled()
    run(engine, [first])
    run(engine, [second])
    assert second.num_cached_tokens == 48
    assert output(first) == output(second)
