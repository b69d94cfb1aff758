"""With an int8 pool the engine says what `transformers` says when its cache is rounded the same way: token for token.

So sliding windows, soft caps and shared heads are as right as without, and nothing depends on how prompts are cut, on
what shares the batch or on preemption.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import BLOCK_SIZE, CHUNK_TOKENS, Clock, FamilyDir, greedy_sequences, output, request, run, tiny_engine
from families import FAMILIES, Match, Reference, awkward_lengths, compare, random_prompt, reference_model
from transformers import DynamicCache

from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine, build_engine
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.sequence import Sequence
from pdserve.kv_transfer.codec import convert
from pdserve.proto.errors import InternalError
from pdserve.proto.kv_blocks import dequantise, quantise, scales
from pdserve.proto.types import KVLayout

LENGTHS = awkward_lengths(BLOCK_SIZE, CHUNK_TOKENS)
MAX_TOKENS = 12
NEAR_TIE = 0.02


class RoundedCache(DynamicCache):
    """The cache of `transformers`, which keeps what is left of keys and values after int8."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (dequantise(*quantise(states), states.dtype) for states in (key_states, value_states))
        keys, values = super().update(key, value, layer_idx, *args, **kwargs)
        return keys, values


def rounded_reference(model_dir: Path, prompt: tuple[int, ...], max_tokens: int) -> Reference:
    """What `generate()` says over a rounded cache."""
    model: Any = reference_model(model_dir)
    ids = torch.tensor([prompt])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        past_key_values=RoundedCache(config=model.config),
        return_dict_in_generate=True,
        output_logits=True,
    )
    top = torch.cat(result.logits).topk(2, dim=-1).values  # [max_tokens, 2]
    return Reference(tuple(result.sequences[0, len(prompt) :].tolist()), tuple((top[:, 0] - top[:, 1]).tolist()))


def check(model_dir: Path, sequences: list[Sequence]) -> None:
    """Every token is that of `generate()`, but for one near tie: a number between two steps may fall to either side."""
    near_ties = 0
    for sequence in sequences:
        prompt = sequence.request.prompt_token_ids
        expected = rounded_reference(model_dir, prompt, sequence.request.sampling.max_tokens)
        result = compare(expected, output(sequence))
        excused = not isinstance(result, Match) and result.gap is not None and result.gap < NEAR_TIE
        assert isinstance(result, Match) or excused, f"prompt of {len(prompt)}: {result}"
        near_ties += excused
    assert sequences
    assert near_ties <= 1


def int8_engine(model_dir: Path, **config: Any) -> Engine:
    engine = tiny_engine(model_dir, kv_cache_dtype="int8", **config)
    assert engine.cache.tensor.dtype == torch.int8
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_strangers_is_decoded_as_over_a_rounded_cache(family: str, family_dir: FamilyDir) -> None:
    engine = int8_engine(family_dir(family))
    sequences = greedy_sequences(LENGTHS, MAX_TOKENS)
    run(engine, sequences)
    check(family_dir(family), sequences)
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize(("block_size", "chunk"), [(1, 5), (4, 7), (16, 1), (64, 128)])
def test_block_and_chunk_sizes_do_not_matter(block_size: int, chunk: int, family_dir: FamilyDir) -> None:
    engine = int8_engine(
        family_dir("mistral"),
        block_size=block_size,
        num_blocks=512 // block_size,
        max_num_batched_tokens=chunk,
        max_num_seqs=1,
    )
    sequences = greedy_sequences((1, 31, 65), MAX_TOKENS)
    run(engine, sequences)
    check(family_dir("mistral"), sequences)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_preempted_sequences_are_recomputed_to_the_same_tokens(family: str, family_dir: FamilyDir) -> None:
    engine = int8_engine(family_dir(family), num_blocks=9, max_model_len=9 * BLOCK_SIZE)
    sequences = greedy_sequences((15, 30, 17, 40, 33, 2), max_tokens=32)
    results = run(engine, sequences)
    assert any(result.preempted for result in results)
    check(family_dir(family), sequences)


def test_stale_nan_in_freed_blocks_harms_nobody(family_dir: FamilyDir) -> None:
    engine = int8_engine(family_dir("llama"))
    engine.cache.bytes_view().fill_(0xFF)
    assert bool(torch.isnan(scales(engine.cache.bytes_view(), engine.cache.layout)).all())
    sequences = greedy_sequences(LENGTHS, MAX_TOKENS)
    run(engine, sequences)
    check(family_dir("llama"), sequences)


def test_half_precision_runs_to_the_end(family_dir: FamilyDir) -> None:
    for family in ("llama", "gemma2"):
        engine = int8_engine(family_dir(family), dtype="bfloat16")
        sequences = greedy_sequences((1, 17, 100))
        run(engine, sequences)
        assert [len(output(sequence)) for sequence in sequences] == [16, 16, 16]


def test_a_model_that_computes_nan_fails_its_sequence_and_leaves_nothing_behind(family_dir: FamilyDir) -> None:
    poisoned = 3
    bans: dict[str, Any] = {"logit_bias": ((poisoned, -1e9),)}
    prompt = tuple(token for token in random_prompt(33) if token != poisoned)
    alone, healthy = (Sequence(request(prompt, **bans), 0.0) for _ in range(2))
    run(int8_engine(family_dir("llama")), [alone])
    engine = int8_engine(family_dir("llama"), num_blocks=12, max_model_len=64)
    model: Any = engine.loaded.model
    model.get_input_embeddings().weight.data[poisoned] = float("nan")
    victim = Sequence(request((5, poisoned, 7)), 0.0)
    results = run(engine, [healthy, victim])
    (failed,) = [step for result in results for step in result.sequences if step.error]
    assert failed.sequence is victim
    assert isinstance(failed.error, InternalError)
    assert output(healthy) == output(alone)
    assert bool(torch.isfinite(scales(engine.cache.bytes_view(), engine.cache.layout)).all()), "its NaN is still there"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_stored_row_that_was_not_finite_fails_whoever_reads_it(bad: float, family_dir: FamilyDir) -> None:
    engine, clock = int8_engine(family_dir("llama")), Clock()
    sequence = Sequence(request(random_prompt(20)), 0.0)
    engine.add(sequence)
    engine.step(clock)
    data, scale = quantise(torch.tensor([bad] + [1.0] * 15))
    place = (sequence.block_ids[0], 1, 0, 3, 1)
    engine.cache.tensor[place] = data
    scales(engine.cache.bytes_view(), engine.cache.layout)[place] = scale
    (step,) = engine.step(clock).sequences
    assert isinstance(step.error, InternalError)


LAYOUT = KVLayout("model", "int8", num_layers=3, num_kv_heads=2, head_dim=5, block_size=4)


def test_a_new_token_changes_no_byte_of_the_others() -> None:
    cache = KVCache(LAYOUT, num_blocks=6)
    fill = torch.randint(0, 120, cache.bytes_view().shape, generator=torch.Generator().manual_seed(0))
    cache.bytes_view().copy_(fill)
    before = cache.bytes_view().clone()
    key, value = torch.randn(2, 2, 2, 5, generator=torch.Generator().manual_seed(1)).unbind()  # two tokens
    cache.write(1, cache.write_index(torch.tensor([9, 3])), key, value)
    read = cache.gather(1, cache.read_index(torch.tensor([2, 0])), torch.float32)  # [2 * 2, 4, 2, 5]
    for block, slot, token in ((0, 1, 0), (1, 3, 1)):
        for row, wanted in ((read[block, slot], key[token]), (read[2 + block, slot], value[token])):
            assert torch.equal(row, dequantise(*quantise(wanted), torch.float32))
    changed = KVCache(LAYOUT, 6, buffer=(cache.bytes_view() != before).to(torch.uint8).flatten())
    touched = changed.tensor.any(-1) | (scales(changed.bytes_view(), LAYOUT) != 0)  # [blocks, layers, 2, slots, heads]
    assert {tuple(place) for place in touched.any(-1).nonzero().tolist()} == {
        (block, 1, kind, slot) for block, slot in ((2, 1), (0, 3)) for kind in (0, 1)
    }


def test_blocks_are_moved_and_cleared_as_bytes() -> None:
    cache = KVCache(LAYOUT, num_blocks=4)
    assert cache.bytes_view().shape == (4, LAYOUT.block_bytes)
    assert KVCache.required_bytes(LAYOUT, 4) == 4 * LAYOUT.block_bytes == 4 * (240 + 48 * 4)
    rows = torch.randn(2, 4, 2, 5, generator=torch.Generator().manual_seed(1))
    for layer in range(3):
        cache.write(layer, cache.write_index(torch.arange(4, 8)), rows[0], rows[1])
    cache.bytes_view()[3] = cache.bytes_view()[1]
    for layer in range(3):
        old, new = (cache.gather(layer, cache.read_index(torch.tensor([block])), torch.float32) for block in (1, 3))
        assert bool(old.any())
        assert torch.equal(old, new)
    cache.clear(torch.tensor([1]))
    assert not bool(cache.bytes_view()[1].any())
    assert bool(cache.bytes_view()[3].any())


def test_the_same_memory_holds_more_tokens(family_dir: FamilyDir) -> None:
    sizes = [
        build_engine(
            family_dir("qwen3"), EngineConfig(device="cpu", kv_cache_dtype=dtype, kv_cache_memory_bytes=1 << 20)
        ).pool.num_blocks
        for dtype in ("auto", "int8")
    ]
    assert sizes[1] == (1 << 20) // (16 * 2 * 2 * 2 * (32 + 4))  # tokens, layers, key and value, heads, row and scale
    assert sizes[1] > 3.5 * sizes[0]


def test_blocks_converted_to_int8_are_those_of_an_int8_pool() -> None:
    exact, rounded = KVCache(replace(LAYOUT, dtype="float32"), num_blocks=4), KVCache(LAYOUT, num_blocks=4)
    for layer in range(3):
        key, value = torch.randn(2, 7, 2, 5, generator=torch.Generator().manual_seed(layer)).unbind()  # seven tokens
        for cache in (exact, rounded):
            cache.write(layer, cache.write_index(torch.arange(4, 11)), key, value)
    converted = torch.zeros_like(rounded.bytes_view())
    convert(exact.bytes_view(), exact.layout, 0, 16, converted, range(4), rounded.layout)
    assert bool(converted.any())
    assert torch.equal(converted, rounded.bytes_view())
