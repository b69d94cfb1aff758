"""Named messages between the two ends of a link, over the connection that the rendezvous left open.

For links whose data path says little: over it they agree on a transfer before any of it moves, and each end learns at
once that the other gave up or died. Knows nothing of what the messages mean.
"""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

from pdserve.kv_transfer.link import Deadline
from pdserve.kv_transfer.rendezvous import Channel
from pdserve.proto.errors import TransferFailed

_GAVE_UP = "pdserve/gave-up"
_LAST_WORD_S = 0.5
_MAX_REASON_BYTES = 1000


class Mailbox:
    """One end. Reading and writing may be done by two threads; each by one at a time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._unread: dict[str, bytes] = {}

    def put(self, name: str, data: bytes, deadline: Deadline) -> None:
        self._channel.put(name, data, deadline)

    def take(self, name: str, deadline: Deadline) -> bytes:
        """The peer's message of that name. Raises `TransferFailed` if it gave up, died, or says nothing in time."""
        while name not in self._unread:
            found, data = self._channel.next(deadline)
            if found == _GAVE_UP:
                raise TransferFailed(f"the peer gave up: {data.decode(errors='replace')}")
            self._unread[found] = data
        return self._unread.pop(name)

    def has(self, name: str) -> bool:
        """Whether it has been read already, along with another."""
        return name in self._unread

    def close(self, reason: str) -> None:
        """Tell the peer why, if it listens, and hang up."""
        with suppress(TransferFailed):
            self._channel.put(_GAVE_UP, reason.encode()[:_MAX_REASON_BYTES], Deadline(_LAST_WORD_S))
        self._channel.close()


class Watch:
    """Waits for one message of the peer's in a thread, while the caller's own waits `look` how that goes."""

    def __init__(self, mailbox: Mailbox, name: str, deadline: Deadline) -> None:
        self._mailbox = mailbox
        self._name = name
        self._deadline = deadline
        self._error: TransferFailed | None = None
        self._thread = Thread(target=self._wait, name="link-watch", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Raises `TransferFailed` once it is known that the message will not come."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Return when the message is there; raises `TransferFailed` if it does not come in time."""
        self._thread.join()  # ends at the deadline at the latest
        self.look()

    def _wait(self) -> None:
        try:
            self._mailbox.take(self._name, self._deadline)
        except TransferFailed as error:
            self._error = error
