"""Which link, which runs, which configuration."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.kv_transfer.plan import LinkChoice, Message, Reach, choose_link, copy_runs, plan_messages
from pdserve.proto.errors import TransferFailed

HOST = frozenset({"shm", "gloo"})
DEVICE = frozenset({"cuda_ipc", "nccl"})
PREFERENCE = ["shm", "cuda_ipc", "nccl", "gloo"]


def test_the_first_kind_that_fits_both_is_chosen() -> None:
    here, there = Reach("host-a", HOST), Reach("host-b", HOST)
    assert choose_link(["shm", "gloo"], here, Reach("host-a", HOST)) == LinkChoice("shm", "")
    assert choose_link(["gloo", "shm"], here, Reach("host-a", HOST)) == LinkChoice("gloo", "")
    assert choose_link(["shm", "gloo"], here, there) == LinkChoice("gloo", "shm: not on one host")
    only_gloo = Reach("host-a", frozenset({"gloo"}))
    assert choose_link(["shm", "gloo"], here, only_gloo) == LinkChoice("gloo", "shm: not open there")
    assert choose_link(["shm", "gloo"], only_gloo, here) == LinkChoice("gloo", "shm: not open here")


def test_links_between_devices_need_both_pools_on_devices() -> None:
    assert choose_link(PREFERENCE, Reach("a", DEVICE), Reach("a", DEVICE)) == LinkChoice("cuda_ipc", "")
    assert choose_link(PREFERENCE, Reach("a", DEVICE), Reach("b", DEVICE)) == LinkChoice(
        "nccl", "cuda_ipc: not on one host"
    )
    with pytest.raises(TransferFailed, match=r"shm: KV is in cuda memory here; cuda_ipc: KV is in cpu memory there"):
        choose_link(PREFERENCE, Reach("a", DEVICE), Reach("a", HOST))


def test_kinds_for_memory_that_neither_worker_has_are_no_reason() -> None:
    here, there = Reach("host-a", HOST), Reach("host-b", HOST)
    assert choose_link(PREFERENCE, here, there) == LinkChoice("gloo", "shm: not on one host")


def test_two_workers_without_a_common_link_learn_why() -> None:
    with pytest.raises(TransferFailed, match=r"shm: not on one host; gloo: not open there"):
        choose_link(["shm", "gloo"], Reach("a", HOST), Reach("b", frozenset({"shm"})))
    with pytest.raises(TransferFailed, match=r"gloo: not open here"):
        choose_link(["gloo"], Reach("a", frozenset()), Reach("b", HOST))


@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(0, 12))
def test_runs_copy_each_pair_once_in_order(sources: list[int], targets: list[int], num_blocks: int) -> None:
    pairs = list(zip(sources, targets, strict=True))[:num_blocks]
    runs = copy_runs(pairs)
    assert [(run.source + i, run.target + i) for run in runs for i in range(run.num_blocks)] == pairs


def test_adjacent_blocks_travel_in_one_run() -> None:
    assert len(copy_runs(zip(range(5, 9), range(2, 6), strict=True))) == 1
    assert len(copy_runs([(0, 0), (1, 1), (2, 5), (3, 6)])) == 2
    assert len(copy_runs([(1, 1), (0, 0)])) == 2


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(1, 60), st.integers(1, 60))
def test_messages_carry_every_block_once_in_order_and_within_their_size(
    source_ids: list[int], num_blocks: int, message_bytes: int, min_piece_bytes: int
) -> None:
    block_bytes = 7
    messages = plan_messages(source_ids[:num_blocks], block_bytes, message_bytes, min_piece_bytes)
    assert [block for message in messages for block in range(num_blocks)[message.blocks]] == list(range(num_blocks))
    for message in messages:
        carried = source_ids[:num_blocks][message.blocks]
        assert len(carried) == sum(message.pieces)
        assert len(carried) == 1 or len(carried) * block_bytes <= message_bytes
        assert len(message.pieces) == 1 or len(carried) * block_bytes >= len(message.pieces) * min_piece_bytes


def test_large_blocks_travel_as_they_lie_and_small_ones_together() -> None:
    assert plan_messages([4, 5, 9, 1, 2, 3], 10, 40, 10) == [Message(0, (2, 1, 1)), Message(4, (2,))]
    assert plan_messages([4, 5, 9, 1, 2, 3], 10, 40, 15) == [Message(0, (4,)), Message(4, (2,))]
    assert plan_messages([4, 5], 100, 40, 10) == [Message(0, (1,)), Message(1, (1,))]


@pytest.mark.parametrize(
    "section",
    [
        {"lease_s": 5.0, "renew_s": 5.0},
        {"links": []},
        {"links": ["shm", "shm"]},
        {"links": ["carrier-pigeon"]},
        {"transfer_timeout_s": 0.0},
        {"max_links": 0},
        {"leas_s": 1.0},
    ],
)
def test_a_section_that_cannot_work_is_refused(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KVTransferConfig.model_validate(section)


def test_the_default_section_is_valid_and_frozen() -> None:
    config = KVTransferConfig()
    with pytest.raises(ValidationError):
        config.lease_s = 1.0
