"""A Gloo process group of exactly two, outside torch's default group. The one module that touches private torch names.

Torch's TCPStore is not used for the rendezvous: its client waits for ever on a server that accepts and stays silent
(a stopped process), listens on every interface, and asks for no secret. A store over our own channel has our deadline.

Known of Gloo (torch 2.13), each covered by a test:
- a dead peer ends a wait at once; a stopped one ends it at the deadline, after which the pair is closed for good,
  so that nothing is written late;
- `abort` from another thread does not wake a wait;
- a message shorter than what was posted passes silently (digests catch it), a longer one ends the *receiving process*:
  both ends must derive sizes from the same plan, agreed on before (the header).

Foreign exceptions end here. Knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
        try:
            with _translated("the link could not be opened"):
                options = _Gloo._Options()
                options._devices = [_Gloo.create_device(hostname=host)]
                options._timeout = timedelta(seconds=deadline.left_s())
                options._threads = 1
                store = _ChannelStore(channel, deadline)
                self._group: Any = _Gloo(store, rank, 2, options)
        finally:
            channel.close()

    def send(self, data: torch.Tensor, deadline: Deadline) -> None:
        """`data`: contiguous uint8 in host memory; not read any more on return."""
        with _translated("the peer took no more bytes"):
            work = self._group.send([data], self._peer, 0)
            work.wait(timedelta(seconds=deadline.left_s()))

    def recv(self, data: torch.Tensor, deadline: Deadline) -> None:
        """Fill `data`; not written any more on return, whatever happened."""
        with _translated("the peer sent no more bytes"):
            work = self._group.recv([data], self._peer, 0)
            work.wait(timedelta(seconds=deadline.left_s()))

    def close(self) -> None:
        with _translated("the link could not be closed"):
            self._group.abort()
            self._group.shutdown()


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch's DistError and Gloo's IoException are RuntimeErrors
        first_line = str(error).partition("\n")[0]
        raise TransferFailed(f"{what}: {first_line}") from error
