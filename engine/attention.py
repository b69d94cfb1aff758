"""Attention over the paged pool, as one function that `transformers` models call in place of their own.

`transformers` passes every keyword of `model(...)` down to the attention function; ours travel in one object,
`paged`. New keys and values are written to the pool, then each group and each chunk attends over its own blocks.
The batch knows the masks, so that no mask function is registered: `transformers` then makes none.

Plain gather + SDPA on any device. Knows nothing of scheduling: a row is a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pdserve.engine.batch import Batch, Chunk, Group
from pdserve.engine.kv_cache import KVCache

NAME = "pdserve_paged"
# What may come along without a meaning for us; anything else that is not None changes the mathematics and is refused.
HARMLESS = frozenset({"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal"})


@dataclass(frozen=True, slots=True)
class Paged:
    """What one forward pass over the pool needs besides the model's own inputs."""

    batch: Batch
    cache: KVCache


class UnsupportedAttention(Exception):
    """The model asks its attention for something that this function does not do; found when the model is probed."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Paged | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `[1, num_heads, num_tokens, head_dim]`, `key` and `value` `[1, num_kv_heads, num_tokens, head_dim]`.

    Returns `[1, num_tokens, num_heads, head_dim]` and no weights. A token sees itself and the `sliding_window - 1`
    before it; scores are `softcap * tanh(scores / softcap)` where that is given. Raises UnsupportedAttention.
    """
    if paged is None or attention_mask is not None or dropout:
        raise UnsupportedAttention("it does not pass the paged context through, or makes its own mask")
    surplus = sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)
    if surplus:
        raise UnsupportedAttention(f"its attention needs {', '.join(surplus)}")
    batch, cache = paged.batch, paged.cache
    layer: int = module.layer_idx  # type: ignore[assignment]
    cache.write(layer, batch.write_index, key[0].transpose(0, 1), value[0].transpose(0, 1))
    pieces = [
        _attend_group(query, cache.gather(layer, group.read_index, key.dtype), group, scaling, sliding_window, softcap)
        for group in batch.groups
    ]
    for chunk in batch.chunks:
        rows = slice(chunk.start, chunk.start + chunk.size)
        # From a pool that rounds, everything is read back: a token's result must not depend on how the prompt was cut.
        if chunk.is_whole and cache.is_exact:
            keys, values = key[:, :, rows], value[:, :, rows]
        else:
            keys, values = _context(cache.gather(layer, chunk.read_index, key.dtype), chunk)
        pieces.append(_attend_chunk(query[:, :, rows], keys, values, chunk, scaling, sliding_window, softcap))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[None], None


def _attend_group(
    query: torch.Tensor,
    gathered: torch.Tensor,
    group: Group,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One new token for each row of the group. Returns `[size, num_heads, head_dim]`."""
    size, num_heads, head_dim = group.size, query.shape[1], query.shape[3]
    num_kv_heads = gathered.shape[2]
    # [2 * size * max_blocks, block_size, kv heads, head_dim] -> two of [size, kv heads, max_context, head_dim]
    by_row = gathered.view(2, size, -1, num_kv_heads, head_dim)[:, :, : group.max_context]
    keys, values = by_row.transpose(2, 3).unbind(0)
    # The query heads that share a kv head become its query tokens: no repeated keys, same mask for all.
    queries = query[0, :, group.start : group.start + size].transpose(0, 1)
    queries = queries.reshape(size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = group.mask(window, query.dtype)
    if softcap is None:
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    else:
        output = _softcapped(queries, keys, values, mask, scaling, softcap)
    return output.reshape(size, num_heads, head_dim)


def _attend_chunk(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: Chunk,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Queries `[1, num_heads, size, head_dim]` over keys `[1, num_kv_heads, context, head_dim]`.

    Returns `[size, num_heads, head_dim]`.
    """
    mask = chunk.mask(window, queries.dtype)
    sharing = queries.shape[1] // keys.shape[1]
    if softcap is not None:
        if mask is None:
            mask = torch.full((chunk.size, chunk.size), float("-inf"), dtype=queries.dtype, device=queries.device).triu(
                1
            )
        keys, values = (x.repeat_interleave(sharing, dim=1) for x in (keys, values))
        output = _softcapped(queries, keys, values, mask, scaling, softcap)
    else:
        output = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=sharing > 1
        )
    return output[0].transpose(0, 1)


def _context(gathered: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[1, kv heads, context, head_dim]` from `[2 * num_blocks, block_size, kv heads, head_dim]`."""
    tokens = gathered.view(2, 1, -1, *gathered.shape[2:])[:, :, : chunk.context]
    keys, values = tokens.transpose(2, 3).unbind(0)
    return keys, values


def _softcapped(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores (Gemma 2, https://arxiv.org/abs/2408.00118, section 2); softmax in float32."""
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(queries @ keys.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype) @ values


AttentionInterface.register(NAME, paged_attention)
