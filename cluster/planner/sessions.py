"""Conversations: each turn's prompt is all that was said before and a new message, sent a think time after the answer.

Sessions start like an open loop; their later turns wait for answers. In the long run the turns come at the rate that
was asked for whatever the answers take, but under overload they come later instead of piling up. What a session says,
and how long its user thinks, is drawn when it starts, in order of starts: no end of another request changes it.

A conversation that outgrows the context goes on with its system prompt and its new message alone, as clients do that
drop their history. Memory is that of the sessions that live. Knows no clock but the ends it is told of.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from pdserve.cluster.arrivals import HASH_BLOCK_TOKENS, Arrival, fit_lengths
from pdserve.cluster.planner.lengths import Pair, lognormal, lognormal_mean, sigma
from pdserve.cluster.planner.prefixes import SharedPrompt, history_ids
from pdserve.cluster.planner.processes import CHUNK
from pdserve.cluster.planner.source import SESSION_BITS

Turns: TypeAlias = Literal["geometric", "fixed"]


@dataclass(frozen=True, slots=True)
class TrafficClass:
    """Whom a request is for."""

    name: str | None = None
    priority: int = 0
    tenant: str | None = None


NO_CLASS = TrafficClass()


class Turn(NamedTuple):
    """What the user sends, how long the answer is, and how long the user thinks about it."""

    message_tokens: int
    output_tokens: int
    think_s: float


@dataclass(frozen=True, slots=True)
class Script:
    """A session before it starts. The first `num_past` turns are over when it first sends."""

    turns: tuple[Turn, ...]
    system: SharedPrompt | None
    traffic_class: TrafficClass
    num_past: int = 0


@dataclass(frozen=True, slots=True)
class Habits:
    """How users converse: number of turns and think times."""

    turns: Turns
    mean_turns: float
    think_p50_s: float
    think_p90_s: float

    def turn_counts(self, random: np.random.Generator) -> Iterator[int]:
        if self.turns == "fixed":
            yield from itertools.repeat(round(self.mean_turns))
        while True:
            yield from random.geometric(1 / self.mean_turns, CHUNK).tolist()

    def num_in_progress(self, sessions_per_s: float, random: np.random.Generator) -> int:
        """Sessions that live at a moment of steady state, were all answers immediate."""
        mean_think_s = lognormal_mean(self.think_p50_s, self.think_p90_s)
        return int(random.poisson(sessions_per_s * (self.mean_turns - 1) * mean_think_s))

    def progress(self, random: np.random.Generator) -> tuple[int, int]:
        """Turns behind and before a user who is found thinking."""
        if self.turns == "fixed":
            past = int(random.integers(1, round(self.mean_turns)))
            return past, round(self.mean_turns) - past
        past, left = random.geometric(1 / self.mean_turns, 2).tolist()
        return past, left

    def residual_think_s(self, random: np.random.Generator) -> float:
        """What is left of the think time of a user who is found thinking: part of a length-biased draw."""
        spread = sigma(self.think_p50_s, self.think_p90_s)
        found_s = self.think_p50_s * math.exp(spread * (spread + float(random.standard_normal())))
        return found_s * float(random.random())


class ScriptWriter:
    """Writes scripts from endless streams, of which each session takes its part."""

    def __init__(
        self,
        habits: Habits,
        pairs: Iterator[Pair],
        systems: Iterator[SharedPrompt | None],
        classes: Iterator[TrafficClass],
        random: np.random.Generator,
    ) -> None:
        self._pairs = pairs
        self._systems = systems
        self._classes = classes
        self._counts = habits.turn_counts(random)
        # A child has its own draws: how many turns came before does not change what is thought.
        self._thinks_s = lognormal(habits.think_p50_s, habits.think_p90_s, random.spawn(1)[0])

    def script(self) -> Script:
        return self.script_of(next(self._counts), 0)

    def script_of(self, num_turns: int, num_past: int) -> Script:
        pairs, thinks_s = itertools.islice(self._pairs, num_turns), itertools.islice(self._thinks_s, num_turns)
        turns = tuple(Turn(*pair, think_s) for pair, think_s in zip(pairs, thinks_s, strict=True))
        return Script(turns, next(self._systems), next(self._classes), num_past)


class _Session:
    """A live session: what was said, and what is to be said."""

    __slots__ = ("epoch", "history_tokens", "position", "script")

    def __init__(self, script: Script) -> None:
        self.script = script
        self.position = script.num_past
        self.epoch = 0
        said = sum(turn.message_tokens + turn.output_tokens for turn in script.turns[: script.num_past])
        self.history_tokens = said + self.system_tokens if script.num_past else 0

    @property
    def system_tokens(self) -> int:
        return self.script.system.num_tokens if self.script.system else 0


class Sessions:
    """The source. `starts_s` is endless, like the writer's streams; `found` are sessions in progress at time 0."""

    def __init__(
        self,
        starts_s: Iterator[float],
        writer: ScriptWriter,
        *,
        found: Iterable[tuple[float, Script]] = (),
        namespace: int = 0,
        max_model_len: int | None = None,
    ) -> None:
        self._starts_s = starts_s
        self._writer = writer
        self._namespace = namespace
        self._max_model_len = max_model_len
        self._live: dict[int, _Session] = {}
        self._due: list[tuple[float, int]] = []
        for number, (at_s, script) in enumerate(found):
            self._live[number] = _Session(script)
            self._due.append((at_s, number))
        heapq.heapify(self._due)
        self._next_start = len(self._due)
        self._expect_start()

    @property
    def num_live(self) -> int:
        """Sessions that have sent something and will send more, and those that wait for their last answer."""
        return len(self._live)

    def _expect_start(self) -> None:
        heapq.heappush(self._due, (next(self._starts_s), self._next_start))

    def next_arrival_s(self) -> float:
        return self._due[0][0]

    def pop(self) -> Arrival:
        at_s, number = heapq.heappop(self._due)
        if number == self._next_start:
            self._live[number] = _Session(self._writer.script())
            self._next_start += 1
            self._expect_start()
        return self._say(at_s, number, self._live[number])

    def ended(self, arrival: Arrival, now_s: float) -> None:
        assert arrival.session is not None
        number = arrival.session & ((1 << SESSION_BITS) - 1)
        session = self._live[number]
        if session.position == len(session.script.turns):
            del self._live[number]
        else:
            heapq.heappush(self._due, (now_s + session.script.turns[session.position - 1].think_s, number))

    def _say(self, at_s: float, number: int, session: _Session) -> Arrival:
        """The next turn."""
        turn = session.script.turns[session.position]
        known = session.history_tokens or session.system_tokens
        prompt, output = known + turn.message_tokens, turn.output_tokens
        if self._max_model_len is not None and prompt + output > self._max_model_len:
            session.epoch += 1
            session.history_tokens = 0
            fitted = fit_lengths(session.system_tokens + turn.message_tokens, output, self._max_model_len)
            prompt, output = fitted
        history_tokens = session.history_tokens
        session.position += 1
        session.history_tokens = prompt + output
        who = session.script.traffic_class
        return Arrival(
            at_s,
            prompt,
            output,
            self._prefix_ids(number, session, prompt // HASH_BLOCK_TOKENS),
            who.name,
            who.priority,
            who.tenant,
            self._namespace << SESSION_BITS | number,
            history_tokens,
        )

    def _prefix_ids(self, number: int, session: _Session, num_blocks: int) -> tuple[int, ...]:
        system = session.script.system
        shared = system.prefix_ids[:num_blocks] if system else ()
        return shared + history_ids(self._namespace, number, session.epoch, len(shared), num_blocks)


def found_sessions(
    habits: Habits, sessions_per_s: float, writer: ScriptWriter, random: np.random.Generator
) -> Iterator[tuple[float, Script]]:
    """Sessions in progress in steady state: without them a run would begin with first turns alone, below its rate."""
    if habits.mean_turns == 1:
        return
    for _ in range(habits.num_in_progress(sessions_per_s, random)):
        past, left = habits.progress(random)
        yield habits.residual_think_s(random), writer.script_of(past + left, past)
