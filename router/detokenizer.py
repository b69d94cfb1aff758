"""Token ids to text as they come, and stop strings in that text. Pure over a `decode` callable.

`IncrementalDecoder` never emits half a character: text that ends in U+FFFD is held until the next tokens
complete it (or prove that it is no character). `StopMatcher` holds back what may be the beginning of a stop
string. `Detokenizer` is the two in a row, fed one token at a time so that the outcome does not depend on how
tokens were batched. Knows nothing of requests, of tokenizer files or of special tokens (`decode` drops those).

Own code rather than `tokenizers.decoders.DecodeStream`: that one holds a run of invalid bytes for ever (memory and
time without bound), has no flush for a completion that ends inside a character, and may refuse a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.router.validation import StopOptions

REPLACEMENT = "\ufffd"
# One token per byte; what is held for longer is no character.
MAX_CHARACTER_TOKENS = 4
MAX_HELD_TOKENS = 2 * MAX_CHARACTER_TOKENS
MAX_WINDOW_TOKENS = 16


class IncrementalDecoder:
    """`decode(ids[start:])` is compared with what was emitted of it; the window moves on after each emission."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_emitted_chars = 0
        self._num_held_tokens = 0
        self._boundary = 0  # tokens of the window up to the last emission but one: no character straddles it

    def feed(self, token_id: int) -> str:
        """The text that this token completes; possibly none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        incomplete = text.endswith(REPLACEMENT)
        self._num_held_tokens = self._num_held_tokens + 1 if incomplete else 0
        if incomplete and self._num_held_tokens < MAX_HELD_TOKENS:
            return ""
        settled = text[:-1] if incomplete else text
        emitted = settled[self._num_emitted_chars :]
        self._num_emitted_chars = max(self._num_emitted_chars, len(settled))
        self._move(incomplete)
        return emitted

    def flush(self) -> str:
        """What is still held, half characters as U+FFFD. The end."""
        text = self._decode(self._window)
        emitted = text[self._num_emitted_chars :]
        self._num_emitted_chars = len(text)
        return emitted

    def _move(self, incomplete: bool) -> None:
        """Keep a little context, so that the cost of a token does not grow with the completion."""
        if len(self._window) >= MAX_WINDOW_TOKENS:
            start = len(self._window) - MAX_CHARACTER_TOKENS if incomplete else self._boundary
            self._window = self._window[start:]
            self._num_emitted_chars = len(self._decode(self._window)) - incomplete
        self._boundary = len(self._window)


@dataclass(frozen=True, slots=True)
class Match:
    """`before` is the text in front of the stop string, as far as it had not been emitted."""

    before: str
    stop: str


class StopMatcher:
    """The stop string that is completed first wins; of several completed by one character, the longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def feed(self, text: str) -> str | Match:
        """The text that is certainly no part of a stop string, or the match."""
        if not self._stops:
            return text
        self._held += text
        ends = ((self._held.find(stop), stop) for stop in self._stops)
        found = [(start + len(stop), start, stop) for start, stop in ends if start >= 0]
        if found:
            _, start, stop = min(found)
            return Match(self._held[:start], stop)
        keep = self._possible_start()
        emitted, self._held = self._held[:keep], self._held[keep:]
        return emitted

    def flush(self) -> str:
        """What was held and turned out to be no stop string."""
        emitted, self._held = self._held, ""
        return emitted

    def _possible_start(self) -> int:
        """Where the longest tail begins that some stop string begins with."""
        for start in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)


class Detokenizer:
    """Text of one completion. `stopped` holds the stop string once one was found; feeding must end then."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: StopOptions, min_tokens: int) -> None:
        self._decoder = IncrementalDecoder(decode)
        self._matcher = StopMatcher(stop.strings)
        self._include_stop = stop.include_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.stopped: str | None = None

    def feed(self, token_id: int) -> str:
        """The text that may be shown after this token. Stop strings count from token `min_tokens` on."""
        self._num_tokens += 1
        text = self._decoder.feed(token_id)
        return text if self._num_tokens < self._min_tokens else self._match(text)

    def flush(self) -> str:
        """The rest, when the worker ended the completion. May still find a stop string."""
        text = self._decoder.flush()
        if self._num_tokens < self._min_tokens:
            return text
        shown = self._match(text)
        return shown if self.stopped is not None else shown + self._matcher.flush()

    def _match(self, text: str) -> str:
        outcome = self._matcher.feed(text)
        if isinstance(outcome, str):
            return outcome
        self.stopped = outcome.stop
        return outcome.before + (outcome.stop if self._include_stop else "")
