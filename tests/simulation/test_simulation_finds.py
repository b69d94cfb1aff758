"""The simulation is worth something only if it fails when it should: each test plants one bug and expects it found.

A planted bug takes away one rule that production code keeps. The scenarios are drawn as always, then made harder where
the rule matters, so that few seeds are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from simulation.client import Clients
from simulation.run import run_scenario
from simulation.scenario import Scenario, draw

from pdserve.cluster.live_requests import LiveRequests
from pdserve.cluster.output_hub import OutputHub
from pdserve.cluster.worker_requests import WorkerRequests
from pdserve.decode_worker.role import DecodeRole
from pdserve.kv_transfer import lease, reservation
from pdserve.kv_transfer.digest import Digester
from pdserve.kv_transfer.effects import FreeBlocks, QuarantineBlocks
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.types import HandoffId, SequenceEvent
from pdserve.router.completion import Completion
from pdserve.router.pipeline import Pipeline

MAX_SEEDS = 250


def found(harden: Callable[[Scenario], Scenario], words: str) -> bool:
    """Whether some seed ends with a violation that says `words`; without the planted bug none of them has any."""
    for seed in range(MAX_SEEDS):
        report = run_scenario(harden(draw(seed)))
        if any(words in violation for violation in report.violations):
            return True
    return False


def as_drawn(scenario: Scenario) -> Scenario:
    return scenario


def with_corruption(scenario: Scenario) -> Scenario:
    faults = replace(scenario.wire_faults, flip=0.2)
    return replace(scenario, kinds=scenario.kinds | {"corruption"}, wire_faults=faults)


def with_hanging_wires(scenario: Scenario) -> Scenario:
    """Two-sided ones, with clients that go away meanwhile."""
    faults = replace(scenario.wire_faults, hangs=0.2, hang_s=6.0)
    transfer = scenario.workers[0].transfer.model_copy(update={"links": ["gloo"]})
    return replace(
        scenario,
        kinds=scenario.kinds | {"wire hangs", "cancels"},
        wire_faults=faults,
        workers=tuple(replace(plan, transfer=transfer) for plan in scenario.workers),
        requests=tuple(replace(one, cancel_after_s=0.3) for one in scenario.requests),
    )


def with_late_messages(scenario: Scenario) -> Scenario:
    weather = replace(scenario.weather, straggling=0.3, straggle_s=4.0)
    return replace(scenario, kinds=scenario.kinds | {"stragglers"}, weather=weather)


def with_bad_logits(scenario: Scenario) -> Scenario:
    """Prefills fail now and then, and nothing else does: no other end may cover up for a lost notice."""
    kinds = scenario.kinds - {"short deadlines", "cancels", "slow readers", "crashes", "router crashes", "freezes"}
    requests = tuple(
        replace(one, cancel_after_s=None, read_s=0.0, timeout_s=max(one.timeout_s, 25.0)) for one in scenario.requests
    )
    return replace(scenario, kinds=kinds | {"bad logits"}, bad_logits=0.2, requests=requests, calm_s=20.0)


def drop(kind: type) -> Callable[[tuple[object, ...]], tuple[object, ...]]:
    return lambda effects: tuple(effect for effect in effects if not isinstance(effect, kind))


def free_at_once(effects: tuple[object, ...]) -> tuple[object, ...]:
    """Blocks in quarantine are freed now, and not once more when the wire is idle."""
    changed: list[object] = []
    for effect in effects:
        if isinstance(effect, QuarantineBlocks):
            changed.append(FreeBlocks(effect.id, effect.block_ids, from_quarantine=False, reason=effect.reason))
        elif not (isinstance(effect, FreeBlocks) and effect.from_quarantine):
            changed.append(effect)
    return tuple(changed)


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, Callable[[Any], Any]], None]:
    """Change what a table decides."""

    def plant(table: type, change: Callable[[Any], Any]) -> None:
        decide: Any = table._step  # type: ignore[attr-defined]
        monkeypatch.setattr(table, "_step", lambda self, event, now_s: change(decide(self, event, now_s)))

    return plant


Tamper = Callable[[type, Callable[[Any], Any]], None]


def test_digests_that_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Digester, "checker", lambda self, *_: lambda first, pool, block_ids: None)
    assert found(with_corruption, "computed from wrong KV")


def test_blocks_that_are_freed_while_the_wire_may_write(tamper: Tamper) -> None:
    tamper(ReservationTable, free_at_once)
    assert found(with_hanging_wires, "the wire writes into block")


def test_blocks_that_are_freed_while_the_wire_reads(tamper: Tamper) -> None:
    tamper(LeaseTable, free_at_once)
    assert found(with_hanging_wires, "the wire reads block")


def test_a_prefill_that_goes_on_without_its_blocks(tamper: Tamper) -> None:
    tamper(LeaseTable, drop(lease.StopPrefill))
    assert found(with_corruption, "reads block")


def test_a_failed_start_that_nobody_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    emit = OutputHub.emit

    def without_errors(hub: OutputHub, event: SequenceEvent) -> None:
        if event.error is None:
            emit(hub, event)

    monkeypatch.setattr(OutputHub, "emit", without_errors)
    assert found(with_bad_logits, "nobody was told")


def test_promises_of_blocks_that_never_end(tamper: Tamper) -> None:
    tamper(ReservationTable, drop(reservation.Unreserve))
    assert found(as_drawn, "blocks are reserved")


def test_leases_that_nobody_renews_or_releases(tamper: Tamper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReservationTable, "due_renewals", lambda self, now_s: {})
    tamper(ReservationTable, drop(reservation.SendRelease))
    assert found(as_drawn, "leases lapsed")


def test_requests_that_the_router_does_not_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "_abort", lambda self, run, reason: run.inbox.completion.holders.clear())
    assert found(as_drawn, "though nobody waits for it")


def test_an_accept_that_is_overtaken_by_its_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveRequests, "abort", lambda self, handoff: self.end(handoff))
    assert found(with_late_messages, "after its abort")


def test_an_output_stream_whose_end_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerRequests, "_abort_epoch", lambda self, epoch: None)
    assert found(as_drawn, "though nobody waits for it")


def test_tokens_that_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Completion.take
    monkeypatch.setattr(Completion, "take", lambda self: [*(tokens := take(self)), *tokens[-1:]])
    assert found(as_drawn, "got the tokens")


def test_memory_that_outlives_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(role: DecodeRole, handoff: HandoffId) -> None:
        role._timelines.pop(handoff, None)

    monkeypatch.setattr(DecodeRole, "finished", forgetful)
    assert found(as_drawn, "requests of reservations are left")


def test_the_scenarios_fail_only_with_a_bug() -> None:
    """Or the tests above would find something else."""
    hardened = (as_drawn, with_corruption, with_hanging_wires, with_late_messages, with_bad_logits)
    for seed in range(4):
        for harden in hardened:
            assert run_scenario(harden(draw(seed))).violations == ()


def test_a_client_that_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clients, "_close", lambda self, attempt, end: None)
    assert found(as_drawn, "never ended")
