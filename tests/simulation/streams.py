"""A server-streaming call over the simulated network: in order, nothing lost, until it breaks.

A connection behaves as TCP does: what meets a cut cable waits; each end finds out by itself, from missing keepalives,
that the other one is gone, and the other end may live on for a while. Knows nothing of what the messages say.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from simulation.loop import Process
from simulation.network import Network

_END = object()


def describe_message(message: Any) -> str:
    """What a message on a stream brings, or "" for one that only tells a load."""
    events = getattr(message, "events", None)
    if events is None:
        members = " ".join(f"{one.info.worker.worker_id}:{one.state}" for one in message.members)
        return f"fleet {message.version}: {members}"
    words = []
    for event in events:
        name = f"{event.id.request_id}#{event.id.attempt}"
        if event.error.kind:
            words.append(f"{name} failed: {event.error.kind}")
        else:
            tokens = ",".join(str(token.token_id) for token in event.tokens)
            words.append(f"{name}[{event.index}]={tokens} {event.finish_reason}".rstrip())
    return "; ".join(words)


class Stream:
    """Both ends of one call. The caller's methods are those of `grpc.aio.UnaryStreamCall` that the project uses."""

    def __init__(self, network: Network, client: Process, server_host: str, method: str) -> None:
        self.client = client
        self.server: Process | None = None
        self.hosts = (client.name, server_host)
        self._network = network
        self._method = method
        self._number = network.connect(self)
        self._is_client_open = True
        self._is_server_open = False
        self._inbox: deque[Any] = deque()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._last_arrival_s = {True: 0.0, False: 0.0}  # by whether it goes to the client
        self._stalled: dict[bool, list[Callable[[], None]]] = {True: [], False: []}

    @property
    def ends(self) -> tuple[Process, ...]:
        return (self.client,) if self.server is None else (self.client, self.server)

    @property
    def is_open(self) -> bool:
        return self._is_client_open or self._is_server_open

    # The caller.

    async def initial_metadata(self) -> grpc.aio.Metadata:
        """Comes with the first message, or with the end."""
        while not self._inbox:
            self._news.clear()
            await self._news.wait()
        return grpc.aio.Metadata()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        while not self._inbox:
            self._news.clear()
            await self._news.wait()
        item = self._inbox.popleft()
        if item is _END:
            self._inbox.append(item)
            raise StopAsyncIteration
        if isinstance(item, grpc.aio.AioRpcError):
            self._inbox.append(item)
            raise item
        text = describe_message(item)
        if text:
            self._network.trace.add(self.client.name, f"hears {self.hosts[1]}: {text}")
        return item

    def cancel(self) -> bool:
        if self._is_client_open:
            self._close_client(_END)
            self._post(False, self._tell_server)
        return True

    # The called.

    def open(self, arrive: Callable[[], None]) -> None:
        self._post(False, arrive)

    def accepted(self, server: Process) -> None:
        self.server = server
        self._is_server_open = True

    def refused(self, error: grpc.aio.AioRpcError) -> None:
        self._post(True, lambda: self._network.loop.soon(self.client, self._close_client, error))

    def serve(self, messages: AsyncIterator[Any]) -> None:
        """In the called process."""
        self._task = self._network.loop.create_task(self._serve(messages), name=f"serve {self._method}")

    async def _serve(self, messages: AsyncIterator[Any]) -> None:
        try:
            async for message in messages:
                self._push(message)
            self._push(_END)
        except asyncio.CancelledError:
            return
        except Exception as error:
            assert self.server is not None
            self._network.trace.violate(self.server.name, f"{self._method} raised {error!r}")
            raise
        finally:
            self._close_server()

    # The connection.

    def mended(self) -> None:
        for to_client, stalled in self._stalled.items():
            if stalled and not self._is_cut(to_client):
                self._stalled[to_client] = []
                for deliver in stalled:
                    deliver()

    def give_up(self, end: Process, why: str) -> None:
        self._network.trace.count("connections given up")
        if end is self.client:
            self._network.loop.soon(self.client, self._client_gives_up, why)
        else:
            self._network.loop.soon(end, self._server_gives_up, why)

    def reset(self, why: str) -> None:
        """Both ends learn of it, each when the news gets there."""
        self._network.trace.add("network", f"{self._method} of {self.hosts[0]} at {self.hosts[1]}: {why}")
        self._post(True, lambda: self._network.loop.soon(self.client, self._client_gives_up, why))
        if self.server is not None:
            self._post(False, self._tell_server)

    def end_died(self, process: Process, silent: bool) -> None:
        """The other end hears of it at once, or from missing keepalives."""
        if process is self.client:
            self._is_client_open = False
        else:
            self._is_server_open = False
        if silent:
            self._network.watch(self, lambda: True, f"{process.name} is silent")
        elif process is self.client:
            self._post(False, self._tell_server)
        else:
            lost = "connection reset"
            self._post(True, lambda: self._network.loop.soon(self.client, self._client_gives_up, lost))
        self._forget()

    def _client_gives_up(self, why: str) -> None:
        if self._is_client_open:
            self._network.trace.add(self.client.name, f"loses {self._method} at {self.hosts[1]}: {why}")
            self._network.trace.count("streams broken")
            details = grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details=why
            )
            self._close_client(details)
            self._post(False, self._tell_server)

    def _server_gives_up(self, why: str) -> None:
        if self._is_server_open and self._task is not None:
            self._network.trace.add(self.hosts[1], f"ends {self._method} for {self.hosts[0]}: {why}")
            self._task.cancel()
            self._post(True, lambda: self._network.loop.soon(self.client, self._client_gives_up, why))

    def _tell_server(self) -> None:
        if self.server is not None:
            self._network.loop.soon(self.server, self._server_gives_up, "the caller has gone")

    def _push(self, message: Any) -> None:
        self._post(True, lambda: self._network.loop.soon(self.client, self._receive, message))

    def _receive(self, message: Any) -> None:
        if self._is_client_open:
            if message is _END:
                self._close_client(_END)
            else:
                self._inbox.append(message)
                self._news.set()

    def _close_client(self, last: Any) -> None:
        if self._is_client_open:
            self._is_client_open = False
            self._inbox.append(last)
            self._news.set()
            self._forget()

    def _close_server(self) -> None:
        self._is_server_open = False
        self._forget()

    def _forget(self) -> None:
        if not self.is_open and self.server is not None:
            self._network.disconnect(self._number)

    def _is_cut(self, to_client: bool) -> bool:
        client, server = self.hosts
        return self._network.is_cut(server, client) if to_client else self._network.is_cut(client, server)

    def _post(self, to_client: bool, deliver: Callable[[], None]) -> None:
        """In order, and late if the cable is cut."""
        loop = self._network.loop
        arrival_s = max(self._last_arrival_s[to_client], loop.now_s + self._network.latency_s())
        self._last_arrival_s[to_client] = arrival_s
        loop.at(arrival_s, None, self._arrive, to_client, deliver)

    def _arrive(self, to_client: bool, deliver: Callable[[], None]) -> None:
        if self._stalled[to_client] or self._is_cut(to_client):
            self._stalled[to_client].append(deliver)
        else:
            deliver()
