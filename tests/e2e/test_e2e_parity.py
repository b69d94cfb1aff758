"""Greedy output through the whole cluster equals `transformers` `generate()`, token for token.

Real Ray actors, real gRPC, real links; every prompt of a case runs at once with all the others, so each is batched with
strangers. Lengths lie around every edge: one token, a block less one, a block, one more, several, longer than a chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families import Tally, awkward_lengths, random_prompt, reference_generate_all
from harness import Cluster, running

from pdserve.client import AsyncClient, Completion

pytestmark = pytest.mark.cluster

BLOCK_SIZE = 16
CHUNK_TOKENS = 64
MAX_TOKENS = 64
SMALL_BLOCKS = "decode.engine.block_size=8"
SPLIT = ("prefill.replicas=1", "decode.replicas=1")


@dataclass(frozen=True, slots=True)
class Case:
    """One model in one cluster. `seeds` multiplies the awkward lengths into prompts."""

    label: str
    model: str
    settings: tuple[str, ...]
    seeds: int = 5

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        lengths = awkward_lengths(BLOCK_SIZE, CHUNK_TOKENS)
        return [random_prompt(length, seed) for seed in range(self.seeds) for length in lengths]


CASES = (
    Case("demo, 1P1D", "demo", SPLIT),
    Case("qwen2, 1P1D, gloo", "qwen2", (*SPLIT, "kv_transfer.links=[gloo]")),
    Case("mistral, 1P1D, shm", "mistral", (*SPLIT, "kv_transfer.links=[shm]")),
    Case("phi3, 1P1D, gloo, block sizes differ", "phi3", (*SPLIT, "kv_transfer.links=[gloo]", SMALL_BLOCKS)),
    Case("qwen3, 2P1D, shm", "qwen3", ("prefill.replicas=2", "decode.replicas=1", "kv_transfer.links=[shm]")),
    Case("gemma2, 1P2D, gloo", "gemma2", ("prefill.replicas=1", "decode.replicas=2", "kv_transfer.links=[gloo]")),
    Case("llama, mixed x2", "llama", ("mixed.replicas=2",)),
    # 26 blocks of 16 for sequences of up to 13: the decode worker must preempt and recompute.
    Case("llama, 1P1D, preempted", "llama", (*SPLIT, "decode.engine.num_blocks=26", "decode.engine.max_num_seqs=8")),
)


def params() -> list[Any]:
    """A cluster takes a quarter of a minute: those whose roles and links others have too are left to CI."""
    slow = ("demo, 1P1D", "mistral, 1P1D, shm", "qwen3, 2P1D, shm", "gemma2, 1P2D, gloo")
    return [pytest.param(case, id=case.label, marks=[pytest.mark.slow] if case.label in slow else []) for case in CASES]


@pytest.mark.parametrize("case", params())
def test_the_cluster_says_what_generate_says(
    case: Case, environment: dict[str, str], demo_model: Path, request: pytest.FixtureRequest
) -> None:
    model = demo_model if case.model == "demo" else request.getfixturevalue("family_dir")(case.model)
    common = (f"engine.block_size={BLOCK_SIZE}", f"engine.max_num_batched_tokens={CHUNK_TOKENS}")
    with running(environment, model, *common, "engine.kv_cache_memory_bytes=16777216", *case.settings) as cluster:
        completions = run_at_once(cluster, case.prompts)
        cluster.assert_drained()
        loads = cluster.loads()
    tally = Tally(case.label)
    references = reference_generate_all(model, case.prompts, MAX_TOKENS)
    for reference, prompt, completion in zip(references, case.prompts, completions, strict=True):
        tally.add(reference, completion.token_ids, f"{len(prompt)} tokens")
    tally.check()
    if "preempted" in case.label:
        assert sum(load["num_preemptions"] for load in loads.values()) > 0, "nothing was preempted: the case is vacuous"
    if "mixed" not in case.label:
        assert all(one.usage.transferred_tokens == one.usage.prompt_tokens for one in completions)
        assert all(one.prefill_worker.startswith("prefill") for one in completions)
        assert all(one.decode_worker.startswith("decode") for one in completions)


def run_at_once(cluster: Cluster, prompts: Sequence[tuple[int, ...]]) -> list[Completion]:
    async def everything() -> list[Completion]:
        async with AsyncClient(cluster.endpoint) as client:
            work = (
                client.generate(prompt, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True) for prompt in prompts
            )
            return await asyncio.gather(*work)

    return asyncio.run(everything())
