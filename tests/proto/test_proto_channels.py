"""Connections inside the cluster with no traffic: kept while the other end is there, ended when its host vanishes.

The settings are those of production with every duration cut to a fraction.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from pdserve.proto.channels import CHANNEL_OPTIONS, KEEPALIVE_MS, SERVER_OPTIONS, Options

FRACTION = 5
METHOD = "/test.Service/Hold"
KEEPALIVE_S = KEEPALIVE_MS / 1e3 / FRACTION
LONG_S = 60.0


def hastened(options: Options) -> list[tuple[str, int]]:
    return [(name, value // FRACTION if name.endswith("_ms") else value) for name, value in options]


@asynccontextmanager
async def holding_server(options: Options) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Its port, and an event that tells when a call has ended; a call says one word and then nothing."""
    ended = asyncio.Event()

    async def hold(request: bytes, context: Any) -> None:
        try:
            await context.write(b"here")
            await asyncio.Event().wait()
        finally:
            ended.set()

    server = grpc.aio.server(options=options)
    handler: Any = grpc.unary_stream_rpc_method_handler(hold)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Hold": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port, ended
    finally:
        await server.stop(None)


class Wire:
    """Carries bytes to `port` until it is `cut`: then nothing arrives any more, and nothing is closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._intact = asyncio.Event()
        self._intact.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._intact.clear()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, forth]
        self._tasks += [asyncio.create_task(self._carry(reader, forth)), asyncio.create_task(self._carry(back, writer))]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._intact.wait()
            writer.write(data)


@asynccontextmanager
async def wire_to(port: int) -> AsyncIterator[Wire]:
    wire = Wire(port)
    await wire.open()
    try:
        yield wire
    finally:
        await wire.close()


async def listen(channel: grpc.aio.Channel) -> Any:
    """A call that has said its word."""
    method: Any = channel.unary_stream(METHOD)
    call = method(b"")
    assert await call.read() == b"here"
    return call


async def breaking_of(call: Any) -> grpc.aio.AioRpcError:
    """How a call that says nothing more ends."""
    try:
        await asyncio.wait_for(call.read(), LONG_S)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the server spoke")


async def test_a_stream_without_traffic_outlives_one_to_a_server_with_other_settings() -> None:
    """A server that takes its settings from elsewhere resents the pings, and says so by hanging up."""
    ours, theirs = holding_server(hastened(SERVER_OPTIONS)), holding_server([])
    async with ours as (our_port, _), theirs as (their_port, _):
        our_channel = grpc.aio.insecure_channel(f"127.0.0.1:{our_port}", options=hastened(CHANNEL_OPTIONS))
        their_channel = grpc.aio.insecure_channel(f"127.0.0.1:{their_port}", options=hastened(CHANNEL_OPTIONS))
        async with our_channel, their_channel:
            kept = asyncio.create_task(breaking_of(await listen(our_channel)))
            error = await breaking_of(await listen(their_channel))
            assert "pings" in (error.details() or "").lower()
            broken, _ = await asyncio.wait([kept], timeout=2 * KEEPALIVE_S)
            assert not broken
            kept.cancel()


async def test_a_client_notices_that_its_servers_host_has_vanished() -> None:
    deaf = [option for option in SERVER_OPTIONS if "keepalive" not in option[0]]
    async with (
        holding_server(deaf) as (port, _),
        wire_to(port) as wire,
        grpc.aio.insecure_channel(wire.address, options=hastened(CHANNEL_OPTIONS)) as channel,
    ):
        call = await listen(channel)
        wire.cut()
        assert (await breaking_of(call)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_notices_that_its_clients_host_has_vanished() -> None:
    async with (
        holding_server(hastened(SERVER_OPTIONS)) as (port, ended),
        wire_to(port) as wire,
        grpc.aio.insecure_channel(wire.address) as channel,
    ):
        call = await listen(channel)
        wire.cut()
        await asyncio.wait_for(ended.wait(), LONG_S)
        call.cancel()
