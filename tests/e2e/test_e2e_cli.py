"""The command line against a real cluster with a Ray of its own: what a user types, sees, and leaves behind."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from families import random_prompt
from harness import PDSERVE, Cluster, run, running

from pdserve.client import AsyncClient

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(private_environment: dict[str, str], demo_model: Path) -> Iterator[Cluster]:
    with running(private_environment, demo_model) as started:
        yield started


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """What a failed command says: one line on stderr, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_a_prompt_is_answered_and_says_where_its_time_went(cluster: Cluster) -> None:
    arguments = ("generate", "def add(a, b):", "--max-tokens", "16", "--temperature", "0", "--json")
    result = cluster.command(*arguments, "--name", cluster.name)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["text"]
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["timings"]["prefill_ms"] > 0
    assert answer["timings"]["transfer_ms"] > 0


def test_a_file_of_prompts_is_answered_in_order_and_a_bad_line_stays_its_own(cluster: Cluster, tmp_path: Path) -> None:
    lines = [
        {"prompt": "import os"},
        {"prompt_token_ids": [5, 6, 7]},
        {"prompt_token_ids": [10**6]},
        {"prompt": "x = "},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("generate", "--prompts", str(prompts), "--max-tokens", "8", "--name", cluster.name)
    result = cluster.command(*arguments)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 4
    assert all("token_ids" in answers[index] for index in (0, 1, 3))
    assert "error" in answers[2]
    cluster.assert_drained()


def test_a_conversation_can_be_piped(cluster: Cluster) -> None:
    result = cluster.command(
        "chat", "--name", cluster.name, "--max-tokens", "8", stdin=None, input="Write a function: Add.\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_sixty_four_streams_lose_and_repeat_nothing(cluster: Cluster) -> None:
    async def stream(client: AsyncClient, number: int) -> list[int]:
        indices: list[int] = []
        async with client.stream(random_prompt(5 + number, number), max_tokens=40, ignore_eos=True) as tokens:
            async for delta in tokens:
                indices.extend(range(delta.index, delta.index + len(delta.token_ids)))
        return indices

    async def everything() -> list[list[int]]:
        async with AsyncClient(cluster.endpoint) as client:
            return await asyncio.gather(*(stream(client, number) for number in range(64)))

    assert asyncio.run(everything()) == [list(range(40))] * 64
    cluster.assert_drained()


def test_a_load_is_measured(cluster: Cluster) -> None:
    arguments = ("bench", "--workload", "short", "--request-rate", "20", "--num-prompts", "20", "--json")
    result = cluster.command(*arguments, "--name", cluster.name)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["num_completed"] == 20
    assert not report["errors"]
    assert 0 < report["ttft"]["p50_ms"] <= report["ttft"]["p99_ms"]
    cluster.assert_drained()


def test_status_is_for_people_and_for_scripts(cluster: Cluster) -> None:
    table = cluster.command("status", "--name", cluster.name)
    assert table.returncode == 0
    assert "serving" in table.stdout
    printed = cluster.command("status", "--name", cluster.name, "--json")
    assert printed.returncode == 0
    status = json.loads(printed.stdout)
    assert status["healthy"]
    assert {worker["role"] for worker in status["workers"]} == {"prefill", "decode"}
    assert status["links"] == [{"source": "prefill-0", "target": "decode-0", "kind": "shm", "reason": ""}]
    assert "prefill-0 -> decode-0: over shm" in table.stdout


def test_workers_that_cannot_exchange_kv_are_refused_at_the_start_naming_the_difference(
    environment: dict[str, str], demo_model: Path
) -> None:
    settings = ("--set", "name=apart", "--set", f"model={demo_model}", "--set", "prefill.engine.dtype=bfloat16")
    joined = ("--set", f"ray.address={environment['PDSERVE_TEST_RAY']}")
    result = run(environment, "up", *settings, *joined, "--detach")
    assert result.returncode == 2
    assert "prefill-0 -> decode-0" in one_line(result)
    assert "dtype: float32 != bfloat16" in one_line(result)


def test_every_process_has_metrics_and_they_agree_with_what_was_done(cluster: Cluster) -> None:
    before = scrape_all(cluster)
    result = cluster.command("generate", "import os", "--max-tokens", "10", "--ignore-eos", "--name", cluster.name)
    assert result.returncode == 0, result.stderr
    after = scrape_all(cluster)

    def grown(process: str, name: str) -> float:
        return after[process].get(name, 0.0) - before[process].get(name, 0.0)

    assert grown("router", "pdserve_generation_tokens_total") == 10
    assert grown("router", "pdserve_time_to_first_token_seconds_count") == 1
    assert grown("prefill-0", "pdserve_worker_generation_tokens_total") == 1
    assert grown("decode-0", "pdserve_worker_generation_tokens_total") == 9
    assert grown("decode-0", "pdserve_handoff_seconds_count") == 1
    assert grown("decode-0", "pdserve_handoff_bytes_total") > 0


def scrape_all(cluster: Cluster) -> dict[str, dict[str, float]]:
    status = cluster.status()
    addresses = {worker["worker_id"]: worker["metrics_address"] for worker in status["workers"]}
    addresses |= status["metrics_endpoints"]
    return {process: scrape(address) for process, address in addresses.items()}


def scrape(address: str) -> dict[str, float]:
    """Sum over labels of every sample."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    totals: dict[str, float] = {}
    for name, value in re.findall(r"^([a-z_]+)(?:\{[^}]*\})? ([-+0-9.e]+)$", text, flags=re.MULTILINE):
        totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def test_a_name_that_is_taken_is_refused(cluster: Cluster) -> None:
    result = run(cluster.environment, "up", "--set", f"name={cluster.name}", "--detach")
    assert result.returncode == 2
    assert "already running" in one_line(result)


def test_down_leaves_nothing_behind(private_environment: dict[str, str], family_dir: Any) -> None:
    with running(private_environment, family_dir("llama")) as cluster:
        ours = processes_of(cluster)
        assert len(ours) >= 7, "head, router, controller, two workers and Ray's own"
        folders = {Path(match) for process in ours for match in re.findall(RAY_FOLDER, command_line(process))}
        assert folders, "a private Ray has a folder"
    _, alive = psutil.wait_procs(ours, timeout=10)
    assert not alive
    assert not any(folder.exists() for folder in folders)
    again = run(private_environment, "down", "--name", cluster.name)
    assert again.returncode == 2
    assert "no cluster named" in one_line(again)


RAY_FOLDER = r"/tmp/pdserve-[a-z0-9_]+"


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def processes_of(cluster: Cluster) -> list[psutil.Process]:
    """Its head and everything that this started: whatever else runs on this machine is not asked about."""
    state = Path(cluster.environment["XDG_STATE_HOME"]) / "pdserve" / cluster.name / "cluster.json"
    head = psutil.Process(json.loads(state.read_text())["head_pid"])
    return [head, *head.children(recursive=True)]


def test_a_signal_during_up_or_while_serving_takes_everything_down(
    private_environment: dict[str, str], family_dir: Any
) -> None:
    settings = ("--set", "name=signalled", "--set", f"model={family_dir('llama')}")
    command = [*PDSERVE, "up", *settings]
    for wait_until_serving in (False, True):
        with subprocess.Popen(command, env=private_environment, stdout=subprocess.PIPE, text=True) as up:
            assert up.stdout is not None
            if wait_until_serving:
                assert "serving" in up.stdout.readline()
            head = wait_for_head(up.pid)
            ours = [head, *head.children(recursive=True)]
            folders = {Path(match) for process in ours for match in re.findall(RAY_FOLDER, command_line(process))}
            assert folders or not wait_until_serving
            number = signal.SIGINT if wait_until_serving else signal.SIGTERM
            up.send_signal(number)
            while up.poll() is None:  # who is impatient does not cut the taking down short
                with suppress(psutil.NoSuchProcess):
                    head.send_signal(signal.SIGTERM)
                time.sleep(0.02)
        assert run(private_environment, "status", "--name", "signalled").returncode == 2
        assert not head.is_running()
        assert not any(folder.exists() for folder in folders)


def wait_for_head(pid: int) -> psutil.Process:
    """The head process that `pdserve up` has started."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = psutil.Process(pid).children()
        if children:
            return children[0]
        time.sleep(0.05)
    raise AssertionError("no head process was started")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("up", "--set", "engine.blok_size=16"), "engine.blok_size"),
        (("up", "--set", "model=/nowhere/at/all"), "no such directory"),
        (("up", "-c", "/nowhere.yaml"), "no such file"),
        (("down", "--name", "nobody"), "no cluster named"),
        (("status", "--name", "nobody"), "no cluster named"),
        (("generate", "x", "--name", "nobody"), "no cluster named"),
        (("down", "--name", "../etc"), "not a cluster name"),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_2(
    private_environment: dict[str, str], arguments: tuple[str, ...], named: str
) -> None:
    result = run(private_environment, *arguments)
    assert result.returncode == 2
    assert named in one_line(result)


def test_a_corrupt_checkpoint_is_refused_by_the_worker_and_nothing_stays_up(
    environment: dict[str, str], family_dir: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(family_dir("llama"), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    settings = ("--set", "name=broken", "--set", f"model={broken}")
    joined = ("--set", f"ray.address={environment['PDSERVE_TEST_RAY']}")
    result = run(environment, "up", *settings, *joined, "--detach")
    assert result.returncode == 2
    assert "safetensors" in one_line(result)
    assert run(environment, "down", "--name", "broken").returncode == 2
