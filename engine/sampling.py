"""Logits to tokens, one row for each sequence. A row never depends on the other rows.

Order, as in vLLM: minimum length and logit bias, penalties, then for sampling rows temperature, min-p, top-k, top-p.
Log-probabilities are those of the model's own distribution, before all that. Ties: the greedy choice is the lowest
id; top-k keeps all tokens that tie with the k-th; top-p prefers lower ids among equals and always keeps one token.

A draw inverts the cumulative distribution, in float64 and in order of token ids, at one number keyed by (seed,
position of the token in the sequence), so that a preempted, migrated or re-batched request draws the same.
Knows nothing of time, blocks or text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from typing import NamedTuple

import torch

from pdserve.engine.philox import uniform
from pdserve.engine.sequence import Sequence
from pdserve.proto.errors import InternalError
from pdserve.proto.types import SamplingParams, TokenInfo

NEVER = float("-inf")
COLDEST = 1e-30  # still a number in float32, and greedy in effect


class LogProbs(NamedTuple):
    """Of one row: the chosen token's, and the best ones."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@torch.inference_mode()
def sample(logits: torch.Tensor, sequences: Items[Sequence]) -> tuple[TokenInfo | InternalError, ...]:
    """The next token of each sequence from its row of `logits` `[len(sequences), vocab]`, any float dtype.

    A row with a NaN, or with nothing but minus infinity, gives an InternalError in its place.
    """
    if not sequences:
        return ()
    best, best_ids = logits.max(dim=-1)  # NaN wins a maximum: one pass finds bad rows and greedy tokens
    is_bad = (~torch.isfinite(best)).tolist()
    chosen: list[int] = best_ids.tolist()
    special = [row for row, sequence in enumerate(sequences) if not is_bad[row] and not _is_plain(sequence)]
    if special:
        some = [sequences[row] for row in special]
        rows = logits if len(special) == len(sequences) else logits[special]
        for row, token in zip(special, _choose(rows.float(), some), strict=True):
            chosen[row] = token
    logprobs = _logprobs(logits, sequences, chosen, is_bad)
    return tuple(_result(*args) for args in zip(sequences, chosen, is_bad, logprobs, strict=True))


def _result(sequence: Sequence, token: int, is_bad: bool, logprobs: LogProbs | None) -> TokenInfo | InternalError:
    if is_bad:
        return InternalError(
            f"the model's logits at position {sequence.num_tokens} of {sequence.request.id} are not finite"
        )
    return TokenInfo(token) if logprobs is None else TokenInfo(token, logprobs.chosen, logprobs.top)


def _is_plain(sequence: Sequence) -> bool:
    """Greedy, and nothing changes the logits: the largest one is the answer."""
    return sequence.request.sampling.temperature == 0 and not _edits(sequence)


def _edits(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    return bool(params.logit_bias) or _is_too_short(sequence) or _has_penalties(params)


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _is_too_short(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    return sequence.num_output_tokens < params.min_tokens and bool(params.stop_token_ids)


def _choose(logits: torch.Tensor, sequences: Items[Sequence]) -> list[int]:
    """Tokens of rows that are more than an argmax. `logits` float32 `[rows, vocab]`."""
    if any(_edits(sequence) for sequence in sequences):
        logits = logits.clone()
        for row, sequence in zip(logits, sequences, strict=True):
            if _edits(sequence):
                _edit(row, sequence)
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    drawing = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.temperature > 0]
    if drawing:
        some = [sequences[row] for row in drawing]
        rows = logits if len(drawing) == len(sequences) else logits[drawing]
        for row, token in zip(drawing, _draw(_filtered(rows, [s.request.sampling for s in some]), some), strict=True):
            chosen[row] = token
    return chosen


def _edit(row: torch.Tensor, sequence: Sequence) -> None:
    """Minimum length, bias and penalties, in place on one row `[vocab]`."""
    params, device = sequence.request.sampling, row.device
    if _is_too_short(sequence):
        row[torch.tensor(params.stop_token_ids, device=device)] = NEVER
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        row.index_add_(0, torch.tensor(ids, device=device), torch.tensor(biases, dtype=row.dtype, device=device))
    if params.repetition_penalty != 1.0:
        # Keskar et al., "CTRL", 2019: away from the token whichever sign its logit has.
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=device)
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
    if sequence.num_output_tokens and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
        penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
        row[torch.tensor(list(counts), device=device)] -= torch.tensor(penalties, dtype=row.dtype, device=device)


def _filtered(logits: torch.Tensor, params: Items[SamplingParams]) -> torch.Tensor:
    """Logits over temperature, minus infinity where min-p, top-k or top-p cut. `[rows, vocab]`."""
    temperatures = torch.tensor([max(p.temperature, COLDEST) for p in params], device=logits.device)
    # Shifted first: a tiny temperature must not overflow the best token.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    if any(p.min_p > 0 for p in params):
        floors = torch.tensor([p.min_p for p in params], device=logits.device).log()
        logits = logits.masked_fill(logits < floors[:, None], NEVER)
    if any(p.top_k for p in params):
        logits = _top_k(logits, params)
    return _top_p(logits, params) if any(p.top_p < 1.0 for p in params) else logits


def _top_k(logits: torch.Tensor, params: Items[SamplingParams]) -> torch.Tensor:
    """Keep what is not below the k-th best; rows with `top_k == 0` keep all."""
    vocab = logits.shape[-1]
    ranks = [min(p.top_k, vocab) for p in params]
    best = logits.topk(max(ranks), dim=-1).values  # [rows, largest k]
    index = torch.tensor([max(rank, 1) - 1 for rank in ranks], device=logits.device)
    floors = best.gather(-1, index[:, None])  # [rows, 1]
    is_open = torch.tensor([rank == 0 for rank in ranks], device=logits.device)
    return logits.masked_fill(logits < floors.masked_fill(is_open[:, None], NEVER), NEVER)


def _top_p(logits: torch.Tensor, params: Items[SamplingParams]) -> torch.Tensor:
    """Keep the fewest best tokens whose probabilities reach top_p (Holtzman et al., 2020)."""
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(ordered.double(), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    limits = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=logits.device)
    cut = (before >= limits[:, None]) & (limits < 1.0)[:, None]
    cut[:, 0] = False
    return logits.masked_fill(torch.zeros_like(cut).scatter(-1, ids, cut), NEVER)


def _draw(logits: torch.Tensor, sequences: Items[Sequence]) -> list[int]:
    """One token for each row from softmax(`logits`), at the row's own number."""
    weights = torch.exp(logits.double() - logits.amax(dim=-1, keepdim=True))
    cumulative = weights.cumsum(dim=-1)  # [rows, vocab]
    numbers = [uniform(s.request.sampling.seed, s.num_tokens) for s in sequences]
    targets = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    # The first token whose cumulative weight exceeds the target: never one of weight zero.
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=logits.shape[-1] - 1)[:, 0].tolist()


def _logprobs(
    logits: torch.Tensor, sequences: Items[Sequence], chosen: list[int], is_bad: list[bool]
) -> list[LogProbs | None]:
    """Log-probabilities of the rows that want them, from the unprocessed logits."""
    results: list[LogProbs | None] = [None] * len(sequences)
    wanted = [s.request.sampling.logprobs for s in sequences]
    rows = [row for row, number in enumerate(wanted) if number is not None and not is_bad[row]]
    if not rows:
        return results
    logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
    num_top = min(max(wanted[row] or 0 for row in rows), logits.shape[-1])
    values, ids = logprobs.topk(num_top, dim=-1)
    own = logprobs.gather(-1, torch.tensor([[chosen[row]] for row in rows], device=logits.device))[:, 0]
    for row, top_ids, top, mine in zip(rows, ids.tolist(), values.tolist(), own.tolist(), strict=True):
        results[row] = LogProbs(mine, tuple(zip(top_ids, top, strict=True))[: wanted[row]])
    return results
