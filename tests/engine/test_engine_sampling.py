"""Sampling against an independent, slow, one-row implementation and against `transformers`' processors."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import request
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pdserve.engine import sampling
from pdserve.engine.philox import philox4x32, uniform, uniforms
from pdserve.engine.sampling import sample
from pdserve.engine.sequence import Sequence
from pdserve.proto.errors import InternalError
from pdserve.proto.types import TokenInfo

VOCAB = 40


def sequence(prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    made = Sequence(request(prompt, 100, **sampling), 0.0)
    made.token_ids.extend(output)
    return made


def row(seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def draw(logits: torch.Tensor, *sequences: Sequence) -> list[int]:
    results = sample(logits, sequences)
    assert all(isinstance(result, TokenInfo) for result in results)
    return [result.token_id for result in results if isinstance(result, TokenInfo)]


def naive(logits: list[float], of: Sequence) -> int:
    """The documented order of operations in plain Python floats."""
    p, out = of.request.sampling, of.token_ids[of.num_prompt_tokens :]
    scores = list(logits)
    if len(out) < p.min_tokens:
        for token in p.stop_token_ids:
            scores[token] = -math.inf
    for token, bias in p.logit_bias:
        scores[token] += bias
    for token in set(of.token_ids):
        scores[token] *= p.repetition_penalty if scores[token] < 0 else 1 / p.repetition_penalty
    for token, count in Counter(out).items():
        scores[token] -= p.presence_penalty + p.frequency_penalty * count
    best = max(scores)
    if p.temperature == 0:
        return scores.index(best)
    weights = {token: math.exp((score - best) / p.temperature) for token, score in enumerate(scores)}
    weights = {token: weight for token, weight in weights.items() if weight >= p.min_p}
    if p.top_k:
        floor = sorted(weights.values(), reverse=True)[: p.top_k][-1]
        weights = {token: weight for token, weight in weights.items() if weight >= floor}
    kept: dict[int, float] = {}
    total, reached = sum(weights.values()), 0.0
    for token, weight in sorted(weights.items(), key=lambda item: (-item[1], item[0])):
        if p.top_p < 1 and kept and reached >= p.top_p * total:
            break
        kept[token] = weight
        reached += weight
    target, passed = uniform(p.seed, of.num_tokens) * sum(kept.values()), 0.0
    for token in sorted(kept):
        passed += kept[token]
        if passed > target:
            return token
    return max(kept)


def random_sampling(dice: random.Random) -> dict[str, Any]:
    def maybe(value: Any, default: Any) -> Any:
        return value if dice.random() < 0.5 else default

    return {
        "seed": dice.randrange(2**64),
        "temperature": dice.choice([0.0, 0.3, 1.0, 1.7]),
        "top_k": maybe(dice.randrange(1, VOCAB + 5), 0),
        "top_p": maybe(dice.uniform(0.05, 1.0), 1.0),
        "min_p": maybe(dice.uniform(0.0, 0.5), 0.0),
        "repetition_penalty": maybe(dice.uniform(0.5, 2.0), 1.0),
        "presence_penalty": maybe(dice.uniform(-2.0, 2.0), 0.0),
        "frequency_penalty": maybe(dice.uniform(-2.0, 2.0), 0.0),
        "logit_bias": maybe(((dice.randrange(VOCAB), dice.uniform(-9, 9)),), ()),
        "min_tokens": maybe(dice.randrange(20), 0),
        "stop_token_ids": maybe((dice.randrange(VOCAB), 2), ()),
        "logprobs": maybe(dice.randrange(4), None),
    }


def random_case(seed: int) -> tuple[torch.Tensor, Sequence]:
    dice = random.Random(seed)
    prompt, output = (
        dice.choices(range(VOCAB), k=dice.randrange(1, 9)),
        dice.choices(range(VOCAB), k=dice.randrange(12)),
    )
    return row(seed), sequence(prompt, output, **random_sampling(dice))


CASES = [random_case(seed) for seed in range(400)]


def test_every_mixture_of_options_agrees_with_the_naive_sampler() -> None:
    got = [draw(logits[None], of)[0] for logits, of in CASES]
    expected = [naive(logits.tolist(), of) for logits, of in CASES]
    assert [index for index, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]] == []
    assert len(set(expected)) > VOCAB // 2


def test_a_row_does_not_depend_on_its_batch() -> None:
    alone = [sample(logits[None], [of])[0] for logits, of in CASES]
    for size in (2, 7, 64, 400):
        batched: list[object] = []
        for start in range(0, len(CASES), size):
            part = CASES[start : start + size]
            batched += sample(torch.stack([logits for logits, _ in part]), [of for _, of in part])
        assert batched == alone


@pytest.mark.parametrize("num_candidates", [1, 3, 11])
def test_looking_at_few_candidates_first_changes_nothing(num_candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample(torch.stack([logits for logits, _ in CASES]), [of for _, of in CASES])
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", num_candidates)
    monkeypatch.setattr(sampling, "WIDENING", 2)
    assert sample(torch.stack([logits for logits, _ in CASES]), [of for _, of in CASES]) == whole


def test_a_large_vocabulary_is_cut_the_same_alone_in_a_batch_and_by_a_full_sort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounded logits tie everywhere, also at the edge of the candidates; the spreads need few, some and all of them."""
    vocab, cases = 5003, []
    for seed in range(24):
        dice = random.Random(seed)
        spread = dice.choice([0.3, 1.0, 3.0, 6.0])
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
        options = random_sampling(dice) | {"temperature": 0.8, "top_p": dice.uniform(0.5, 1.0)}
        options |= {"top_k": dice.choice([0, 0, 5, 256, 300, 4999])}
        cases.append(((logits * 2).round() / 2, sequence([1, 2, 3], [4, 5, 4], **options)))
    alone = [sample(logits[None], [of])[0] for logits, of in cases]
    assert list(sample(torch.stack([logits for logits, _ in cases]), [of for _, of in cases])) == alone
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", vocab)
    assert [sample(logits[None], [of])[0] for logits, of in cases] == alone


def test_equal_tokens_at_the_edge_of_the_candidates_are_kept_in_order_of_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", 4)
    many = [sequence([1], [], temperature=1.0, top_p=0.5, seed=seed) for seed in range(400)]
    assert set(draw(torch.zeros(400, VOCAB), *many)) == set(range(VOCAB // 2))
    many = [sequence([1], [], temperature=1.0, top_k=3, seed=seed) for seed in range(400)]
    assert set(draw(torch.zeros(400, VOCAB), *many)) == set(range(VOCAB))


def test_the_callers_logits_stay_as_they_are() -> None:
    logits = torch.stack([logits for logits, _ in CASES])
    before = logits.clone()
    sample(logits, [of for _, of in CASES])
    hot = [index for index, (_, of) in enumerate(CASES) if of.request.sampling.temperature > 0][:8]
    some = logits[hot]
    sample(some, [CASES[index][1] for index in hot])
    assert torch.equal(logits, before)
    assert torch.equal(some, before[hot])


def test_weights_add_up_to_the_same_in_every_order() -> None:
    scores = -torch.rand(150_000, generator=torch.Generator().manual_seed(0)) * 20
    for some in (scores, torch.zeros(2**17 - 1)):
        weights = sampling._weights(some, len(some))
        total = int(weights.sum())
        assert total == int(weights.flip(0).cumsum(0)[-1]) == sum(map(int, weights.tolist())) <= 2**53


def test_a_token_that_the_model_excludes_is_never_drawn() -> None:
    logits = row(4).index_fill(0, torch.arange(3, VOCAB), -math.inf)
    for options in ({}, {"top_k": 30}, {"top_p": 0.999}, {"min_p": 0.001, "top_k": 30}, {"repetition_penalty": 3.0}):
        many = [sequence([1, 9], [8], temperature=2.0, seed=seed, **options) for seed in range(200)]
        assert set(draw(logits.expand(200, VOCAB), *many)) == {0, 1, 2}


@pytest.mark.parametrize(("number", "expected"), [(0.0, 3), (1 - 2.0**-53, 6)])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.99}])
def test_the_extreme_numbers_draw_the_first_and_the_last_possible_token(
    number: float, expected: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "uniforms", lambda seeds, _: np.full(len(seeds), number))
    logits = torch.full((2, VOCAB), -math.inf).index_fill(1, torch.tensor([3, 5, 6]), 1.0)
    assert draw(logits, *[sequence([1], [], temperature=1.0, **options) for _ in range(2)]) == [expected] * 2


def test_biases_of_one_token_add_up() -> None:
    bias = ((7, 30.0), (8, 50.0), (7, 30.0))
    assert draw(torch.zeros(2, VOCAB), sequence([1], [], logit_bias=bias), sequence([1], [])) == [7, 0]


def test_token_counts_follow_the_output_and_are_never_rebuilt() -> None:
    dice, of = random.Random(5), sequence([3, 1, 3], [1, 4])
    first = of.count_tokens()
    for _ in range(50):
        of.token_ids += dice.choices(range(VOCAB), k=dice.randrange(4))
        counts, output = of.count_tokens(), of.token_ids[3:]
        in_output = dict(zip(counts.token_ids, counts.num_in_output, strict=True))
        assert in_output == {token: output.count(token) for token in of.token_ids}
        assert counts is first
        assert counts.num_counted == len(output)


def test_penalties_see_every_token_that_was_appended_since_the_last_step() -> None:
    """The counts are kept from step to step: each step agrees with a sequence that is counted for the first time."""
    options = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4, "temperature": 1.0}
    kept = sequence([1, 2, 2], [], seed=9, **options)
    for step in range(60):
        fresh = sequence([1, 2, 2], list(kept.token_ids[3:]), seed=9, **options)
        (token,) = draw(row(step, 1.0)[None], kept)
        assert token == draw(row(step, 1.0)[None], fresh)[0] == naive(row(step, 1.0).tolist(), fresh)
        kept.token_ids.append(token)


def test_the_kept_tokens_are_those_of_transformers() -> None:
    for seed in range(30):
        processors = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.3),
                TemperatureLogitsWarper(0.8),
                MinPLogitsWarper(0.02),
                TopKLogitsWarper(12),
                TopPLogitsWarper(0.9),
            ]
        )
        prompt = [1, 5, 9]
        scores = processors(torch.LongTensor([prompt]), row(seed)[None])
        options = {"temperature": 0.8, "min_p": 0.02, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.3}
        many = [sequence(prompt, [], seed=number, **options) for number in range(400)]
        drawn = set(draw(row(seed).expand(400, VOCAB), *many))
        allowed = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
        assert drawn <= allowed
        likely = set((torch.softmax(scores[0], -1) > 0.03).nonzero()[:, 0].tolist())
        assert likely <= drawn


def test_frequencies_follow_the_probabilities() -> None:
    number = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    shared = request([1], 100, temperature=1.0, seed=11)
    many = []
    for position in range(number):
        one = Sequence(shared, 0.0)
        one.token_ids = range(position + 1)  # type: ignore[assignment]
        many.append(one)
    counts = Counter(draw(logits.expand(number, 4), *many))
    for token, probability in enumerate(torch.softmax(logits, -1).tolist()):
        sigma = math.sqrt(number * probability * (1 - probability))
        assert abs(counts[token] - number * probability) < 5 * sigma


def test_philox_matches_the_published_vectors() -> None:
    """Random123's known answers, `kat_vectors`, philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(counter, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_the_number_depends_on_the_whole_seed_and_on_the_position() -> None:
    addresses = [(seed, position) for seed in (0, 1, 2**32, 2**63, 2**64 - 1) for position in (0, 1, 2, 2**20)]
    numbers = [uniform(seed, position) for seed, position in addresses]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)


def test_numbers_drawn_together_are_those_drawn_alone() -> None:
    dice = random.Random(0)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 2**64 + 5, *(dice.randrange(2**64) for _ in range(500))]
    positions = [dice.randrange(2**40) for _ in seeds]
    assert uniforms(seeds, positions).tolist() == list(map(uniform, seeds, positions))
    assert uniforms([2**64 + 5], [3]).tolist() == [uniform(5, 3)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_row_that_is_not_finite_fails_alone(options: dict[str, Any]) -> None:
    logits = torch.stack([row(0), row(1), row(2), torch.full((VOCAB,), -math.inf)])
    logits[1, 7] = math.nan
    sequences = [sequence([1], [], logprobs=2, **options) for _ in range(4)]
    results = sample(logits, sequences)
    assert [isinstance(result, InternalError) for result in results] == [False, True, False, True]
    assert results[0] == sample(logits[:1], sequences[:1])[0]


def test_logprobs_are_those_of_the_model_before_any_processing() -> None:
    options = {"temperature": 0.5, "top_k": 1, "logit_bias": ((4, 50.0),), "seed": 1}
    (result,) = sample(row(5)[None], [sequence([4], [4], logprobs=3, **options)])
    assert isinstance(result, TokenInfo)
    expected = torch.log_softmax(row(5), -1)
    assert result.token_id == 4
    assert result.logprob == pytest.approx(float(expected[4]))
    assert [token for token, _ in result.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in result.top] == pytest.approx(expected.topk(3).values.tolist())


def test_zero_logprobs_give_the_chosen_token_only() -> None:
    first, second = sample(row(1).expand(2, VOCAB), [sequence([1], [], logprobs=0), sequence([1], [])])
    assert isinstance(first, TokenInfo)
    assert isinstance(second, TokenInfo)
    assert (first.logprob is None, first.top, second.logprob, second.top) == (False, (), None, ())


def test_equal_log_probabilities_are_listed_by_id_whatever_others_ask_for() -> None:
    logits = torch.zeros(3, 5003).index_fill(1, torch.tensor([70, 4000]), 5.0)
    results = sample(logits, [sequence([1], [], logprobs=number) for number in (1, 3, 20)])
    tops = [[token for token, _ in result.top] for result in results if isinstance(result, TokenInfo)]
    assert tops == [[70], [70, 4000, 0], [70, 4000, *range(18)]]


def test_a_certain_token_has_log_probability_zero_and_is_listed_first() -> None:
    (result,) = sample(
        torch.full((1, 9), -math.inf).index_fill(1, torch.tensor(4), 1.0), [sequence([1], [], logprobs=2)]
    )
    assert result == TokenInfo(4, 0.0, ((4, 0.0), (0, -math.inf)))


def test_ties_go_to_the_lowest_id() -> None:
    assert draw(torch.zeros(1, VOCAB), sequence([1], [])) == [0]
    for top_p in (0.0, 1e-9):
        narrow = [sequence([1], [], temperature=1.0, top_p=top_p, seed=seed) for seed in range(20)]
        assert set(draw(torch.zeros(20, VOCAB), *narrow)) == {0}


def test_a_tiny_temperature_is_greedy_and_never_overflows() -> None:
    for temperature in (1e-30, 1e-60):
        cold = sequence([1], [], temperature=temperature, seed=5)
        assert draw(row(3, spread=1e4)[None], cold) == [int(row(3, spread=1e4).argmax())]


def test_half_precision_logits_are_taken() -> None:
    (token,) = draw(row(2)[None].bfloat16(), sequence([1], [], temperature=1.0, top_p=0.5, logprobs=1))
    assert 0 <= token < VOCAB
