"""A real cluster for a benchmark: one prefill and one decode worker, a core each, and a model of 60 million parameters.

Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pdserve.client import AsyncClient
from pdserve.cluster import state

VOCAB_SIZE = 32_000
PDSERVE = (sys.executable, "-m", "pdserve.cluster.cli")
Row = dict[str, object]


def row(name: str, value: float, unit: str, target: float | None, ok: bool | None, note: str) -> Row:
    return {"name": name, "value": round(value, 3), "unit": unit, "target": target, "ok": ok, "note": note}


def save_60m_model(folder: Path) -> None:
    """A random Llama of about 60 million parameters, tied embeddings, fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=9,
        num_attention_heads=10,
        num_key_value_heads=5,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@contextmanager
def cluster(name: str, model: Path, *settings: str) -> Iterator[state.ClusterState]:
    """Up for the time of a `with` block."""
    name = f"{name}-{os.getpid()}"
    chosen = [f"name={name}", f"model={model}", "prefill.cores=1", "decode.cores=1", *settings]
    options = [part for setting in chosen for part in ("--set", setting)]
    subprocess.run([*PDSERVE, "up", *options, "--detach"], check=True, stdout=subprocess.DEVNULL)
    try:
        yield state.require(name)
    finally:
        subprocess.run([*PDSERVE, "down", "--name", name], check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True, slots=True)
class Stream:
    """When a request was sent and when each of its messages came, in seconds of one clock."""

    sent_s: float
    arrivals_s: tuple[float, ...]

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals_s[0] - self.sent_s) * 1e3

    @property
    def gaps_ms(self) -> tuple[float, ...]:
        """From each message to the next."""
        return tuple(
            (later - sooner) * 1e3 for sooner, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        )


async def stream(client: AsyncClient, prompt: Sequence[int], max_tokens: int) -> Stream:
    """One greedy request, as its client sees it."""
    sent_s = time.perf_counter()
    arrivals = []
    num_tokens = 0
    async with client.stream(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True) as tokens:
        async for delta in tokens:
            arrivals.append(time.perf_counter())
            num_tokens += len(delta.token_ids)
    assert num_tokens == max_tokens
    return Stream(sent_s, tuple(arrivals))
