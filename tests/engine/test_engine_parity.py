"""The engine says, token for token, what `transformers` says, whatever shares the batch and however it is cut."""

from __future__ import annotations

import pytest
import torch
from engine_runs import (
    BLOCK_SIZE,
    CHUNK_TOKENS,
    Clock,
    FamilyDir,
    check_parity,
    greedy_sequences,
    output,
    request,
    run,
    tiny_engine,
)
from families import FAMILIES, awkward_lengths, random_prompt

from pdserve.engine.block_pool import BlockState
from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Sequence

LENGTHS = awkward_lengths(BLOCK_SIZE, CHUNK_TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_strangers_is_decoded_as_generate_does(family: str, family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir(family))
    sequences = greedy_sequences(LENGTHS, max_tokens=24)
    run(engine, sequences)
    check_parity(family_dir(family), sequences, family)
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_request_alone_is_decoded_as_generate_does(family: str, family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir(family))
    sequences = greedy_sequences(LENGTHS)
    for sequence in sequences:
        run(engine, [sequence])
    check_parity(family_dir(family), sequences, family)


@pytest.mark.parametrize(("block_size", "chunk"), [(1, 5), (4, 7), (16, 1), (64, 128)])
def test_block_and_chunk_sizes_do_not_matter(block_size: int, chunk: int, family_dir: FamilyDir) -> None:
    model_dir = family_dir("mistral")
    engine = tiny_engine(
        model_dir, block_size=block_size, num_blocks=512 // block_size, max_num_batched_tokens=chunk, max_num_seqs=1
    )
    sequences = greedy_sequences((1, 31, 65))
    run(engine, sequences)
    check_parity(model_dir, sequences, f"block {block_size}, chunk {chunk}")


def test_late_arrivals_do_not_disturb_running_sequences(family_dir: FamilyDir) -> None:
    engine, clock = tiny_engine(family_dir("qwen3")), Clock()
    sequences = greedy_sequences((33, 5, 100, 16, 1, 64))
    waiting = list(sequences)
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop(0))
        engine.step(clock)
        engine.step(clock)
    check_parity(family_dir("qwen3"), sequences, "late arrivals")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("num_blocks", [9, 10, 11, 12, 13, 14, 16])
def test_preempted_sequences_are_recomputed_to_the_same_tokens(
    family: str, num_blocks: int, family_dir: FamilyDir
) -> None:
    engine = tiny_engine(family_dir(family), num_blocks=num_blocks, max_model_len=9 * BLOCK_SIZE)
    sequences = greedy_sequences((15, 30, 17, 40, 33, 2), max_tokens=48)
    results = run(engine, sequences)
    preempted = [sequence for result in results for sequence in result.preempted]
    assert preempted
    assert any(sequence.num_recomputed_tokens > 0 for sequence in preempted)
    check_parity(family_dir(family), sequences, f"{num_blocks} blocks")
    assert engine.pool.num_free == num_blocks


def hand_off(source: Engine, target: Engine, sequence: Sequence) -> Sequence:
    """Prefill on `source`, copy the bytes of the leased blocks to other block ids of `target`, redeem there."""
    run(source, [sequence])
    (first_token,) = output(sequence)
    leased = list(sequence.block_ids)
    assert source.pool.count(BlockState.LEASED) == len(leased)
    received = target.pool.take(len(leased), BlockState.RECEIVING)[::-1]
    target.cache.bytes_view()[received] = source.cache.bytes_view()[leased]
    target.pool.move(received, BlockState.RECEIVING, BlockState.RUNNING)
    source.pool.unlabel(leased)
    source.cache.clear(torch.tensor(leased))
    source.pool.release(leased, BlockState.LEASED)
    return Sequence.redeemed(sequence.request, first_token, received, arrival_s=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_handed_off_sequence_goes_on_as_if_nothing_happened(family: str, family_dir: FamilyDir) -> None:
    model_dir = family_dir(family)
    source, target = tiny_engine(model_dir, num_blocks=32), tiny_engine(model_dir)
    target.pool.take(3, BlockState.QUARANTINED)  # so that block ids differ
    redeemed = [hand_off(source, target, Sequence(request(random_prompt(n, n)), 0.0, hand_off=True)) for n in LENGTHS]
    locals_ = greedy_sequences((50, 3))
    run(target, [*locals_, *redeemed])
    check_parity(model_dir, [*redeemed, *locals_], family)
    assert all(sequence.num_recomputed_tokens == 0 for sequence in redeemed)
    assert source.pool.num_free == 32


def test_a_redeemed_sequence_survives_preemption(family_dir: FamilyDir) -> None:
    model_dir = family_dir("llama")
    source = tiny_engine(model_dir, num_blocks=32)
    target = tiny_engine(model_dir, num_blocks=13, max_model_len=128)
    redeemed = [
        hand_off(source, target, Sequence(request(random_prompt(n, n), 60), 0.0, hand_off=True)) for n in (31, 64, 20)
    ]
    results = run(target, redeemed)
    assert any(result.preempted for result in results)
    check_parity(model_dir, redeemed, "redeemed and preempted")
    assert target.pool.num_free == 13


def test_stale_nan_in_freed_blocks_harms_nobody(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("llama"))
    engine.cache.tensor.fill_(float("nan"))
    sequences = greedy_sequences(LENGTHS)
    run(engine, sequences)
    check_parity(family_dir("llama"), sequences, "pool full of NaN")


def test_half_precision_runs_to_the_end(family_dir: FamilyDir) -> None:
    for family in ("llama", "gemma2"):
        engine = tiny_engine(family_dir(family), dtype="bfloat16")
        sequences = greedy_sequences((1, 17, 100))
        run(engine, sequences)
        assert [len(output(sequence)) for sequence in sequences] == [16, 16, 16]


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 200, "repetition_penalty": 1.1, "presence_penalty": 0.2}


def test_seeded_sampling_is_the_same_alone_in_a_batch_and_after_preemption(family_dir: FamilyDir) -> None:
    def sequences() -> list[Sequence]:
        return [Sequence(request(random_prompt(n, n), 40, seed=n, **SAMPLED), 0.0) for n in (15, 30, 17, 40, 33, 2)]

    alone, batched, squeezed = sequences(), sequences(), sequences()
    roomy = tiny_engine(family_dir("llama"))
    for sequence in alone:
        run(roomy, [sequence])
    run(roomy, batched)
    tight = tiny_engine(family_dir("llama"), num_blocks=9, max_model_len=9 * BLOCK_SIZE)
    assert any(result.preempted for result in run(tight, squeezed))
    assert list(map(output, alone)) == list(map(output, batched)) == list(map(output, squeezed))
    other = Sequence(request(random_prompt(15, 15), 40, seed=16, **SAMPLED), 0.0)
    run(roomy, [other])
    assert output(other) != output(alone[0])
