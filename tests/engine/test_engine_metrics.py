"""What a turn of the engine's loop tells, and what becomes of it in the metrics."""

from __future__ import annotations

import threading
from operator import methodcaller

from engine_runs import FamilyDir, request, tiny_engine
from families import random_prompt

from pdserve.engine.loop import EngineLoop
from pdserve.engine.metrics import EngineMetrics
from pdserve.engine.sequence import Sequence
from pdserve.engine.turn import Turn
from pdserve.proto.types import Role


def test_blocks_by_state_and_prefix_hits_are_told(family_dir: FamilyDir) -> None:
    turns: list[Turn] = []
    crashes: list[Exception] = []
    finished = threading.Semaphore(0)

    def on_turn(turn: Turn) -> None:
        turns.append(turn)
        if turn.step is not None and any(step.finish for step in turn.step.sequences):
            finished.release()

    loop = EngineLoop(tiny_engine(family_dir("llama"), num_blocks=12, max_model_len=100), on_turn, crashes.append)
    loop.start()
    for _ in range(2):
        sequence = Sequence(request(random_prompt(40, 1), 4), 0.0)
        loop.post(methodcaller("add", sequence))
        assert finished.acquire(timeout=60)
    assert loop.stop(60)
    assert not crashes
    for turn in turns:
        pool = turn.pool
        assert pool.free + pool.running + pool.leased + pool.receiving + pool.quarantined == pool.total == 12
        assert pool.cached <= pool.free
    assert (turns[-1].pool.free, turns[-1].pool.cached) == (12, 2)

    metrics = EngineMetrics("w0", Role.DECODE, "tiny")
    for turn in turns:
        metrics.observe(turn)
    labels = {"model_name": "tiny", "role": "decode", "worker_id": "w0"}

    def value(name: str, **more: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels | more)

    assert value("pdserve_prefix_cache_queries_tokens_total") == 80
    assert value("pdserve_prefix_cache_hits_tokens_total") == 32
    assert value("pdserve_kv_blocks", state="cached") == 2
    assert value("pdserve_kv_blocks", state="free") == 12
    assert value("pdserve_kv_cache_usage_perc") == 0
