"""One hand-off between two real workers: parts, held prefixes, repeated offers and pulls, other block sizes and dtypes.

A prefill and a decode worker in this process (`worker_pair`): real engines, real gRPC, real links.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import random_prompt, reference_generate
from worker_pair import Routerless, abort, drained, make_request, start, worker, worker_pair

from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.reservation import FetchPart
from pdserve.proto.errors import CorruptKV, LayoutMismatch, WorkerLost
from pdserve.proto.types import FinishReason, HandoffId, KVPart, KVTicket, Role, WorkerRef

FamilyDir = Callable[..., Path]
LINKS = [["shm"], ["gloo"]]


def all_tokens(prefill: Routerless, decode: Routerless, id: HandoffId) -> tuple[int, ...]:
    """Of a finished request, in order."""
    tokens = prefill.tokens(id) | decode.tokens(id)
    return tuple(tokens[index] for index in range(len(tokens)))


def fetched_parts(monkeypatch: pytest.MonkeyPatch, decode: Routerless) -> list[FetchPart]:
    """Every part that the decode worker goes for, as it goes for it."""
    fetched: list[FetchPart] = []
    role = decode.worker.requests.require_decode()
    fetch_part = role._fetch

    def noted(fetch: FetchPart) -> None:
        fetched.append(fetch)
        fetch_part(fetch)

    monkeypatch.setattr(role, "_fetch", noted)
    return fetched


async def test_kv_leaves_chunk_by_chunk_while_later_chunks_are_computed(
    family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):
        fetched = fetched_parts(monkeypatch, decode)
        id = await start(prefill, decode, make_request("long", random_prompt(300)))
        await decode.ended(id)
        assert [fetch.part.index for fetch in fetched] == [0, 1, 2, 3, 4]
        assert [len(fetch.part.block_ids) for fetch in fetched] == [4, 4, 4, 4, 3]
        assert [fetch.part.is_last for fetch in fetched] == [False, False, False, False, True]
        await drained(prefill, decode)


async def test_a_prefix_that_the_decode_worker_holds_is_not_sent_again(
    family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second turn of a conversation: its first turn's KV is there, prompt and answer."""
    model = family_dir("llama")
    async with worker_pair(model) as (prefill, decode):
        first = random_prompt(90)
        id = await start(prefill, decode, make_request("turn-1", first))
        await decode.ended(id)
        second = (*first, *all_tokens(prefill, decode, id), *random_prompt(30, 1))
        fetched = fetched_parts(monkeypatch, decode)
        id = await start(prefill, decode, make_request("turn-2", second))
        await decode.ended(id)
        # 90 + 23 computed tokens are 7 full blocks of 16; the rest of 144 is fetched.
        assert sum(len(fetch.part.block_ids) - fetch.first for fetch in fetched) == 2
        assert all_tokens(prefill, decode, id) == reference_generate(model, second, 24).token_ids
        await drained(prefill, decode)


async def test_a_part_that_arrives_wrong_once_is_fetched_again(
    family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = family_dir("llama"), random_prompt(40)
    async with worker_pair(model) as (prefill, decode):
        links = decode.worker._links
        receive = links.receive
        fetches = []

        async def flaky(fetch: FetchPart) -> str:
            fetches.append(fetch)
            if len(fetches) == 1:
                raise CorruptKV("a bit flipped on the way")
            return await receive(fetch)

        monkeypatch.setattr(links, "receive", flaky)
        monkeypatch.setattr(links, "receive_now", lambda fetch: None)
        id = await start(prefill, decode, make_request("again", prompt))
        await decode.ended(id)
        assert all_tokens(prefill, decode, id) == reference_generate(model, prompt, 24).token_ids
        assert len(fetches) == 2
        await drained(prefill, decode)


async def test_an_offer_without_an_answer_is_repeated_and_changes_nothing_twice(
    family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is lost, not the offer: the decode worker hears of the same part twice."""
    model, prompt = family_dir("llama"), random_prompt(100)
    config = KVTransferConfig(lease_s=6.0, renew_s=1.0, offer_retry_s=0.05)
    async with worker_pair(model, config) as (prefill, decode):
        peers = prefill.worker._peers
        offer = peers.offer
        offered: list[int] = []

        async def forgetful(target: WorkerRef, ticket: KVTicket, part: KVPart) -> None:
            offered.append(part.index)
            await offer(target, ticket, part)
            if len(offered) % 2:
                raise WorkerLost("no answer")

        monkeypatch.setattr(peers, "offer", forgetful)
        id = await start(prefill, decode, make_request("twice", prompt))
        await decode.ended(id)
        assert all_tokens(prefill, decode, id) == reference_generate(model, prompt, 24).token_ids
        assert offered[:2] == [0, 0]
        await drained(prefill, decode)


async def test_a_refused_offer_ends_the_request_aloud(family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch) -> None:
    async with worker_pair(family_dir("llama")) as (prefill, decode):

        def refuse(*arguments: Any) -> None:
            raise LayoutMismatch("KV layouts differ (num_layers: 2 != 3)")

        monkeypatch.setattr(decode.worker.requests.decode_role, "offer", refuse)
        id = await start(prefill, decode, make_request("refused", random_prompt(100)))
        ending = await prefill.ended(id)
        assert ending.error is not None
        assert ending.error.kind == "LayoutMismatch"
        assert "num_layers" in ending.error.message
        await abort(decode, id=id)  # what the router does
        await drained(prefill, decode)


@pytest.mark.parametrize("links", LINKS, ids="-".join)
async def test_kv_travels_in_int8_where_configured(
    links: Any, family_dir: FamilyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KVTransferConfig(links=links, wire_dtype="int8", lease_s=6.0, renew_s=1.0)
    async with worker_pair(family_dir("llama"), config) as (prefill, decode):
        fetched = fetched_parts(monkeypatch, decode)
        id = await start(prefill, decode, make_request("narrow", random_prompt(100)))
        assert (await decode.ended(id)).finish_reason is FinishReason.LENGTH
        assert len(all_tokens(prefill, decode, id)) == 24
        layouts = {fetch.ticket.layout for fetch in fetched}
        assert {layout.dtype for layout in layouts} == {"int8"}
        ratio = layouts.pop().block_bytes / decode.worker.requests.info.layout.block_bytes
        assert ratio < 0.4, "tiny heads pay most for their scales"
        await drained(prefill, decode)


@pytest.mark.parametrize("keys", [("aa" * 16, ""), ("", "aa" * 16), ("aa" * 16, "bb" * 16)])
async def test_workers_with_different_digest_keys_exchange_nothing(
    keys: tuple[str, str], family_dir: FamilyDir
) -> None:
    model = family_dir("llama")
    ours, theirs = (KVTransferConfig(digest_key=key, lease_s=6.0, renew_s=1.0) for key in keys)
    async with worker(Role.PREFILL, model, ours) as prefill, worker(Role.DECODE, model, theirs) as decode:
        id = await start(prefill, decode, make_request("keyed", random_prompt(40)))
        ending = await decode.ended(id)
        assert ending.error is not None
        assert ending.error.kind in ("LayoutMismatch", "CorruptKV")
        assert not decode.tokens(id)
        await drained(prefill, decode)
