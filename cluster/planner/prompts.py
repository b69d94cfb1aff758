"""Token ids of simulated prompts: equal where the workload says that prompts begin alike, different elsewhere.

A prefix id stands for a block of `HASH_BLOCK_TOKENS` tokens and for all blocks before it, so that a run is told from
others by its first token alone: the ids are that token, and new text starts with a negative number. A turn of a
conversation repeats the prompt before it and the tokens that the engine answered, which are all `ANSWER_TOKEN`.

Where nothing is shared, prompts are zeros: nobody looks at them. Knows nothing of caches.
"""

from __future__ import annotations

from collections import OrderedDict

from pdserve.cluster.arrivals import HASH_BLOCK_TOKENS, Arrival

ANSWER_TOKEN = 0
MAX_SESSIONS = 20_000
"""Conversations remembered; of one that is forgotten the next turn is as new as its ids say."""

Tokens = tuple[int, ...]


class Prompts:
    """Owner of what conversations said so far."""

    def __init__(self, are_shared: bool) -> None:
        self._are_shared = are_shared
        self._num_texts = 0
        self._sessions: OrderedDict[int, Tokens] = OrderedDict()

    def of(self, arrival: Arrival) -> Tokens:
        """The prompt's tokens. A turn of a conversation comes after `answered` for the turn before it."""
        num_tokens = arrival.num_prompt_tokens
        if not self._are_shared:
            return zeros(num_tokens)
        said = self._history(arrival) or self._shared(arrival)
        return said + self._new_text(num_tokens - len(said))

    def answered(self, arrival: Arrival, prompt: Tokens, num_output_tokens: int) -> None:
        """The request has ended after so many tokens."""
        if self._are_shared and arrival.session is not None:
            self._sessions[arrival.session] = prompt + zeros(num_output_tokens)
            self._sessions.move_to_end(arrival.session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _history(self, arrival: Arrival) -> Tokens:
        if arrival.session is None or not arrival.num_history_tokens:
            return ()
        said = self._sessions.get(arrival.session, ())
        return said[: min(arrival.num_history_tokens, arrival.num_prompt_tokens)]

    def _shared(self, arrival: Arrival) -> Tokens:
        found: Tokens = ()
        for prefix_id in arrival.prefix_ids:
            found += _run(prefix_id, HASH_BLOCK_TOKENS)
        return found[: arrival.num_prompt_tokens]

    def _new_text(self, num_tokens: int) -> Tokens:
        self._num_texts += 1
        return _run(-self._num_texts, num_tokens)


def _run(first: int, num_tokens: int) -> Tokens:
    return (first, *zeros(num_tokens - 1)) if num_tokens > 0 else ()


def zeros(num_tokens: int) -> Tokens:
    return (ANSWER_TOKEN,) * num_tokens
