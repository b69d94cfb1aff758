"""What a source's requests are like: rate, burstiness, lengths, prefix reuse, drift. Memory does not grow with them.

Lengths go into a histogram of buckets 1 % wide, so percentiles are right to half a percent (counts below 50 exactly).
Prefix reuse is what a cache that forgets nothing would find. It is exact while the ids are few; of many, a sample by
hash is followed (each id either always or never), which estimates the share without bias. A conversation's reuse is
its whole history, not only the full blocks of it.

A closed loop is described as if every answer came at once. Knows no hardware: nothing here says what fits it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pdserve.cluster.arrivals import HASH_BLOCK_TOKENS, Arrival
from pdserve.cluster.planner.prefixes import scatter
from pdserve.cluster.planner.source import Source, drain
from pdserve.proto.errors import ConfigError

NUM_WINDOWS = 10
FINE_WINDOWS = 1 << 11
BUCKET = math.log(1.01)
MAX_FOLLOWED_IDS = 1 << 18
HASH_SPACE = 1 << 63


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of token counts."""

    p50: int
    p90: int
    p99: int


@dataclass(frozen=True, slots=True)
class Description:
    """`tokens_ratio` is prompt tokens per answer token, of all requests and of ten equal windows of time.

    `gap_cv` is the coefficient of variation of the gaps: 1 for a Poisson process. `reuse_share` is of prompt tokens.
    """

    num_requests: int
    duration_s: float
    rate: float
    gap_cv: float
    prompt: Percentiles
    output: Percentiles
    prompt_tokens: int
    output_tokens: int
    tokens_ratio: float
    window_ratios: tuple[float, ...]
    reuse_share: float


def describe(source: Source, num_requests: int) -> Description:
    """The first `num_requests` requests of a source, taken from it. The rate counts the gaps between them.

    Raises:
        ConfigError: it has fewer than two requests.
    """
    return describe_arrivals(itertools.islice(drain(source), num_requests))


def describe_arrivals(arrivals: Iterable[Arrival]) -> Description:
    """The same of all of some arrivals, in order of time."""
    prompts, outputs, gaps, reuse = Histogram(), Histogram(), Gaps(), ReuseMeter()
    windows = Windows()
    for arrival in arrivals:
        prompts.add(arrival.num_prompt_tokens)
        outputs.add(arrival.max_tokens)
        gaps.add(arrival.at_s)
        reuse.add(arrival)
        windows.add(arrival)
    if prompts.num < 2:
        raise ConfigError(f"workload: {prompts.num} requests are too few to describe; ask for more")
    return Description(
        num_requests=prompts.num,
        duration_s=gaps.sum_s,
        rate=gaps.num / gaps.sum_s if gaps.sum_s > 0 else math.inf,
        gap_cv=gaps.cv(),
        prompt=prompts.percentiles(),
        output=outputs.percentiles(),
        prompt_tokens=prompts.sum,
        output_tokens=outputs.sum,
        tokens_ratio=prompts.sum / outputs.sum,
        window_ratios=windows.ratios(),
        reuse_share=reuse.reused_tokens / prompts.sum,
    )


class Histogram:
    """Counts by logarithmic bucket."""

    def __init__(self) -> None:
        self.num = 0
        self.sum = 0
        self._buckets: Counter[int] = Counter()

    def add(self, value: int) -> None:
        self.num += 1
        self.sum += value
        self._buckets[math.floor(math.log(value) / BUCKET)] += 1

    def percentiles(self) -> Percentiles:
        return Percentiles(self.quantile(0.5), self.quantile(0.9), self.quantile(0.99))

    def quantile(self, share: float) -> int:
        rank = share * (self.num - 1)
        buckets = sorted(self._buckets)
        up_to = list(itertools.accumulate(self._buckets[bucket] for bucket in buckets))
        return round(math.exp((buckets[bisect_right(up_to, rank)] + 0.5) * BUCKET))


class Gaps:
    """Mean and variation of the gaps between requests (Welford)."""

    def __init__(self) -> None:
        self.num = 0
        self.sum_s = 0.0
        self._latest_s: float | None = None
        self._mean_s = 0.0
        self._squares = 0.0

    def add(self, at_s: float) -> None:
        if self._latest_s is not None:
            gap_s = at_s - self._latest_s
            self.num += 1
            self.sum_s += gap_s
            off_s = gap_s - self._mean_s
            self._mean_s += off_s / self.num
            self._squares += off_s * (gap_s - self._mean_s)
        self._latest_s = at_s

    def cv(self) -> float:
        return math.sqrt(self._squares / self.num) / self._mean_s if self._mean_s > 0 else 0.0


class Windows:
    """Tokens by time, in at most `FINE_WINDOWS` windows from the first request on; wider ones as time goes on."""

    def __init__(self) -> None:
        self._width_s = 1e-3
        self._first_s: float | None = None
        self._span_s = 0.0
        self._tokens = [(0, 0)] * FINE_WINDOWS

    def add(self, arrival: Arrival) -> None:
        self._first_s = arrival.at_s if self._first_s is None else self._first_s
        self._span_s = arrival.at_s - self._first_s
        while (number := int(self._span_s / self._width_s)) >= FINE_WINDOWS:
            pairs = zip(self._tokens[::2], self._tokens[1::2], strict=True)
            merged = [(prompts + more, outputs + others) for (prompts, outputs), (more, others) in pairs]
            self._tokens = merged + [(0, 0)] * (FINE_WINDOWS // 2)
            self._width_s *= 2
        prompts, outputs = self._tokens[number]
        self._tokens[number] = prompts + arrival.num_prompt_tokens, outputs + arrival.max_tokens

    def ratios(self) -> tuple[float, ...]:
        """Prompt tokens per answer token in ten equal parts of the time, as far as the windows tell them apart."""
        found = [[0, 0] for _ in range(NUM_WINDOWS)]
        for number, (prompts, outputs) in enumerate(self._tokens):
            part = found[min(NUM_WINDOWS - 1, int(number * self._width_s * NUM_WINDOWS / max(self._span_s, 1e-9)))]
            part[0] += prompts
            part[1] += outputs
        return tuple(prompts / outputs for prompts, outputs in found if outputs)


class ReuseMeter:
    """Prompt tokens that were seen before. Follows at most `max_ids` ids."""

    def __init__(self, max_ids: int = MAX_FOLLOWED_IDS) -> None:
        self.reused_tokens = 0.0
        self._max_ids = max_ids
        self._threshold = HASH_SPACE
        self._seen: set[int] = set()

    def add(self, arrival: Arrival) -> None:
        if arrival.num_history_tokens:
            self.reused_tokens += arrival.num_history_tokens
            return
        weight = HASH_SPACE / self._threshold
        for position, prefix_id in enumerate(arrival.prefix_ids):
            if self._threshold < HASH_SPACE and scatter(prefix_id) >= self._threshold:
                continue
            if prefix_id in self._seen:
                within = arrival.num_prompt_tokens - position * HASH_BLOCK_TOKENS
                self.reused_tokens += weight * max(0, min(HASH_BLOCK_TOKENS, within))
            else:
                self._seen.add(prefix_id)
        while len(self._seen) > self._max_ids:
            self._threshold //= 2
            self._seen = {prefix_id for prefix_id in self._seen if scatter(prefix_id) < self._threshold}
