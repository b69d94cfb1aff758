"""When requests come and how long they are: plans of open-loop load, made before anything is sent.

Pure: the random source is an argument, nothing is sent and no clock is read. Lengths of the presets are lognormal
through the median and the 90th percentile of published traces (Azure 2023 conversation, Mooncake conversation,
ServeGen R1 peak hour); `burstiness` is the shape of gamma-distributed gaps, 1 being a Poisson process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from pdserve.proto.errors import ConfigError

Z90 = 1.2815515655446004
"""90th percentile of the standard normal distribution."""

HASH_BLOCK_TOKENS = 512
"""Tokens a prefix id of a Mooncake trace stands for."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come, `at_s` after the start. Equal `prefix_ids` stand for equal blocks of prompt tokens.

    `slo_class`, `priority` and `tenant` are whom it is for. A turn of a conversation names its `session`, and
    `num_history_tokens` of its prompt, from the front, are the turn before: its prompt and its answer. The ids cover
    whole blocks only there, so that they promise up to one block less than the history.
    """

    at_s: float
    num_prompt_tokens: int
    max_tokens: int
    prefix_ids: tuple[int, ...] = ()
    slo_class: str | None = None
    priority: int = 0
    tenant: str | None = None
    session: int | None = None
    num_history_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal distribution of token counts by two of its percentiles; equal ones make it a constant."""

    p50: float
    p90: float

    def draw(self, random: np.random.Generator) -> int:
        sigma = math.log(self.p90 / self.p50) / Z90
        return max(1, round(self.p50 * math.exp(sigma * random.standard_normal())))


@dataclass(frozen=True, slots=True)
class Workload:
    """Statistics of one kind of traffic. `rate` is in requests per second."""

    prompt: Lengths
    output: Lengths
    rate: float
    burstiness: float = 1.0


WORKLOADS = {
    "azure-conv": Workload(Lengths(1020, 2734), Lengths(129, 424), rate=5.53, burstiness=0.84),
    "mooncake": Workload(Lengths(6909, 27367), Lengths(350, 597), rate=3.40, burstiness=0.11),
    "r1": Workload(Lengths(286, 935), Lengths(529, 1495), rate=35.1, burstiness=0.66),
    "short": Workload(Lengths(32, 64), Lengths(16, 32), rate=2.0),
}


def synthesize(workload: Workload, num_requests: int, random: np.random.Generator) -> Iterator[Arrival]:
    """`num_requests` arrivals of a workload; the first comes after one gap.

    Raises:
        ConfigError: a rate or a shape that is not a positive number.
    """
    for name, value in (("request rate", workload.rate), ("burstiness", workload.burstiness)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}: {value!r} is not a positive number")
    return _synthesize(workload, num_requests, random)


def _synthesize(workload: Workload, num_requests: int, random: np.random.Generator) -> Iterator[Arrival]:
    at_s, mean_gap_s = 0.0, 1.0 / workload.rate
    for _ in range(num_requests):
        at_s += float(random.gamma(workload.burstiness, mean_gap_s / workload.burstiness))
        yield Arrival(at_s, workload.prompt.draw(random), workload.output.draw(random))


def fit_lengths(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> tuple[int, int]:
    """Lengths that a context holds: what does not fit has its output cut to half of it, its prompt to the rest."""
    if num_prompt_tokens + max_tokens <= max_model_len:
        return num_prompt_tokens, max_tokens
    max_tokens = min(max_tokens, max(1, max_model_len // 2))
    return min(num_prompt_tokens, max(1, max_model_len - max_tokens)), max_tokens


def fit(arrival: Arrival, max_model_len: int) -> Arrival:
    """The arrival cut to what the model's context holds."""
    asked = arrival.num_prompt_tokens, arrival.max_tokens
    num_prompt_tokens, max_tokens = fitted = fit_lengths(*asked, max_model_len)
    if fitted == asked:
        return arrival
    return replace(arrival, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a plan amounts to, without keeping it."""

    num_requests: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int


def survey(arrivals: Iterable[Arrival]) -> Survey:
    num_requests = prompt_tokens = output_tokens = 0
    duration_s = 0.0
    for arrival in arrivals:
        num_requests += 1
        prompt_tokens += arrival.num_prompt_tokens
        output_tokens += arrival.max_tokens
        duration_s = arrival.at_s
    return Survey(num_requests, duration_s, prompt_tokens, output_tokens)


class PromptMaker:
    """Random prompts of planned lengths: ids in `[0, vocab_size)` other than the end-of-sequence ones.

    The same seed and plan give the same prompts. Blocks of equal prefix id are equal in every prompt, so that a
    prefix cache finds what the trace says it would; everything else is unique.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int], seed: int) -> None:
        self.allowed = np.setdiff1d(np.arange(vocab_size), np.array(list(eos_token_ids), dtype=np.int64))
        if self.allowed.size == 0:
            raise ConfigError("the model has no token to build prompts from")
        self.seed = seed
        self._serial = itertools.count()

    def prompt(self, arrival: Arrival) -> list[int]:
        """`arrival.num_prompt_tokens` token ids."""
        wanted = arrival.num_prompt_tokens
        own = np.random.default_rng((self.seed, 0, next(self._serial)))
        shared_ids = arrival.prefix_ids[: -(-wanted // HASH_BLOCK_TOKENS)]
        parts = [self._block(prefix_id) for prefix_id in shared_ids]
        parts.append(self._draw(own, max(0, wanted - HASH_BLOCK_TOKENS * len(parts))))
        tokens: list[int] = np.concatenate(parts)[:wanted].tolist()
        return tokens

    def _block(self, prefix_id: int) -> np.ndarray:
        return self._draw(np.random.default_rng((self.seed, 1, prefix_id)), HASH_BLOCK_TOKENS)

    def _draw(self, random: np.random.Generator, num_tokens: int) -> np.ndarray:
        drawn: np.ndarray = self.allowed[random.integers(self.allowed.size, size=num_tokens)]
        return drawn
