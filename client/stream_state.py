"""What a sync and an async stream share: what has come so far, the end, and cancelling.

Knows that a call can be cancelled, not how it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pdserve.client.folding import CompletionFold
from pdserve.client.results import Completion
from pdserve.proto.errors import RequestCancelled


class StreamState:
    """Open -> finished (a completion) or closed (cancelled, or failed)."""

    def __init__(self, fold: CompletionFold, call: Any) -> None:
        self.fold = fold
        self.call = call
        self.ended = False
        self._completion: Completion | None = None

    @property
    def request_id(self) -> str:
        """The id the router gave or confirmed; empty until its first message."""
        return self.fold.request_id

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far, also after a failure."""
        return tuple(token.token_id for token in self.fold.tokens)

    @property
    def text(self) -> str:
        """The text so far, also after a failure."""
        return self.fold.text

    @property
    def completion(self) -> Completion:
        """The whole answer, once the stream has been read to its end; before that a `RuntimeError`."""
        if self._completion is None:
            raise RuntimeError("the stream has not been read to its end")
        return self._completion

    def close(self) -> None:
        """Cancel the request unless it has ended. Safe to call twice."""
        self.ended = True
        self.call.cancel()

    def __del__(self) -> None:
        """A stream that nobody can read any more (a `break` out of its loop) must not keep the server busy."""
        if not self.ended:
            self.close()

    def finish(self) -> None:
        self._completion = self.fold.completion()
        self.ended = True

    @contextmanager
    def cancelled_on_error(self) -> Iterator[None]:
        """Whatever goes wrong while reading, ours or theirs, ends the stream and stops the work.

        A stream that was closed by someone else while it was being read just ends.
        """
        try:
            yield
        except RequestCancelled:
            if not self.ended:
                self.close()
                raise
        except BaseException:
            self.close()
            raise
