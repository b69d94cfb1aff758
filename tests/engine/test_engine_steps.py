"""What a step reports: finishes, hand-offs, errors, aborts, counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_runs import BLOCK_SIZE, Clock, FamilyDir, check_parity, greedy_sequences, output, request, run, tiny_engine
from families import random_prompt, reference_generate

from pdserve.engine.block_pool import BlockState
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import build_engine
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.sequence import Sequence
from pdserve.proto.errors import ConfigError, DuplicateRequest, InternalError, InvalidRequest
from pdserve.proto.types import FinishReason


def test_every_token_is_reported_once_with_its_index(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("llama"))
    sequences = greedy_sequences((1, 16, 100))
    reported: dict[int, list[tuple[int, int]]] = {id(sequence): [] for sequence in sequences}
    finished = []
    for result in run(engine, sequences):
        for step in result.sequences:
            assert step.token is not None
            reported[id(step.sequence)].append((step.position, step.token.token_id))
            finished += [step.sequence] if step.finish else []
    for sequence in sequences:
        assert reported[id(sequence)] == list(enumerate(output(sequence)))
    assert sorted(map(id, finished)) == sorted(map(id, sequences))


def test_prefill_and_decode_tokens_are_counted_apart(family_dir: FamilyDir) -> None:
    results = run(tiny_engine(family_dir("llama")), greedy_sequences((100, 7), max_tokens=5))
    assert sum(result.num_prefill_tokens for result in results) == 107
    assert sum(result.num_decode_tokens for result in results) == 2 * 4
    assert all(result.num_tokens == result.num_prefill_tokens + result.num_decode_tokens for result in results)


def test_a_stop_token_ends_the_completion_and_is_named(family_dir: FamilyDir) -> None:
    model_dir = family_dir("llama")
    expected = reference_generate(model_dir, random_prompt(9), 16).token_ids
    stop = expected[5]
    first = expected.index(stop)
    sequence = Sequence(request(random_prompt(9), stop_token_ids=(stop,)), 0.0)
    results = run(tiny_engine(model_dir), [sequence])
    assert tuple(output(sequence)) == expected[: first + 1]
    assert results[-1].sequences[0].finish == (FinishReason.STOP, stop)


def test_the_context_ends_a_completion_even_in_a_pool_that_is_just_large_enough(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("llama"), num_blocks=4)
    assert engine.max_model_len == 4 * BLOCK_SIZE + 1
    sequence = Sequence(request(random_prompt(50), max_tokens=400), 0.0)
    results = run(engine, [sequence])
    assert sequence.num_tokens == engine.max_model_len
    assert results[-1].sequences[0].finish == (FinishReason.LENGTH, None)


def test_a_handed_off_sequence_keeps_its_blocks_leased(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("llama"))
    sequence = Sequence(request(random_prompt(33)), 0.0, hand_off=True)
    results = run(engine, [sequence])
    (step,) = results[-1].sequences
    assert (step.handed_off, step.finish, step.position) == (True, None, 0)
    assert len(sequence.block_ids) == 3 == engine.pool.count(BlockState.LEASED)
    (part,) = [part for result in results for part in result.parts]
    assert (part.sequence, part.first_block, part.block_ids) == (sequence, 0, tuple(sequence.block_ids))
    assert [part.first_token] == output(sequence)
    assert not engine.has_work


def test_a_completion_of_one_token_is_finished_and_not_handed_off(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("llama"))
    (step,) = run(engine, [Sequence(request(random_prompt(5), max_tokens=1), 0.0, hand_off=True)])[-1].sequences
    assert (step.handed_off, step.finish) == (False, (FinishReason.LENGTH, None))
    assert engine.pool.num_free == engine.pool.num_blocks


def test_bad_logits_end_one_sequence_and_spare_the_others(family_dir: FamilyDir) -> None:
    poisoned = 3
    bans: dict[str, Any] = {"logit_bias": ((poisoned, -1e9),)}
    prompts = [tuple(token for token in random_prompt(n, n) if token != poisoned) for n in (20, 33)]
    alone = [Sequence(request(prompt, **bans), 0.0) for prompt in prompts]
    run(tiny_engine(family_dir("llama")), alone)
    engine = tiny_engine(family_dir("llama"), num_blocks=12, max_model_len=64)
    model: Any = engine.loaded.model
    model.get_input_embeddings().weight.data[poisoned] = float("nan")
    healthy = [Sequence(request(prompt, **bans), 0.0) for prompt in prompts]
    victim = Sequence(request((5, poisoned, 7)), 0.0)
    results = run(engine, [healthy[0], victim, healthy[1]])
    (failed,) = [step for result in results for step in result.sequences if step.error]
    assert failed.sequence is victim
    assert isinstance(failed.error, InternalError)
    assert list(map(output, healthy)) == list(map(output, alone))
    assert engine.pool.num_free == 12
    assert bool(torch.isfinite(engine.cache.tensor).all()), "the failed sequence left its NaN behind"


def test_an_aborted_sequence_frees_its_blocks_at_once(family_dir: FamilyDir) -> None:
    engine, clock = tiny_engine(family_dir("llama")), Clock()
    sequences = greedy_sequences((100, 20, 30))
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(4):
        engine.step(clock)
    assert engine.abort(sequences[1].request.id) is sequences[1]
    assert engine.abort(sequences[1].request.id) is None
    assert sequences[1].block_ids == []
    engine.pool.check_integrity()
    run(engine, [])
    check_parity(family_dir("llama"), [sequences[0], sequences[2]], "after an abort")


def test_impossible_requests_are_refused_at_the_door(family_dir: FamilyDir) -> None:
    engine = tiny_engine(family_dir("llama"), num_blocks=8, max_model_len=100)
    with pytest.raises(InvalidRequest, match="prompt: is empty"):
        engine.scheduler.check(request(()))
    with pytest.raises(InvalidRequest, match="100 tokens leave no room"):
        engine.add(Sequence(request(random_prompt(100)), 0.0))
    sequence = Sequence(request(random_prompt(9)), 0.0)
    engine.add(sequence)
    with pytest.raises(DuplicateRequest):
        engine.add(Sequence(sequence.request, 0.0))
    run(engine, [])


def test_a_context_larger_than_the_pool_is_a_configuration_error(family_dir: FamilyDir) -> None:
    with pytest.raises(ConfigError, match=r"engine.max_model_len: 200 is more than the pool's 64 tokens"):
        tiny_engine(family_dir("llama"), num_blocks=4, max_model_len=200)
    with pytest.raises(ConfigError, match=r"engine.max_model_len: 4096 is more than the model's 512"):
        tiny_engine(family_dir("llama"), max_model_len=4096)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        build_engine(family_dir("llama"), EngineConfig(device="cpu", kv_cache_memory_bytes=1))


def test_the_pool_lives_in_the_buffer_that_it_was_given(family_dir: FamilyDir) -> None:
    buffers = []

    def allocate(num_bytes: int) -> torch.Tensor:
        buffers.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return buffers[-1]

    config = EngineConfig(device="cpu", num_blocks=8, block_size=BLOCK_SIZE)
    engine = build_engine(family_dir("llama"), config, allocate)
    (buffer,) = buffers
    assert len(buffer) == KVCache.required_bytes(engine.loaded.layout, 8)
    sequence = Sequence(request(random_prompt(20)), 0.0, hand_off=True)
    run(engine, [sequence])
    blocks = buffer.view(8, -1)
    assert [bool(block.any()) for block in blocks] == [block in sequence.block_ids for block in range(8)]
    assert engine.cache.bytes_view().data_ptr() == buffer.data_ptr()


def test_the_phases_of_a_sequence_add_up(family_dir: FamilyDir) -> None:
    sequence = Sequence(request(random_prompt(100), 4), 0.5)
    run(tiny_engine(family_dir("llama")), [sequence])
    phases = sequence.phases
    assert phases.prefill_queue_s == 0.5
    assert sequence.last_token_s == sequence.arrival_s + phases.prefill_queue_s + phases.prefill_s + phases.decode_s
    assert (phases.decode_queue_s, phases.transferred_tokens, phases.recomputed_tokens) == (0.0, 0, 0)
