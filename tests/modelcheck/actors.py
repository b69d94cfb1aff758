"""The actors' states, messages and reactions by number: each reaction is computed once and then looked up.

Knows nothing of which steps are possible.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modelcheck import decode, prefill, router
from modelcheck.describe import describe
from modelcheck.draft import ROUTER, Done
from modelcheck.messages import Message, Outcome, Stimulus, Told
from modelcheck.system import System
from modelcheck.tables import Numbered
from modelcheck.vocabulary import PREFILL


class Actors:
    """Owner of everything that has been computed in one search."""

    def __init__(self, system: System) -> None:
        self.messages: Numbered[Message] = Numbered()
        self.routers: Numbered[Any] = Numbered()
        self.workers: Numbered[Any] = Numbered()
        self._system = system
        self._reactions: dict[tuple[int, int, Stimulus | int], Done] = {}
        self._actions: dict[tuple[int, int], tuple[Done, ...]] = {}
        self._said: dict[Message | Told, str] = {}
        self._quiet: dict[tuple[int, int], int] = {}

    def reaction(self, state: int, actor: int, stimulus: Stimulus, number: int | None = None) -> Done:
        """`number` is the stimulus's, if it is a message."""
        key = (actor, state, stimulus if number is None else number)
        done = self._reactions.get(key)
        if done is None:
            module: Any = router if actor == ROUTER else prefill if actor == PREFILL else decode
            outcome = module.receive(self._system, self._states(actor)[state], stimulus)
            done = self._reactions[key] = self._done(actor, outcome)
        return done

    def actions(self, state: int, actor: int) -> tuple[Done, ...]:
        """What a worker may do by itself."""
        key = (actor, state)
        if key not in self._actions:
            module: Any = prefill if actor == PREFILL else decode
            outcomes = module.actions(self._system, self.workers[state])
            self._actions[key] = tuple(self._done(actor, outcome) for outcome in outcomes)
        return self._actions[key]

    def without_old_words(self, router_state: int, state: int) -> int:
        """The worker's state without words of requests that are over: the router would not listen."""
        key = (router_state, state)
        quiet = self._quiet.get(key)
        if quiet is None:
            worker, requests = self.workers[state], self.routers[router_state]
            told = tuple(word for word in worker.told if not requests[word.request].is_over)
            quiet = self._quiet[key] = self.workers.number(replace(worker, told=told))
        return quiet

    def describe(self, message: Message | Told) -> str:
        said = self._said.get(message)
        if said is None:
            said = self._said[message] = describe(self._system.setting, message)
        return said

    def _done(self, actor: int, outcome: Outcome) -> Done:
        sends = tuple(self.messages.number(message) * 2 for message in outcome.sends)
        return Done(outcome, self._states(actor).number(outcome.state), sends)

    def _states(self, actor: int) -> Numbered[Any]:
        return self.routers if actor == ROUTER else self.workers
