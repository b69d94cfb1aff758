"""Which link each pair of workers gets, and what people are told of it."""

from __future__ import annotations

from dataclasses import replace

from pdserve.cluster.pair_links import PairLink, pair_links
from pdserve.proto.types import KVLayout, Role, WorkerInfo, WorkerRef

LAYOUT = KVLayout("model", "float32", num_layers=2, num_kv_heads=1, head_dim=8, block_size=16)
PREFERENCE = ("shm", "gloo")


def info(name: str, role: Role, host_id: str = "here", layout: KVLayout = LAYOUT) -> WorkerInfo:
    return WorkerInfo(
        worker=WorkerRef(name, 1, "127.0.0.1:1"),
        role=role,
        layout=layout,
        num_blocks=8,
        max_model_len=128,
        vocab_size=10,
        host_id=host_id,
        link_address={"shm": "memory", "gloo": "127.0.0.1"},
    )


def test_every_prefill_and_decode_worker_is_a_pair_and_mixed_workers_need_none() -> None:
    fleet = [info("p0", Role.PREFILL), info("d0", Role.DECODE), info("d1", Role.DECODE), info("m0", Role.MIXED)]
    assert pair_links(PREFERENCE, fleet) == [PairLink("p0", "d0", "shm", ""), PairLink("p0", "d1", "shm", "")]


def test_a_slow_path_says_why_it_is_one() -> None:
    fleet = [info("p0", Role.PREFILL, "here"), info("d0", Role.DECODE, "there")]
    (link,) = pair_links(PREFERENCE, fleet)
    assert link.kind == "gloo"
    assert "shm" in link.reason
    assert "host" in link.reason


def test_workers_that_cannot_exchange_kv_have_no_link_and_the_difference_is_named() -> None:
    other = replace(LAYOUT, dtype="bfloat16")
    (link,) = pair_links(PREFERENCE, [info("p0", Role.PREFILL, layout=other), info("d0", Role.DECODE)])
    assert link.kind == ""
    assert "dtype: float32 != bfloat16" in link.reason


def test_workers_without_a_common_kind_have_no_link() -> None:
    (link,) = pair_links(("shm",), [info("p0", Role.PREFILL, "here"), info("d0", Role.DECODE, "there")])
    assert link.kind == ""
    assert "shm" in link.reason


def test_another_block_size_or_a_quantised_side_is_no_obstacle() -> None:
    for other in (replace(LAYOUT, block_size=32), replace(LAYOUT, dtype="int8")):
        (link,) = pair_links(PREFERENCE, [info("p0", Role.PREFILL, layout=other), info("d0", Role.DECODE)])
        assert link.kind == "shm"
