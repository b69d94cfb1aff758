"""Run one plan through the model: batch in, logits of the sampling rows out.

The only place that calls the model. Knows nothing of sampling, of requests or of time.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pdserve.engine.attention import Paged
from pdserve.engine.batch import build_batch
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.plan import StepPlan


class Runner:
    """A model over a pool."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's tokens into their blocks. Returns logits `[num_sampled, vocab]` in plan order."""
        batch = build_batch(plan, self._cache)
        if batch.fresh_blocks is not None:
            self._cache.clear(batch.fresh_blocks)
        output = self._model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=batch.sample_rows,
            paged=Paged(batch, self._cache),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def clear(self, block_ids: list[int]) -> None:
        """Zero blocks, so that what is in them harms nobody."""
        self._cache.clear(torch.tensor(block_ids, device=self._cache.device))
