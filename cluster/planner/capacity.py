"""About how many requests a second a set-up can take, from its profiles and the mean lengths alone.

Where a search begins, and which of many combinations are worth a simulation: never an answer. Each side is filled with
requests of mean length until a step takes as long as a token may; queueing, transfer and everything that varies are
left out, so that it is too high by a half and more. A set-up takes what the scarcer of its two sides takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pdserve.cluster.planner.findings import Setup
from pdserve.cluster.planner.profile import Profile
from pdserve.cluster.planner.step_model import StepModel
from pdserve.cluster.planner.step_shape import StepShape
from pdserve.proto.types import Role

HEADROOM = 0.75
"""What queueing leaves of it, roughly."""

TPOT_ROOM = 0.9


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a request, and the target that decode steps have to keep."""

    prompt_tokens: float
    output_tokens: float
    tpot_ms: float


class Capacity:
    """Guesses for set-ups whose profiles are known by name."""

    def __init__(self, profiles: Mapping[str, Profile], lengths: Lengths) -> None:
        self._profiles = dict(profiles)
        self._models = {name: StepModel(profile) for name, profile in profiles.items()}
        self._lengths = lengths

    def rate(self, setup: Setup) -> float:
        """Requests per second, more than zero."""
        return self._both(setup)[0]

    def num_inflight(self, setup: Setup) -> float:
        """How many requests run at that rate, roughly: what a run must exceed many times to tell anything."""
        return self._both(setup)[1]

    def _both(self, setup: Setup) -> tuple[float, float]:
        counts, rate, num_inflight = setup.num_workers, 0.0, 0.0
        if Role.PREFILL in counts:
            batch, decode_rate = self._decode(setup)
            decode_rate *= counts[Role.DECODE]
            rate = min(counts[Role.PREFILL] * self._prefill_rate(setup), decode_rate)
            num_inflight = counts[Role.DECODE] * batch * rate / decode_rate
        if Role.MIXED in counts:
            batch, mixed_rate = self._mixed(setup)
            rate += counts[Role.MIXED] * mixed_rate
            num_inflight += counts[Role.MIXED] * batch
        return HEADROOM * rate, HEADROOM * num_inflight

    def _prefill_rate(self, setup: Setup) -> float:
        chunk = setup.max_num_batched_tokens[Role.PREFILL]
        return chunk / self._prefill_s(setup.profiles[Role.PREFILL], chunk) / self._lengths.prompt_tokens

    def _decode(self, setup: Setup) -> tuple[int, float]:
        name = setup.profiles[Role.DECODE]

        def step_s(batch: int) -> float:
            return self._models[name].duration_s(StepShape(0, 0.0, batch, self._context(batch)))

        return self._fullest(name, setup.max_num_seqs[Role.DECODE], step_s)

    def _mixed(self, setup: Setup) -> tuple[int, float]:
        name = setup.profiles[Role.MIXED]
        chunk = setup.max_num_batched_tokens[Role.MIXED]
        lengths = self._lengths

        def step_s(batch: int) -> float:
            """With the prefill that keeps the batch full; in whole chunks, each of which is one step's."""
            tokens = batch * lengths.prompt_tokens / lengths.output_tokens
            share = min(1.0, tokens / chunk)
            size = max(1, round(max(tokens, min(chunk, lengths.prompt_tokens))))
            mixed = StepShape(min(size, chunk), self._pairs(min(size, chunk)), batch, self._context(batch))
            alone = StepShape(0, 0.0, batch, self._context(batch))
            model = self._models[name]
            return share * model.duration_s(mixed) + (1 - share) * model.duration_s(alone)

        def limited(batch: int) -> float:
            """Steps cannot hold more prefill than their chunk."""
            tokens = batch * lengths.prompt_tokens / lengths.output_tokens
            return step_s(batch) * max(1.0, tokens / max(1, chunk - batch))

        return self._fullest(name, setup.max_num_seqs[Role.MIXED], limited)

    def _fullest(self, name: str, max_num_seqs: int, step_s: Callable[[int], float]) -> tuple[int, float]:
        """The largest batch whose steps keep the target, of those that fit, and its requests per second."""
        lengths = self._lengths
        each = lengths.prompt_tokens + lengths.output_tokens / 2
        batch = most = max(1, min(max_num_seqs, int(self._profiles[name].kv_capacity_tokens / each)))
        least, limit_s = 1, TPOT_ROOM * lengths.tpot_ms / 1e3
        if step_s(batch) > limit_s:
            while most - least > 1:
                batch = (least + most) // 2
                least, most = (batch, most) if step_s(batch) <= limit_s else (least, batch)
            batch = least
        return batch, batch / step_s(batch) / lengths.output_tokens

    def _prefill_s(self, name: str, chunk: int) -> float:
        return self._models[name].duration_s(StepShape(chunk, self._pairs(chunk), 0, 0))

    def _pairs(self, tokens: int) -> float:
        return tokens * self._lengths.prompt_tokens / 2

    def _context(self, batch: int) -> int:
        return round(batch * (self._lengths.prompt_tokens + self._lengths.output_tokens / 2))
