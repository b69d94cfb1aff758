"""Where a worker keeps its KV decides which links reach it and which digests vouch for it.

The device's side runs over `HostRuntime`, which plays the CUDA calls with host memory: no GPU has run it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from families import random_prompt, reference_generate
from gpu_fakes import CPU, HostRuntime
from worker_pair import Routerless, drained, make_request, spec, start

from pdserve.cluster.worker import Worker
from pdserve.cluster.worker_memory import DeviceMemory, HostMemory, WorkerMemory
from pdserve.engine.engine import build_engine
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.proto.errors import ConfigError, TransferFailed
from pdserve.proto.types import Role

FamilyDir = Callable[..., Path]


def test_host_memory_is_reached_over_shm_and_gloo() -> None:
    memory = HostMemory(KVTransferConfig())
    memory.allocate(4096)
    try:
        assert list(memory.addresses()) == ["shm", "gloo"]
        assert memory.digester().algorithm == "xxh3"
        with pytest.raises(TransferFailed, match="nccl"):
            memory.open_source("nccl", "", memory.allocate(4096).view(1, -1), 1, 1)
    finally:
        memory.close()


def test_device_memory_is_reached_over_cuda_ipc_and_nccl() -> None:
    runtime = HostRuntime()
    memory = DeviceMemory(KVTransferConfig(), CPU, runtime)
    memory.allocate(4096)
    try:
        assert list(memory.addresses()) == ["cuda_ipc", "nccl"]
        assert memory.digester().algorithm == "multilinear", "computed where the blocks are"
    finally:
        memory.close()
        runtime.close()


def test_a_key_makes_digests_keyed_and_needs_host_memory() -> None:
    config = KVTransferConfig(digest_key="0f" * 16)
    assert HostMemory(config).digester().algorithm == "blake2b"
    with pytest.raises(ConfigError, match="digest_key"):
        DeviceMemory(config, CPU, HostRuntime())


def test_links_that_cannot_reach_the_memory_are_refused_at_the_start(family_dir: FamilyDir) -> None:
    with pytest.raises(ConfigError, match=r"kv_transfer\.links"):
        Worker.load(spec(Role.DECODE, family_dir("llama"), KVTransferConfig(links=["nccl"])))


@asynccontextmanager
async def worker_over(
    memory: WorkerMemory, role: Role, model: Path, config: KVTransferConfig
) -> AsyncIterator[Routerless]:
    chosen = spec(role, model, config)
    engine = build_engine(model, chosen.engine.model_copy(update={"device": "cpu"}), memory.allocate)
    started = Worker(chosen, engine, memory)
    await started.serve()
    side = Routerless(started)
    try:
        await side.open()
        yield side
    finally:
        await side.close()
        await side.channel.close()
        await started.stop()


async def test_a_hand_off_between_two_workers_on_one_gpu(family_dir: FamilyDir) -> None:
    model, config, runtime = family_dir("llama"), KVTransferConfig(lease_s=6.0, renew_s=1.0), HostRuntime()
    memories = [DeviceMemory(config, CPU, runtime) for _ in range(2)]
    async with (
        worker_over(memories[0], Role.PREFILL, model, config) as prefill,
        worker_over(memories[1], Role.DECODE, model, config) as decode,
    ):
        assert list(prefill.worker.requests.info.link_address) == ["cuda_ipc", "nccl"]
        for length in (20, 200):
            prompt = random_prompt(length, length)
            id = await start(prefill, decode, make_request(f"r{length}", prompt))
            await decode.ended(id)
            tokens = prefill.tokens(id) | decode.tokens(id)
            assert tuple(tokens[index] for index in range(24)) == reference_generate(model, prompt, 24).token_ids
        await drained(prefill, decode)
    runtime.close()
