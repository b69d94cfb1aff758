"""Does the model mean the same over our paged pool as it does by itself? Asked once, before it serves anybody.

A short prompt is run twice: plainly, with the model as loaded and its own attention, and as it will serve, over a
small pool in two chunks and a single token. Whatever an architecture does that the paged attention does not know
about (its own cache, position biases, sinks, another kind of layer) shows here as an error or as different logits,
and the model is refused. Knows no list of architectures.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from transformers import PreTrainedModel

from pdserve.engine.attention import NAME, UnsupportedAttention
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.plan import ScheduledSequence, StepPlan
from pdserve.engine.runner import Runner
from pdserve.engine.sequence import Sequence
from pdserve.proto.errors import ModelError
from pdserve.proto.types import HandoffId, KVLayout, SamplingParams, WorkerRequest

CUTS = (0, 5, 11, 12)
# Of the largest logit. Half precision differs by rounding in every layer; a wrong result is off by its own size.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, vocab_size: int) -> torch.Tensor:
    """What the untouched model says after the probe's prompt, by its own eager attention: `[vocab]`, float32.

    Raises ModelError if it does not run, or says nothing sensible.
    """
    try:
        model.set_attn_implementation("eager")
        prompt = torch.tensor([_tokens(vocab_size)], device=model.device)
        logits: torch.Tensor = model(input_ids=prompt, use_cache=False).logits[0, -1].float()
    except (TypeError, AttributeError, RuntimeError, IndexError, KeyError, ValueError) as error:
        raise ModelError(f"{model.config.model_type} does not run: {_one_line(error)}") from None
    finally:
        model.set_attn_implementation(NAME)
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{model.config.model_type} computes logits that are not finite: its weights are unusable")
    return logits


def probe(model: PreTrainedModel, layout: KVLayout, vocab_size: int, plain: torch.Tensor) -> None:
    """Raise ModelError if `model` cannot run over pages of `layout`, or then says something else than `plain`."""
    tokens = _tokens(vocab_size)
    try:
        paged = _paged_logits(model, layout, tokens)
    except UnsupportedAttention as error:
        raise ModelError(f"{model.config.model_type} cannot run over a paged KV cache: {error}") from None
    except (TypeError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        raise ModelError(f"{model.config.model_type} cannot run over a paged KV cache: {_one_line(error)}") from None
    scale = float(plain.abs().max()) or 1.0
    error_share = float((plain - paged).abs().max()) / scale
    if not error_share <= TOLERANCE[model.dtype]:
        raise ModelError(
            f"{model.config.model_type} computes other logits over a paged KV cache than by itself "
            f"(off by {error_share:.1%}): its attention is of a kind that is not supported"
        )


def _tokens(vocab_size: int) -> tuple[int, ...]:
    return tuple((7 + 13 * index) % vocab_size for index in range(CUTS[-1]))


def _paged_logits(model: PreTrainedModel, layout: KVLayout, tokens: tuple[int, ...]) -> torch.Tensor:
    """The same, over a pool of its own."""
    num_blocks = layout.num_blocks(len(tokens))
    cache = KVCache(layout, num_blocks, model.device)
    request = WorkerRequest(HandoffId("probe", 0, 0), tokens, SamplingParams(max_tokens=1), timeout_s=0.0)
    sequence = Sequence(request, arrival_s=0.0)
    sequence.adopt(0, layout.block_size)
    sequence.table.extend(reversed(range(num_blocks)))
    runner = Runner(model, cache)
    logits = torch.empty(0)
    for start, end in pairwise(CUTS):
        samples = end == len(tokens)
        logits = runner.run(StepPlan((ScheduledSequence(sequence, start, end - start, samples),)))
        sequence.advance(end - start)
    unused = [layer for layer in range(layout.num_layers) if not bool(cache.tensor[:, layer].any())]
    if unused:
        raise UnsupportedAttention(f"its layer {unused[0]} keeps no keys and values there")
    return logits[0].float()


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
