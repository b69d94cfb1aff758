"""The engine on a GPU says, token for token, what `transformers` says of a tiny Llama."""

from __future__ import annotations

import tempfile
from pathlib import Path

from engine_runs import BLOCK_SIZE, CHUNK_TOKENS, check_parity, greedy_sequences, run, tiny_engine
from families import awkward_lengths, build_family
from gpu.proof import conclude

MAX_TOKENS = 24


def prove() -> str:
    with tempfile.TemporaryDirectory(prefix="pdserve-gpu-") as folder:
        model_dir = build_family("llama", Path(folder) / "llama")
        engine = tiny_engine(model_dir, device="cuda", dtype="float32")
        sequences = greedy_sequences(awkward_lengths(BLOCK_SIZE, CHUNK_TOKENS), MAX_TOKENS)
        run(engine, sequences)
        check_parity(model_dir, sequences, "llama on a GPU")
    return f"{len(sequences)} prompts of awkward lengths, {MAX_TOKENS} tokens each: those of generate() on the CPU"


if __name__ == "__main__":
    conclude(prove)
