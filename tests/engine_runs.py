"""Shared by the engine's tests: make requests, run engines dry, compare with `transformers`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from families import Tally, random_prompt, reference_generate

from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine, build_engine
from pdserve.engine.plan import StepResult
from pdserve.engine.sequence import Sequence
from pdserve.proto.types import HandoffId, SamplingParams, WorkerRequest

FamilyDir: TypeAlias = Callable[..., Path]  # the `family_dir` fixture

BLOCK_SIZE = 16
CHUNK_TOKENS = 48

_numbers = itertools.count()


def request(prompt: Iterable[int], max_tokens: int = 16, **sampling: Any) -> WorkerRequest:
    """A greedy request unless `sampling` says otherwise, with an id of its own."""
    params = SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0} | sampling))
    return WorkerRequest(HandoffId(f"r{next(_numbers)}", 0, 0), tuple(prompt), params, timeout_s=60.0)


def tiny_engine(model_dir: Path, **config: Any) -> Engine:
    defaults: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "num_blocks": 96,
        "max_num_batched_tokens": CHUNK_TOKENS,
        "max_num_seqs": 16,
        "device": "cpu",
    }
    return build_engine(model_dir, EngineConfig(**(defaults | config)))


class Clock:
    """Seconds that pass one by one whenever somebody looks."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def run(engine: Engine, sequences: Iterable[Sequence], max_steps: int = 2000) -> list[StepResult]:
    """Add everything and step until nothing is left; the pool must then be whole and free."""
    for sequence in sequences:
        engine.add(sequence)
    clock, results = Clock(), []
    while engine.has_work:
        results.append(engine.step(clock))
        assert len(results) < max_steps, "the engine does not finish"
    engine.pool.check_integrity()
    return results


def output(sequence: Sequence) -> list[int]:
    return list(sequence.token_ids[sequence.num_prompt_tokens :])


def check_parity(model_dir: Path, sequences: Iterable[Sequence], label: str) -> None:
    """Greedy outputs are those of `generate()`; one near tie is forgiven, too few tokens for a share."""
    tally = Tally(label)
    for sequence in sequences:
        prompt = sequence.request.prompt_token_ids
        expected = reference_generate(model_dir, prompt, sequence.request.sampling.max_tokens)
        tally.add(expected, output(sequence), f"prompt of {len(prompt)}")
    assert tally.num_tokens > 0
    assert not tally.mismatches, f"{label}:\n" + "\n".join(tally.mismatches)
    assert tally.num_excused <= 1, f"{label}: {tally.num_excused} near ties"


def greedy_sequences(lengths: Iterable[int], max_tokens: int = 16) -> list[Sequence]:
    return [Sequence(request(random_prompt(n, seed), max_tokens), 0.0) for seed, n in enumerate(lengths)]
