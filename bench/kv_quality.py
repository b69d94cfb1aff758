"""What an int8 KV pool costs a model: loss and greedy tokens over held-out text, against the same pool unrounded.

    python bench/kv_quality.py [--json]

The demo model is given the files of the standard library that its training held out, token by token as they are, in
windows of 1,024 through the engine's own paged attention. In int8 every token, the one just written included, is read
back from the pool, so that a window in chunks sees what decoding would see. One thread. Rows: see `rows`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from pdserve.engine.attention import Paged
from pdserve.engine.batch import build_batch
from pdserve.engine.config import EngineConfig
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.model import LoadedModel, load_model
from pdserve.engine.plan import ScheduledSequence, StepPlan
from pdserve.engine.sequence import Sequence
from pdserve.proto.types import SCALE_BYTES, HandoffId, KVLayout, SamplingParams, WorkerRequest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from demo_text import EOT, SPECIALS, encode, held_out, read_sources

DEMO_MODEL = Path(__file__).parent.parent / "deploy" / "models" / "demo"
WINDOW_TOKENS = 1024
CHUNK_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows():
        print(
            json.dumps(row)
            if arguments.json
            else f"{row['name']:>28} {row['value']:> 10} {row['unit']:<10} {row['note']}"
        )


def rows() -> Iterator[dict[str, object]]:
    """Measure everything; one row each."""
    ids = held_out_tokens()
    exact, rounded = (Reader(kind) for kind in ("auto", "int8"))
    score = Score()
    for start in range(0, len(ids) - 1, WINDOW_TOKENS):
        window = ids[start : start + WINDOW_TOKENS + 1]
        score.add(exact.logits(window[:-1]), rounded.logits(window[:-1]), torch.tensor(window[1:]))
    note = f"{score.rounded_loss:.6f} against {score.exact_loss:.6f} over {score.num_tokens:,} held-out tokens"
    yield row("kv_int8_loss_delta", score.loss_delta, "nats/token", 0.01, score.loss_delta <= 0.01, note)
    note = "tokens that the unrounded pool's model would have said, too, after the same text"
    yield row("kv_int8_greedy_agreement", score.agreement, "share", None, None, note)
    layout = rounded.layout
    for dtype, target in (("float32", 0.28), ("bfloat16", 0.55)):
        ratio = layout.block_bytes / replace(layout, dtype=dtype).block_bytes
        yield row(f"kv_int8_bytes_ratio_{dtype}", ratio, "ratio", target, ratio <= target, scales_note(layout))


def row(name: str, value: float, unit: str, target: float | None, ok: bool | None, note: str) -> dict[str, object]:
    return {"name": name, "value": round(value, 7), "unit": unit, "target": target, "ok": ok, "note": note}


def scales_note(layout: KVLayout) -> str:
    share = (layout.block_bytes - layout.element_bytes) / layout.block_bytes
    return f"scales are {share:.1%} of a block: {SCALE_BYTES} bytes for every {layout.head_dim} elements"


def held_out_tokens() -> list[int]:
    """The text that the demo model has not seen (by name: another Python has other files), as its training cut it."""
    sources = read_sources(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    names = held_out(sources)
    documents = (encode(tokenizer, [text]) for name, text in sources.items() if name in names)
    return [SPECIALS.index(EOT), *itertools.chain.from_iterable(documents)]


class Reader:
    """The demo model over a pool that holds one window, in one kind of KV cache."""

    def __init__(self, kv_cache_dtype: Literal["auto", "int8"]) -> None:
        config = EngineConfig(device="cpu", dtype="float32", kv_cache_dtype=kv_cache_dtype)
        self._loaded: LoadedModel = load_model(DEMO_MODEL, config)
        self.layout = self._loaded.layout
        self._num_blocks = self.layout.num_blocks(WINDOW_TOKENS)
        self._cache = KVCache(self.layout, self._num_blocks)

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """What the model says after each of `tokens`: `[num_tokens, vocab]`."""
        request = WorkerRequest(HandoffId("quality", 0, 0), tuple(tokens), SamplingParams(max_tokens=1), timeout_s=0.0)
        sequence = Sequence(request, arrival_s=0.0)
        sequence.adopt(0, self.layout.block_size)
        sequence.table.extend(reversed(range(self._num_blocks)))
        chunks = range(0, len(tokens), CHUNK_TOKENS)
        return torch.cat([self._chunk(sequence, start, min(CHUNK_TOKENS, len(tokens) - start)) for start in chunks])

    def _chunk(self, sequence: Sequence, start: int, num_tokens: int) -> torch.Tensor:
        """As `Runner.run`, with the logits of every row."""
        batch = build_batch(StepPlan((ScheduledSequence(sequence, start, num_tokens, False),)), self._cache)
        if batch.fresh_blocks is not None:
            self._cache.clear(batch.fresh_blocks)
        model: Any = self._loaded.model
        paged = Paged(batch, self._cache)
        output = model(input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False, paged=paged)
        logits: torch.Tensor = output.logits[0]
        return logits


@dataclass(slots=True)
class Score:
    """Sums over the tokens so far."""

    num_tokens: int = 0
    exact_nats: float = 0.0
    rounded_nats: float = 0.0
    num_agreed: int = 0

    def add(self, exact: torch.Tensor, rounded: torch.Tensor, wanted: torch.Tensor) -> None:
        """Logits `[num_tokens, vocab]` of both, and the tokens that the text has there."""
        self.num_tokens += len(wanted)
        self.exact_nats += functional.cross_entropy(exact, wanted, reduction="sum").item()
        self.rounded_nats += functional.cross_entropy(rounded, wanted, reduction="sum").item()
        self.num_agreed += int((exact.argmax(-1) == rounded.argmax(-1)).sum())

    @property
    def exact_loss(self) -> float:
        return self.exact_nats / self.num_tokens

    @property
    def rounded_loss(self) -> float:
        return self.rounded_nats / self.num_tokens

    @property
    def loss_delta(self) -> float:
        return self.rounded_loss - self.exact_loss

    @property
    def agreement(self) -> float:
        return self.num_agreed / self.num_tokens


if __name__ == "__main__":
    main()
