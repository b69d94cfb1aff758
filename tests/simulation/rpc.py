"""gRPC over the simulated network: channels for the callers, servers for the called, with gRPC's own errors.

A call that is lost, or whose answer is, ends at its deadline at the caller; what it did at the other end stays done. A
call to nobody fails at once, or, if the host has vanished without a word, at its deadline. Messages are passed as they
are: nobody changes one that was sent. Knows nothing of the services beyond their methods' names.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from simulation.loop import Process, current_process
from simulation.network import Network
from simulation.streams import Stream

Fail = Callable[[grpc.aio.AioRpcError], None]


class Aborted(Exception):
    """What a handler raises through its context to answer with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Sequence[tuple[str, str]]) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.metadata = metadata


class CallContext:
    """The part of a servicer's context that this project uses."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str]] = ()
    ) -> None:
        raise Aborted(code, details, trailing_metadata)


def rpc_error(code: grpc.StatusCode, details: str, metadata: Sequence[tuple[str, str]] = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=details)


def unavailable(why: str) -> grpc.aio.AioRpcError:
    return rpc_error(grpc.StatusCode.UNAVAILABLE, why)


def describe(method: str, request: Any) -> str:
    """A call in a few words."""
    if method == "Ask":
        kind = request.WhichOneof("request")
        method, request = kind.capitalize(), getattr(request, kind)
    id = getattr(request, "id", None)
    if id is None:
        inner = getattr(request, "request", None) or getattr(request, "ticket", None)
        id = None if inner is None else inner.id
    words = [method]
    if id is not None:
        words.append(f"{id.request_id}#{id.attempt}")
    match method:
        case "Offer":
            words.append(f"part {request.part.index}")
        case "Redeem":
            words.append(f"part {request.part} over {request.link} epoch {request.link_epoch}")
        case "Renew":
            words.append(" ".join(f"{one.request_id}#{one.attempt}" for one in request.ids))
        case "Release":
            words.append(f"({request.outcome})")
        case "Abort":
            words.append(f"({request.reason})")
    return " ".join(words)


@dataclass(slots=True)
class Server:
    """The services of one process at one address. `pending` fail the calls that it has not answered."""

    process: Process
    services: tuple[Any, ...]
    pending: dict[int, Fail] = field(default_factory=dict)

    def handler(self, method: str) -> Callable[[Any, Any], Any]:
        service = next(one for one in self.services if hasattr(one, method))
        handler: Callable[[Any, Any], Any] = getattr(service, method)
        return handler

    async def answer(self, method: str, request: Any) -> Any:
        """Of a call, or to one request on a stream of them."""
        if method != "Ask":
            return await self.handler(method)(request, CallContext())

        async def requests() -> AsyncIterator[Any]:
            yield request

        (reply,) = [reply async for reply in self.handler(method)(requests(), CallContext())]
        return reply


class Rpc:
    """Owner of the servers. `open_channel` is what production code is given."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._servers: dict[str, Server] = {}
        self._silent: set[str] = set()
        self._hosts: dict[str, str] = {}
        self._numbers = itertools.count()

    def listen(self, address: str, process: Process, services: tuple[Any, ...]) -> None:
        self._servers[address] = Server(process, services)
        self._hosts[address] = process.name
        self._silent.discard(address)

    def close(self, address: str, silent: bool) -> None:
        """The process at this address is gone; its callers are told, or hear nothing more."""
        server = self._servers.pop(address, None)
        if silent:
            self._silent.add(address)
        elif server is not None:
            for fail in server.pending.values():
                fail(unavailable("connection reset"))

    def open_channel(self, address: str) -> grpc.aio.Channel:
        return SimChannel(self, address)

    def host(self, address: str) -> str:
        return self._hosts.get(address, address)

    def call(self, address: str, method: str, request: Any, reply: Callable[[Any], None]) -> None:
        """`reply(answer)` runs at the caller, or never: a message, or an error."""
        caller = current_process()
        assert caller is not None
        what, target, number = describe(method, request), self.host(address), next(self._numbers)
        trace, loop = self.network.trace, self.network.loop
        trace.add(caller.name, f"-> {target}: {what}")

        def answer(value: Any) -> None:
            self.network.send(target, caller.name, f"the answer to {what}", lambda: loop.soon(caller, reply, value))

        def arrive() -> None:
            server = self._servers.get(address)
            if server is None:
                if address not in self._silent:
                    answer(unavailable("nobody listens"))
                return
            server.pending[number] = answer
            loop.soon(server.process, self._serve, server, number, method, what, request, answer)

        self.network.send(caller.name, target, what, arrive)

    def stream(self, address: str, method: str, request: Any) -> Stream:
        """A call whose answers come one by one."""
        caller = current_process()
        assert caller is not None
        stream = Stream(self.network, caller, self.host(address), method)

        def arrive() -> None:
            server = self._servers.get(address)
            if server is not None:
                stream.accepted(server.process)
                self.network.loop.soon(server.process, stream.serve, server.handler(method)(request, CallContext()))
            elif address not in self._silent:
                stream.refused(unavailable("nobody listens"))

        stream.open(arrive)
        return stream

    def _serve(
        self, server: Server, number: int, method: str, what: str, request: Any, answer: Callable[[Any], None]
    ) -> None:
        """In the called process."""
        trace = self.network.trace

        async def run() -> None:
            try:
                value = await server.answer(method, request)
                trace.add(server.process.name, f"did {what}")
            except Aborted as refusal:
                value = rpc_error(refusal.code, refusal.details, refusal.metadata)
                trace.add(server.process.name, f"refused {what}: {refusal.details}")
                trace.count("calls refused")
            except Exception as error:
                value = rpc_error(grpc.StatusCode.UNKNOWN, repr(error))
                trace.violate(server.process.name, f"{what} raised {error!r}")
            server.pending.pop(number, None)
            answer(value)

        self.network.loop.create_task(run(), name=f"serve {method}")


class Conversation:
    """The caller's end of a call with a stream of requests and one of replies.

    Harsher than gRPC's: every request and every reply may be lost, doubled or overtaken for itself.
    """

    def __init__(self, rpc: Rpc, address: str, method: str) -> None:
        self._rpc = rpc
        self._address = address
        self._method = method
        self._inbox: deque[Any] = deque()
        self._news = asyncio.Event()
        self.is_open = True

    async def write(self, request: Any) -> None:
        if not self.is_open:
            raise asyncio.InvalidStateError("RPC already finished.")
        sent = type(request)()
        sent.CopyFrom(request)
        self._rpc.call(self._address, self._method, sent, self._arrived)

    def cancel(self) -> bool:
        was_open, self.is_open = self.is_open, False
        self._news.set()
        return was_open

    def _arrived(self, reply: Any) -> None:
        self._inbox.append(reply)
        self._news.set()

    def __aiter__(self) -> Conversation:
        return self

    async def __anext__(self) -> Any:
        while self.is_open and not self._inbox:
            self._news.clear()
            await self._news.wait()
        if not self.is_open:
            raise asyncio.CancelledError
        reply = self._inbox.popleft()
        if isinstance(reply, Exception):
            self.is_open = False
            raise reply
        return reply


class SimChannel(grpc.aio.Channel):
    """A caller's end. Closing it cancels its calls, as gRPC does."""

    def __init__(self, rpc: Rpc, address: str) -> None:
        self._rpc = rpc
        self._address = address
        self._futures: dict[int, Any] = {}
        self._streams: list[Stream] = []
        self._conversations: list[Conversation] = []
        self._is_closed = False
        self._numbers = itertools.count()

    def unary_unary(self, method: str, *_: Any, **__: Any) -> Any:
        name = method.rpartition("/")[2]
        return lambda request, timeout=None, **_: self._call(name, request, timeout)

    def unary_stream(self, method: str, *_: Any, **__: Any) -> Any:
        name = method.rpartition("/")[2]
        return lambda request, **_: self._stream(name, request)

    def stream_stream(self, method: str, *_: Any, **__: Any) -> Any:
        name = method.rpartition("/")[2]
        return lambda **_: self._conversation(name)

    def stream_unary(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("this project has no such calls")

    def _call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        if self._is_closed:
            raise grpc.aio.UsageError("Channel is closed.")
        loop = self._rpc.network.loop
        future, number = loop.create_future(), next(self._numbers)
        self._futures[number] = future

        def end(value: Any) -> None:
            self._futures.pop(number, None)
            if future.done():
                return
            if isinstance(value, Exception):
                future.set_exception(value)
            else:
                future.set_result(value)

        if timeout_s is not None:
            timer = loop.call_later(timeout_s, self._expire, method, end)
            future.add_done_callback(lambda _: timer.cancel())
        self._rpc.call(self._address, method, request, end)
        return future

    def _expire(self, method: str, end: Callable[[Any], None]) -> None:
        self._rpc.network.trace.count("calls without an answer")
        end(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, f"{method}: Deadline Exceeded"))

    def _stream(self, method: str, request: Any) -> Stream:
        if self._is_closed:
            raise grpc.aio.UsageError("Channel is closed.")
        self._streams = [stream for stream in self._streams if stream.is_open]
        self._streams.append(self._rpc.stream(self._address, method, request))
        return self._streams[-1]

    def _conversation(self, method: str) -> Conversation:
        if self._is_closed:
            raise grpc.aio.UsageError("Channel is closed.")
        conversation = Conversation(self._rpc, self._address, method)
        self._conversations = [one for one in self._conversations if one.is_open]
        self._conversations.append(conversation)
        return conversation

    async def close(self, grace: float | None = None) -> None:
        self._is_closed = True
        for conversation in self._conversations:
            conversation.cancel()
        self._conversations.clear()
        futures, self._futures = self._futures, {}
        for future in futures.values():
            future.cancel()
        for stream in self._streams:
            stream.cancel()
        self._streams.clear()

    async def __aenter__(self) -> SimChannel:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return grpc.ChannelConnectivity.SHUTDOWN if self._is_closed else grpc.ChannelConnectivity.READY

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        raise NotImplementedError("this project does not ask")

    async def channel_ready(self) -> None:
        raise NotImplementedError("this project does not ask")
