"""Nothing hangs, nothing leaks: clients that vanish, requests that are cancelled at every stage, workers that die."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from families import random_prompt
from harness import Cluster, running

from pdserve.client import AsyncClient, Client, Completion
from pdserve.proto.errors import PdserveError, RequestCancelled, Unavailable

pytestmark = pytest.mark.cluster

# Small enough that sequences queue: eight in a batch, chunks of 64 tokens, room for about twelve.
SMALL = (
    "engine.max_num_seqs=8",
    "engine.max_num_batched_tokens=64",
    "engine.num_blocks=128",
    "engine.max_model_len=512",
)
ENDS_WITHIN_S = 30.0  # a hang, not slowness: requests have two minutes


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str], family_dir: Any) -> Iterator[Cluster]:
    with running(environment, family_dir("llama"), *SMALL) as started:
        yield started


def worker(cluster: Cluster, worker_id: str) -> dict[str, Any]:
    return next(one for one in cluster.status()["workers"] if one["worker_id"] == worker_id)


async def cancel_after(client: AsyncClient, number: int, delay_s: float) -> int:
    """Start a long request and walk away; how many tokens came first."""
    prompt = random_prompt(random.Random(number).choice((1, 40, 200, 400)), number)
    seen = 0
    try:
        async with asyncio.timeout(delay_s), client.stream(prompt, max_tokens=100, ignore_eos=True) as tokens:
            async for delta in tokens:
                seen += len(delta.token_ids)
    except (TimeoutError, RequestCancelled):
        return seen  # left while waiting, or at the very moment of an answer
    return seen


def test_cancelling_at_any_moment_frees_everything(cluster: Cluster) -> None:
    """A hundred requests at once, each left after its own delay: in the queue, in prefill, in transfer, in decode."""

    async def everything() -> list[int]:
        async with AsyncClient(cluster.endpoint) as client:
            work = (cancel_after(client, number, 0.005 + 0.02 * number) for number in range(100))
            return await asyncio.gather(*work)

    seen = asyncio.run(everything())
    assert min(seen) == 0, "no request was cancelled before its first token"
    assert any(0 < tokens < 100 for tokens in seen), f"no request was cancelled while decoding: {seen}"
    cluster.assert_drained()


def test_a_killed_client_leaves_nothing_behind(cluster: Cluster) -> None:
    script = (
        "import sys; from pdserve.client import Client\n"
        "with Client(sys.argv[1]) as client, client.stream([5] * 20, max_tokens=400, ignore_eos=True) as tokens:\n"
        "    for delta in tokens: print(delta.index, flush=True)\n"
    )
    command = [sys.executable, "-c", script, cluster.endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline(), "the client got no token"
        client.kill()
    cluster.assert_drained()


def test_a_deadline_ends_the_request_and_frees_its_blocks(cluster: Cluster) -> None:
    with Client(cluster.endpoint) as client, pytest.raises(PdserveError) as caught:
        client.generate(random_prompt(50), max_tokens=400, ignore_eos=True, timeout_s=0.15)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    cluster.assert_drained()


async def outcomes(endpoint: str, count: int, kill: Any) -> tuple[list[Completion | BaseException], float]:
    """Run requests, call `kill` once tokens flow, and wait for all; the slowest end after the kill."""
    flowing = asyncio.Event()

    async def one(client: AsyncClient, number: int) -> Completion:
        async with client.stream(random_prompt(30, number), max_tokens=450, ignore_eos=True) as tokens:
            async for delta in tokens:
                if delta.index > 2:
                    flowing.set()
        assert tokens.completion is not None
        return tokens.completion

    async with AsyncClient(endpoint) as client:
        work = [asyncio.create_task(one(client, number)) for number in range(count)]
        await asyncio.wait_for(flowing.wait(), 30)
        killed_s = time.monotonic()
        kill()
        results = await asyncio.gather(*work, return_exceptions=True)
        return list(results), time.monotonic() - killed_s


def test_a_killed_decode_worker_ends_its_requests_and_shows_in_status(
    environment: dict[str, str], family_dir: Any
) -> None:
    with running(environment, family_dir("llama"), *SMALL) as cluster:
        pid = worker(cluster, "decode-0")["pid"]
        results, seconds = asyncio.run(outcomes(cluster.endpoint, 12, lambda: os.kill(pid, signal.SIGKILL)))
        assert all(isinstance(result, Unavailable) for result in results), results
        assert any("decode-0" in str(result) for result in results)
        assert seconds < ENDS_WITHIN_S
        status = cluster.wait_until(lambda now: worker_state(now, "decode-0") == "dead", "decode-0 shown as dead")
        assert not status["healthy"]
        cluster.assert_drained()  # the prefill worker kept no lease for the dead
        with Client(cluster.endpoint) as client, pytest.raises(Unavailable):
            client.generate([5, 6], max_tokens=4)


def test_a_killed_prefill_worker_does_not_harm_requests_already_handed_off(
    environment: dict[str, str], family_dir: Any
) -> None:
    with running(environment, family_dir("llama"), *SMALL) as cluster:
        pid = worker(cluster, "prefill-0")["pid"]
        results, _ = asyncio.run(outcomes(cluster.endpoint, 12, lambda: os.kill(pid, signal.SIGKILL)))
        finished = [result for result in results if isinstance(result, Completion)]
        assert finished, "requests that were decoding must go on"
        assert all(len(one.token_ids) == 450 for one in finished)
        failed = [result for result in results if not isinstance(result, Completion)]
        assert all(isinstance(result, Unavailable) for result in failed), failed
        cluster.wait_until(lambda now: worker_state(now, "prefill-0") == "dead", "prefill-0 shown as dead")
        cluster.assert_drained()


def worker_state(status: dict[str, Any], worker_id: str) -> str:
    return next(str(one["state"]) for one in status["workers"] if one["worker_id"] == worker_id)


def test_serving_goes_on_without_the_controller(environment: dict[str, str], family_dir: Any) -> None:
    with running(environment, family_dir("llama"), *SMALL) as cluster:
        pids = [one["pid"] for one in cluster.status()["workers"]]
        os.kill(controller_pid(cluster), signal.SIGKILL)
        with Client(cluster.endpoint) as client:
            completion = client.generate(random_prompt(40), max_tokens=16, ignore_eos=True)
        assert len(completion.token_ids) == 16
        assert cluster.status()["controller"] != "serving"
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive, "workers outlive their controller, but not their cluster"


def controller_pid(cluster: Cluster) -> int:
    """The process that holds the controller's log open."""
    log = Path(cluster.environment["XDG_STATE_HOME"]) / "pdserve" / cluster.name / "controller.log"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) == str(log) for link in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue  # it ended, or is not ours
    raise AssertionError("no controller process found")
