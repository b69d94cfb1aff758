"""A running cluster is watched for what it does meanwhile, and not for what it did before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pdserve.cluster import profiling_run
from pdserve.cluster.planner.step_shape import StepShape
from pdserve.cluster.profiling_run import watch_steps
from pdserve.cluster.state import ClusterState
from pdserve.cluster.step_records import StepRecord
from pdserve.proto.errors import Unavailable
from pdserve.proto.types import KVLayout, Role, WorkerInfo, WorkerRef

CLUSTER = ClusterState("prod", "", {}, "", "model", 0, 0.0)
LAYOUT = KVLayout("model", "float32", 1, 1, 8, block_size=16)
INFOS = tuple(
    WorkerInfo(WorkerRef(f"mixed-{number}", 0, f"here:{number}"), Role.MIXED, LAYOUT, 100, 512, 1000, "host")
    for number in range(2)
)


def record(number: int) -> StepRecord:
    return StepRecord(number, float(number), 0.5, 0.5, StepShape(0, 0.0, 1 + number, 100), False)


class FakeReader:
    """Remembers steps from before; after that each call tells of the next."""

    def __init__(self, before: Sequence[StepRecord], meanwhile: Sequence[StepRecord]) -> None:
        self._answers = [tuple(before), tuple(meanwhile)]
        self.is_closed = False

    async def read(self) -> list[tuple[StepRecord, ...]]:
        return [self._answers.pop(0) if self._answers else (), ()]

    async def close(self) -> None:
        self.is_closed = True


def watch_with(monkeypatch: pytest.MonkeyPatch, reader: FakeReader) -> None:
    monkeypatch.setattr(profiling_run, "StepReader", lambda addresses: reader)
    monkeypatch.setattr(profiling_run, "workers_of", lambda cluster: INFOS)


async def test_steps_from_before_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FakeReader([record(0), record(1)], [record(2)])
    watch_with(monkeypatch, reader)
    infos, timings = await watch_steps(CLUSTER, 0.01)
    assert infos == INFOS
    assert [one.shape.num_decodes for one in timings] == [3]
    assert reader.is_closed


async def test_a_cluster_that_served_nothing_meanwhile_is_said_to_need_load(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_with(monkeypatch, FakeReader([record(0), record(1)], []))
    with pytest.raises(Unavailable, match="prod: it served nothing meanwhile; send it load"):
        await watch_steps(CLUSTER, 0.01)
