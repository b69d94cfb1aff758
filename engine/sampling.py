"""Logits to tokens, one row for each sequence. A row never depends on the other rows.

Order, as in vLLM: minimum length and logit bias, penalties, then for sampling rows temperature, min-p, top-k, top-p.
Log-probabilities are those of the model's own distribution, before all that. Ties: the greedy choice is the lowest
id; top-k keeps all tokens that tie with the k-th; top-p prefers lower ids among equals and always keeps one token;
top log-probabilities list lower ids first.

A draw inverts the cumulative distribution, in order of token ids, at one number keyed by (seed, position of the
token in the sequence), so that a preempted, migrated or re-batched request draws the same. Weights are whole numbers
in float64, small enough that all sums are exact: a device that adds in another order for another number of rows
arrives at the same. What is lost is a token less than 2^-37 times as likely as the best (among 100,000).
Every operation takes all the rows that want it at once. Knows nothing of time, blocks or text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import torch

from pdserve.engine.philox import uniforms
from pdserve.engine.sequence import Sequence
from pdserve.proto.errors import InternalError
from pdserve.proto.types import SamplingParams, TokenInfo

NEVER = float("-inf")
COLDEST = 1e-30  # still a number in float32, and greedy in effect
NUM_CANDIDATES = 256  # tokens that top-k and top-p look at first; most distributions have their mass in fewer
WIDENING = 16  # by so much for the rows that need more: all of the vocabulary after one or two times


class LogProbs(NamedTuple):
    """Of one row: the chosen token's, and the best ones."""

    chosen: float
    top: tuple[tuple[int, float], ...]


class Limits(NamedTuple):
    """Top-k and top-p, one element for each row that has either."""

    top_k: torch.Tensor  # int64, 0 keeps all
    top_p: torch.Tensor  # float64
    mass: torch.Tensor  # float64, the weight of all tokens; needed, and known, where top_k is 0

    def of(self, rows: list[int]) -> Limits:
        return Limits(self.top_k[rows], self.top_p[rows], self.mass[rows])


class Nucleus(NamedTuple):
    """What top-k and top-p keep of each row's candidates, which are in order of token ids."""

    ids: torch.Tensor  # [rows, candidates]
    weights: torch.Tensor  # [rows, candidates], zero where cut
    is_final: torch.Tensor  # [rows], whether all tokens that are no candidates are cut


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
        for row, token in zip(special, _choose(rows.to(torch.float32, copy=True), some), strict=True):
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
    """Tokens of rows that are more than an argmax. `logits` float32 `[rows, vocab]`, changed in place."""
    _ban_and_bias(logits, sequences)
    _penalize(logits, sequences)
    chosen = logits.argmax(dim=-1)
    drawing = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.temperature > 0]
    if drawing:
        chosen[drawing] = _draw(_rows(logits, drawing), [sequences[row] for row in drawing])
    tokens: list[int] = chosen.tolist()
    return tokens


def _ban_and_bias(logits: torch.Tensor, sequences: Items[Sequence]) -> None:
    """Minimum length and logit bias, in place. `logits` `[rows, vocab]`."""
    params, device = [sequence.request.sampling for sequence in sequences], logits.device
    short = [row for row, sequence in enumerate(sequences) if _is_too_short(sequence)]
    if short:
        places = [(row, token) for row in short for token in params[row].stop_token_ids]
        rows, tokens = torch.tensor(places, device=device).unbind(-1)
        logits[rows, tokens] = NEVER
    biases = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias]
    if biases:
        all_rows, all_tokens, values = zip(*biases, strict=True)
        places_of_bias = (torch.tensor(all_rows, device=device), torch.tensor(all_tokens, device=device))
        logits.index_put_(places_of_bias, torch.tensor(values, dtype=logits.dtype, device=device), accumulate=True)


def _penalize(logits: torch.Tensor, sequences: Items[Sequence]) -> None:
    """Repetition, then presence and frequency penalties, in place. `logits` `[rows, vocab]`.

    One entry for each distinct token of each row that has penalties. The neutral values change no bit of a logit.
    """
    chosen = [row for row, sequence in enumerate(sequences) if _has_penalties(sequence.request.sampling)]
    if not chosen:
        return
    counts = [sequences[row].count_tokens() for row in chosen]
    num_entries = torch.tensor([len(count.token_ids) for count in counts])
    rows = torch.tensor(chosen).repeat_interleave(num_entries).to(logits.device)
    tokens = _joined(count.token_ids for count in counts).to(logits.device)
    num_in_output = _joined(count.num_in_output for count in counts)
    params = [sequences[row].request.sampling for row in chosen]
    each = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
    table = torch.tensor(each, dtype=torch.float64).repeat_interleave(num_entries, dim=0)  # [entries, 3]
    repetition, presence, frequency = table.unbind(-1)
    factor = repetition.to(logits.device, logits.dtype)
    loss = (presence * (num_in_output > 0) + frequency * num_in_output).to(logits.device, logits.dtype)
    scores = logits[rows, tokens]
    # Keskar et al., "CTRL", 2019: away from the token whichever sign its logit has.
    logits[rows, tokens] = torch.where(scores < 0, scores * factor, scores / factor) - loss


def _joined(arrays: Iterable[array[int]]) -> torch.Tensor:
    """A copy of 64-bit arrays, end to end."""
    return torch.from_numpy(np.concatenate([np.frombuffer(each, dtype=np.int64) for each in arrays]))


def _draw(logits: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
    """One token for each row, at the row's own number. `logits` float32 `[rows, vocab]`, changed in place."""
    params, device = [sequence.request.sampling for sequence in sequences], logits.device
    temperatures = torch.tensor([max(p.temperature, COLDEST) for p in params], device=device)
    # Shifted first: a tiny temperature must not overflow the best token.
    scores = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    if any(p.min_p > 0 for p in params):
        floors = torch.tensor([p.min_p for p in params], device=device).log()
        scores.masked_fill_(scores < floors[:, None], NEVER)
    numbers = torch.from_numpy(uniforms([p.seed for p in params], [s.num_tokens for s in sequences])).to(device)
    tokens = torch.empty(len(params), dtype=torch.int64, device=device)
    limited = [row for row, p in enumerate(params) if _has_limits(p)]
    free = [row for row, p in enumerate(params) if not _has_limits(p)]
    if free:
        tokens[free] = _pick(_weights(_rows(scores, free), scores.shape[-1]), numbers[free])
    if limited:
        tokens[limited] = _pick_limited(_rows(scores, limited), [params[row] for row in limited], numbers[limited])
    return tokens


def _has_limits(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _pick_limited(scores: torch.Tensor, params: Items[SamplingParams], numbers: torch.Tensor) -> torch.Tensor:
    """One token for each row of those that have top-k or top-p. `scores` `[rows, vocab]`, `numbers` `[rows]`.

    Sorting a whole vocabulary takes longer than all the rest, and few rows need it. Whether a row is looked at again
    with more candidates depends on that row alone.
    """
    vocab, device = scores.shape[-1], scores.device
    top_k = torch.tensor([min(p.top_k, vocab) for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    limits = Limits(top_k, top_p, torch.zeros_like(top_p))
    if unranked := [row for row, p in enumerate(params) if not p.top_k]:
        limits.mass[unranked] = _weights(_rows(scores, unranked), vocab).sum(dim=-1)
    tokens = torch.empty_like(top_k)
    pending, num_candidates = list(range(len(params))), NUM_CANDIDATES
    while pending:
        nucleus = _nucleus(_rows(scores, pending), limits.of(pending), min(num_candidates, vocab))
        index = _pick(nucleus.weights, numbers[pending])[:, None]
        tokens[pending] = nucleus.ids.gather(-1, index)[:, 0]
        pending = [row for row, is_final in zip(pending, nucleus.is_final.tolist(), strict=True) if not is_final]
        num_candidates *= WIDENING
    return tokens


def _nucleus(scores: torch.Tensor, limits: Limits, num_candidates: int) -> Nucleus:
    """Keep what is not below the k-th best, then the fewest best whose share reaches top_p (Holtzman et al., 2020).

    `scores` `[rows, vocab]`. The candidates are the `num_candidates` best of each row.
    """
    vocab = scores.shape[-1]
    if num_candidates < vocab:
        values, ids = scores.topk(num_candidates, dim=-1, sorted=False)
        ids, order = ids.sort(dim=-1)
        values = values.gather(-1, order)
        edge = values.amin(dim=-1)  # what ties with it may have been left out
    else:
        values, ids = scores, torch.arange(vocab, device=scores.device).expand_as(scores)
        edge = torch.full_like(scores[:, 0], NEVER)
    ordered, order = values.sort(dim=-1, descending=True, stable=True)  # [rows, candidates]
    kth = ordered.gather(-1, limits.top_k.clamp(1, num_candidates)[:, None] - 1)[:, 0]
    floor = kth.masked_fill(limits.top_k == 0, NEVER)
    weights = _weights(ordered, vocab).masked_fill_(ordered < floor[:, None], 0)
    sums = weights.cumsum(dim=-1)
    mass = torch.where(limits.top_k == 0, limits.mass, sums[:, -1])
    is_cut = sums.sub_(weights) >= (limits.top_p * mass)[:, None]
    is_cut[:, 0] = False
    is_cut[limits.top_p >= 1.0] = False
    weights.masked_fill_(is_cut, 0)
    lowest = ordered.masked_fill(is_cut, -NEVER).amin(dim=-1)
    is_final = (edge == NEVER) | (torch.where(limits.top_k == 0, lowest, floor) > edge)
    return Nucleus(ids, torch.zeros_like(weights).scatter_(-1, order, weights), is_final)


def _weights(scores: torch.Tensor, vocab: int) -> torch.Tensor:
    """exp(`scores`), at most 1, as whole numbers in float64 of which no sum of `vocab` exceeds 2^53."""
    return scores.double().exp_().mul_(2.0 ** (53 - vocab.bit_length())).round_()


def _pick(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The first column of each row where the running sum exceeds its share `numbers` `[rows]` of the whole.

    Never a column of weight zero. `weights` `[rows, columns]` become the sums.
    """
    sums = weights.cumsum_(dim=-1)
    targets = (numbers * sums[:, -1])[:, None]  # below the sum of all: a number is at most 1 - 2^-53
    return torch.searchsorted(sums, targets, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _rows(matrix: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows in ascending order; no copy if that is all of them."""
    return matrix if len(rows) == len(matrix) else matrix[rows]


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
    # Unique keys, since `topk` may order equal values by what it likes: a negated log-probability has the bits of a
    # larger integer the less likely the token is, and lower ids come first among equals.
    keys = logprobs.neg().abs_().view(torch.int32).long().bitwise_left_shift_(32)
    keys += torch.arange(logits.shape[-1], device=logits.device)
    ids = keys.topk(num_top, dim=-1, largest=False).values & 0xFFFFFFFF  # [rows, num_top]
    values = logprobs.gather(-1, ids)
    own = logprobs.gather(-1, torch.tensor([[chosen[row]] for row in rows], device=logits.device))[:, 0]
    for row, top_ids, top, mine in zip(rows, ids.tolist(), values.tolist(), own.tolist(), strict=True):
        results[row] = LogProbs(mine, tuple(zip(top_ids, top, strict=True))[: wanted[row]])
    return results
