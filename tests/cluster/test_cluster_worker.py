"""Two real workers and their hand-off, one fault at a time, at the exact moment that matters.

Runs in one process without Ray, so that a test can hold a transfer, spoil a block or cut a stream.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from families import random_prompt, reference_generate
from worker_pair import WAIT_S, Routerless, abort, drained, make_request, start, worker, worker_pair

from pdserve.cluster import worker as worker_module
from pdserve.cluster import worker_requests
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.lease import SendOffer
from pdserve.proto import wire
from pdserve.proto import worker_pb2 as pb
from pdserve.proto.errors import StaleReference
from pdserve.proto.types import FinishReason, HandoffId, Role

FamilyDir = Callable[..., Path]
# The controller's address leads nowhere in these tests, and that is part of what they show.
LINKS = [["shm"], ["gloo"]]


def hold_transfers(monkeypatch: pytest.MonkeyPatch, decode: Routerless) -> tuple[asyncio.Event, asyncio.Event]:
    """Make the decode worker's next transfers wait. (a transfer has begun, let them go on)"""
    begun, go_on = asyncio.Event(), asyncio.Event()
    links = decode.worker._links
    receive = links.receive

    async def held(*arguments: Any) -> str:
        begun.set()
        await go_on.wait()
        return await receive(*arguments)

    monkeypatch.setattr(links, "receive", held)
    monkeypatch.setattr(links, "receive_now", lambda fetch: None)
    return begun, go_on


def tasks_named(worker: Routerless, name: str) -> list[asyncio.Task[None]]:
    """The worker's tasks that run this method."""
    return [task for task in worker.worker._tasks if name in repr(task.get_coro())]


@pytest.mark.parametrize("links", LINKS, ids="-".join)
async def test_tokens_are_those_of_generate_and_every_block_comes_back(links: Any, family_dir: FamilyDir) -> None:
    model = family_dir("llama")
    config = KVTransferConfig(links=links, lease_s=6.0, renew_s=1.0)
    async with worker_pair(model, config) as (prefill, decode):
        prompts = [random_prompt(length, length) for length in (1, 15, 16, 17, 70, 200)]  # a chunk is 64
        requests = [make_request(f"r{number}", prompt) for number, prompt in enumerate(prompts)]
        ids = [await start(prefill, decode, request) for request in requests]
        for prompt, id in zip(prompts, ids, strict=True):
            ending = await decode.ended(id)
            assert ending.finish_reason is FinishReason.LENGTH
            assert prefill.tokens(id).keys() == {0}
            tokens = prefill.tokens(id) | decode.tokens(id)
            assert tuple(tokens[index] for index in range(24)) == reference_generate(model, prompt, 24).token_ids
            assert ending.phases is not None
            assert ending.phases.transferred_tokens == len(prompt)
            assert ending.phases.transfer_s > 0
        await drained(prefill, decode)


async def test_one_token_answers_are_finished_by_the_prefill_worker(family_dir: FamilyDir) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        id = await start(prefill, decode, make_request("one", random_prompt(20), max_tokens=1))
        assert (await prefill.ended(id)).finish_reason is FinishReason.LENGTH
        await abort(decode, id=id)  # what the router does
        await drained(prefill, decode)
        assert decode.worker.requests.load_now().reserved_blocks == 0


async def test_cancelling_while_kv_is_in_transfer_quarantines_then_frees(
    family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        begun, go_on = hold_transfers(monkeypatch, decode)
        id = await start(prefill, decode, make_request("held", random_prompt(40)))
        await asyncio.wait_for(begun.wait(), WAIT_S)
        await abort(prefill, decode, id=id)
        await decode.wait_for(lambda: decode.worker.requests.load_now().quarantined_blocks == 3, "blocks in quarantine")
        assert decode.worker.requests.load_now().free_blocks == decode.worker.requests.load_now().total_blocks - 3
        go_on.set()  # the wire falls idle
        await drained(prefill, decode)
        assert not decode.tokens(id), "a token came from a cancelled request"


async def test_cancelling_while_queued_and_while_decoding_frees_everything(family_dir: FamilyDir) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        ids = [
            await start(prefill, decode, make_request(f"r{number}", random_prompt(60, number), 200))
            for number in range(12)
        ]
        await decode.wait_for(lambda: any(decode.tokens(id) for id in ids), "a token from the decode worker")
        for id in ids:
            await abort(prefill, decode, id=id)
        await drained(prefill, decode)


async def test_spoiled_kv_is_never_decoded_from(family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that changes after it was hashed: the request ends as corrupt, without one token from it."""
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        begun, go_on = hold_transfers(monkeypatch, decode)
        id = await start(prefill, decode, make_request("spoiled", random_prompt(40)))
        await asyncio.wait_for(begun.wait(), WAIT_S)
        prefill.worker._blocks[0, 5] ^= 1  # the pool is fresh: its first blocks are the lease's
        go_on.set()
        ending = await decode.ended(id)
        assert ending.error is not None
        assert ending.error.kind == "CorruptKV"
        assert not decode.tokens(id)
        await drained(prefill, decode)


async def test_kv_of_an_aborted_request_is_never_offered(
    family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Aborted while its blocks are hashed: they may be another's by then, and the digests of the other's KV."""
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        hashing, go_on = threading.Event(), threading.Event()
        offered: list[HandoffId] = []

        role = prefill.worker.requests.require_prefill()
        prepare = role._prepare

        def held(offer: SendOffer) -> tuple[int, ...]:
            hashing.set()
            assert go_on.wait(WAIT_S)
            return prepare(offer)

        monkeypatch.setattr(role, "_prepare", held)
        monkeypatch.setattr("pdserve.prefill_worker.role.INLINE_BYTES", 0)  # never in the event loop
        decode_role = decode.worker.requests.require_decode()
        monkeypatch.setattr(decode_role, "offer", lambda ticket, part: offered.append(ticket.id))
        id = await start(prefill, decode, make_request("hashed", random_prompt(40)))
        await asyncio.to_thread(hashing.wait, WAIT_S)
        await abort(prefill, id=id)  # the prefill worker loses it first: its router's stream broke, say
        go_on.set()
        await drained(prefill)
        await prefill.wait_for(lambda: not tasks_named(prefill, "_offer"), "the end of the offer")
        monkeypatch.undo()
        other = await start(prefill, decode, make_request("other", random_prompt(40, 1)))
        assert (await decode.ended(other)).finish_reason is FinishReason.LENGTH
        assert offered == []
        await abort(decode, id=id)
        await drained(prefill, decode)


async def test_a_stream_that_replaces_another_ends_what_the_other_was_told(family_dir: FamilyDir) -> None:
    """A router that reconnects has failed its requests already: they must not run on for nobody."""
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        id = await start(prefill, decode, make_request("before", random_prompt(30), 400))
        await decode.wait_for(lambda: decode.tokens(id), "decoding")
        again = Routerless(decode.worker)
        await again.open()
        await drained(prefill, decode)
        await again.close()
        await again.channel.close()


async def test_a_failure_in_a_callback_ends_the_worker_instead_of_vanishing(
    family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):

        def broken(*arguments: Any) -> None:
            raise RuntimeError("cosmic ray")

        monkeypatch.setattr(prefill.worker.requests.prefill_role, "part_computed", broken)
        id = await start(prefill, decode, make_request("doomed", random_prompt(30)))
        ending = await prefill.ended(id)
        assert ending.error is not None
        assert ending.error.kind == "InternalError"
        assert "crashed" in await asyncio.wait_for(prefill.worker.ended(), WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await start(prefill, decode, make_request("next", random_prompt(5)))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_router_that_goes_away_leaves_no_work_behind(family_dir: FamilyDir) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        id = await start(prefill, decode, make_request("orphan", random_prompt(30), 400))
        await decode.wait_for(lambda: decode.tokens(id), "decoding")
        await decode.close()
        await prefill.close()
        await drained(prefill, decode)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await start(prefill, decode, make_request("next", random_prompt(5)))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_an_accept_that_its_abort_overtook_does_not_start(family_dir: FamilyDir) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        request = make_request("late", random_prompt(30))
        await abort(prefill, decode, id=request.id)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await start(prefill, decode, request)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await drained(prefill, decode)


async def test_a_deadline_that_nobody_enforces_is_enforced_here(
    family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_requests, "DEADLINE_GRACE_S", 0.0)  # or a fast machine is done before anybody looks
    monkeypatch.setattr(worker_module, "SWEEP_S", 0.01)
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        id = await start(prefill, decode, make_request("late", random_prompt(30), 480, timeout_s=0.01))
        assert (await decode.ended(id)).error is not None
        await drained(prefill, decode)


async def test_kv_that_nobody_redeems_is_freed_when_its_lease_lapses(family_dir: FamilyDir) -> None:
    """The decode worker dies with the offer in its hands: it neither renews nor releases."""
    config = KVTransferConfig(lease_s=0.5, renew_s=0.2)
    model = family_dir("llama")
    async with worker(Role.PREFILL, model, config) as prefill, worker(Role.DECODE, model, config) as decode:
        role = decode.worker.requests.require_decode()
        role.offer = lambda ticket, part: None  # type: ignore[method-assign]
        id = await start(prefill, decode, make_request("leased", random_prompt(40)))
        await prefill.wait_for(lambda: prefill.tokens(id), "the first token")
        await prefill.wait_for(lambda: any(event.error for event in prefill.events[id]), "the lapse")
        assert prefill.events[id][-1].error.kind == "TransferFailed"  # type: ignore[union-attr]
        await drained(prefill)
        await abort(decode, id=id)


async def test_a_dead_peer_ends_what_waits_for_it(family_dir: FamilyDir) -> None:
    """What the controller's word does, on both sides."""
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        request = make_request("lost", random_prompt(20))
        message, gone = wire.request_to_wire(request), prefill.worker.requests.info.worker
        expect = pb.ExpectRequest(request=message, source=wire.ref_to_wire(gone))
        await decode.stub.Expect(expect, timeout=WAIT_S)
        decode.worker.peer_gone(gone.worker_id, gone.generation)
        ending = await decode.ended(request.id)
        assert ending.error is not None
        assert ending.error.kind == "WorkerLost"
        await drained(prefill, decode)


async def test_a_message_for_another_generation_changes_nothing(family_dir: FamilyDir) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        former = prefill.worker.requests.info.worker._replace(generation=1)
        with pytest.raises(StaleReference):
            await decode.worker._peers.release(former, HandoffId("x", 0, 7), "redeemed")


async def test_a_crashing_engine_ends_every_request_and_the_worker(family_dir: FamilyDir) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        id = await start(prefill, decode, make_request("doomed", random_prompt(30), 400))
        await decode.wait_for(lambda: decode.tokens(id), "decoding")

        def crash(engine: Any) -> None:
            raise RuntimeError("cosmic ray")

        decode.worker._engine_loop.post(crash)
        ending = await decode.ended(id)
        assert ending.error is not None
        assert ending.error.kind == "InternalError"
        assert "cosmic" not in ending.error.message, "details of a bug stay in the log"
        assert "engine crashed" in await decode.worker.ended()
