"""A Gloo process group of exactly two, outside torch's default group. The one module that touches private torch names.

Torch's TCPStore is not used for the rendezvous: its client waits for ever on a server that accepts and stays silent
(a stopped process), listens on every interface, and asks for no secret. A store over our own channel has our deadline.

Known of Gloo (torch 2.13), each covered by a test:
- a dead peer ends a wait at once, but not for a message whose bytes have begun to flow: a large message is therefore
  followed by one of a single byte, and that is what a receiver waits for. A sender learns of it at its deadline only;
- a stopped peer ends a wait at the deadline, after which the pair is closed for good, so that nothing is written late;
- `abort` from another thread does not wake a wait, and leaves messages pending: only a wait that ended, well or at
  its deadline, proves that their memory is no longer used;
- several messages may be pending each way and keep their order; bytes flow only once the receive is posted, and a
  receive posted late can cost milliseconds where cores are few: post ahead;
- a message shorter than what was posted passes silently (digests catch it), a longer one ends the *receiving process*:
  both ends must derive sizes from the same plan, agreed on before (the header).

Foreign exceptions end here. Knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pdserve.kv_transfer.link import Deadline
from pdserve.kv_transfer.rendezvous import Channel
from pdserve.proto.errors import StartupError, TransferFailed

_NAMES = ("Store", "ProcessGroupGloo")
_GLOO_NAMES = ("_Options", "create_device", "send", "recv", "abort", "shutdown")


def check_torch() -> None:
    """Raises `StartupError` if this torch has no pairwise Gloo groups."""
    missing = [name for name in _NAMES if not hasattr(dist, name)]
    missing += [f"ProcessGroupGloo.{name}" for name in _GLOO_NAMES if not hasattr(_Gloo, name)]
    if missing:
        raise StartupError(f"torch {torch.__version__} lacks {', '.join(missing)}: remove gloo from kv_transfer.links")


# Names that torch's stubs do not know, or that a build without distributed lacks: see `check_torch`.
_Store: Any = getattr(dist, "Store", object)
_Gloo: Any = getattr(dist, "ProcessGroupGloo", None)


class _ChannelStore(_Store):  # type: ignore[misc]
    """The key-value store that Gloo wants, spread over both ends: what one sets, the other can get. One use."""

    def __init__(self, channel: Channel, deadline: Deadline) -> None:
        super().__init__()
        self._channel = channel
        self._deadline = deadline
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        self._channel.put(key, data, self._deadline)

    def get(self, key: str) -> bytes:
        while key not in self._values:
            name, value = self._channel.next(self._deadline)
            self._values[name] = value
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


class PairGroup:
    """This end of two. Opening blocks until the other end does the same. Raises `TransferFailed` throughout."""

    def __init__(self, channel: Channel, rank: int, host: str, deadline: Deadline) -> None:
        """Consumes `channel`. `host` is the interface of the data connection on this side."""
        check_torch()
        self._peer = 1 - rank
        self._end = torch.zeros(1, dtype=torch.uint8)  # of large messages; read and written, never looked at
        try:
            with _translated("the link could not be opened"):
                options = _Gloo._Options()
                options._devices = [_Gloo.create_device(hostname=host)]
                options._timeout = timedelta(seconds=deadline.left_s())
                options._threads = 1
                store = _ChannelStore(channel, deadline)
                self._group: Any = _Gloo(store, rank, 2, options)  # None once closed
        finally:
            channel.close()

    def send(self, *pieces: torch.Tensor) -> Pending:
        """Begin to send a message: contiguous uint8 in host memory. Messages go out in the order of the calls."""
        with _translated(_NO_SEND):
            group = self._open_group()
            return Pending([group.send([piece], self._peer, 0) for piece in self._with_end(pieces)], _NO_SEND)

    def recv(self, *pieces: torch.Tensor) -> Pending:
        """Begin to fill these with the next message that no earlier call waits for, whose pieces must be as large."""
        with _translated(_NO_RECV):
            group = self._open_group()
            return Pending([group.recv([piece], self._peer, 0) for piece in self._with_end(pieces)], _NO_RECV)

    def close(self) -> None:
        """The peer learns of it at once, provided that no message is pending. Harmless when repeated."""
        group, self._group = self._group, None
        if group is not None:
            with _translated("the link could not be closed"):
                group.abort()
                group.shutdown()
        # The connection ends with the last reference to the group: this one, even if a traceback still knows this pair.

    def _with_end(self, pieces: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        num_bytes = sum(piece.numel() for piece in pieces)
        return pieces if num_bytes < _MIN_ENDED_BYTES else (*pieces, self._end)

    def _open_group(self) -> Any:
        if self._group is None:
            raise TransferFailed("the link is closed")
        return self._group


_NO_SEND = "the peer took no more bytes"
_NO_RECV = "the peer sent no more bytes"


class Pending:
    """A message on its way. Its memory belongs to Gloo until `wait` or `cancel` ends, however it ends."""

    def __init__(self, works: list[Any], failure: str) -> None:
        self._works = works  # a message's pieces and its end; those that are done would keep the connection open
        self._failure = failure

    def wait(self, deadline: Deadline) -> None:
        with _translated(self._failure):
            while self._works:
                self._works[-1].wait(timedelta(seconds=deadline.left_s()))
                self._works.pop()

    def cancel(self) -> None:
        """Give the message up, and with it the whole pair unless it is done already. Harmless when it has ended."""
        while self._works:
            with suppress(TransferFailed), _translated(self._failure):
                self._works.pop().wait(_AT_ONCE)


_MIN_ENDED_BYTES = 1 << 16  # what is smaller comes in one piece
_AT_ONCE = timedelta(milliseconds=1)  # zero would mean the group's own timeout


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch's DistError and Gloo's IoException are RuntimeErrors
        first_line = str(error).partition("\n")[0]
        raise TransferFailed(f"{what}: {first_line}") from error
