"""The engine: plan, run, sample, commit.

Composes the scheduler (what), the runner (compute) and sampling (choose); owns none of their decisions. Used from
one thread, but that others may touch the pool while a step computes: see `books`.
Knows nothing of requests' origin, of links or of deadlines: sequences come in, tokens come out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path

import torch

from pdserve.engine.block_pool import BlockPool
from pdserve.engine.config import EngineConfig
from pdserve.engine.kv_cache import KVCache
from pdserve.engine.model import LoadedModel, load_model
from pdserve.engine.plan import Committed, StepResult
from pdserve.engine.runner import Runner
from pdserve.engine.sampling import sample
from pdserve.engine.scheduler import Scheduler
from pdserve.engine.sequence import Sequence
from pdserve.proto.errors import ConfigError, PdserveError
from pdserve.proto.types import HandoffId


class Engine:
    """Runs sequences over one pool. `pool` owns the states of `cache`'s blocks.

    `books` is held while a step is planned and while it is booked, not while it is computed. Who holds it may take
    blocks that nobody has, claim blocks of known content and let go of those claims, from any thread; all else is for
    the engine's own.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel, cache: KVCache, pool: BlockPool) -> None:
        assert cache.num_blocks == pool.num_blocks
        assert cache.layout == loaded.layout
        self.books = threading.Lock()
        self.config = config
        self.loaded = loaded
        self.cache = cache
        self.pool = pool
        self.max_model_len = _fitting_model_len(config, loaded, pool.num_blocks)
        self.scheduler = Scheduler(
            pool,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_caching=config.prefix_caching,
        )
        self._runner = Runner(loaded.model, cache)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in. Raises InvalidRequest or DuplicateRequest, and then has not taken it."""
        self.scheduler.add(sequence)

    def abort(self, handoff_id: HandoffId) -> Sequence | None:
        """Drop a sequence and free its blocks but for those handed over; `None` if it is not here (any more)."""
        return self.scheduler.abort(handoff_id)

    def hold_prefix(self, prompt_token_ids: Items[int]) -> list[int]:
        """The blocks that hold a prompt's first tokens already, full ones only, with a RUNNING claim for the caller.

        All full blocks of the prompt may be among them. None are, without prefix caching.
        """
        return self.scheduler.claims.hold(prompt_token_ids)

    def step(self, now: Callable[[], float]) -> StepResult:
        """Compute one step. `now` is the clock, in seconds."""
        started_s = now()
        with self.books:
            plan = self.scheduler.schedule(started_s)
        done = Committed()
        if plan.scheduled:
            logits = self._runner.run(plan)  # [num_sampled, vocab]
            sampled = sample(logits, plan.sampled)
            with self.books:
                self._scrub(plan.sampled, sampled)
                done = self.scheduler.commit(plan, sampled, now())
        return StepResult.of(plan, done, now() - started_s)

    def _scrub(self, sequences: tuple[Sequence, ...], sampled: tuple[object, ...]) -> None:
        """Nobody shall inherit what made the logits of sequences that failed bad.

        None of their blocks is found any more. Those that nobody else claims are zeroed; the others are being read, and
        are harmless once they are free: blocks of unknown content are written before they are read.
        """
        for sequence, result in zip(sequences, sampled, strict=True):
            if isinstance(result, PdserveError):
                self.pool.unlabel(sequence.block_ids)
                own = sequence.block_ids[sequence.num_handed_blocks :]
                self._runner.clear([block_id for block_id in own if self.pool.num_claims(block_id) == 1])


def build_engine(
    model_dir: Path, config: EngineConfig, buffer_factory: Callable[[int], torch.Tensor] | None = None
) -> Engine:
    """Load a model and give it a pool, in memory from `buffer_factory(num_bytes)` (flat uint8) if given.

    Raises ModelError or ConfigError.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    loaded = load_model(model_dir, config)
    num_blocks = _num_blocks(config, loaded)
    buffer = None if buffer_factory is None else buffer_factory(KVCache.required_bytes(loaded.layout, num_blocks))
    cache = KVCache(loaded.layout, num_blocks, loaded.device, buffer)
    return Engine(config, loaded, cache, BlockPool(num_blocks))


def _num_blocks(config: EngineConfig, loaded: LoadedModel) -> int:
    """As configured, or what the memory set aside holds."""
    if config.num_blocks is not None:
        return config.num_blocks
    if loaded.device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(loaded.device)
        budget_bytes = int(total_bytes * config.gpu_memory_utilization) - (total_bytes - free_bytes)
        key = "engine.gpu_memory_utilization"
    else:
        budget_bytes, key = config.kv_cache_memory_bytes, "engine.kv_cache_memory_bytes"
    num_blocks = budget_bytes // loaded.layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(f"{key}: leaves {budget_bytes} bytes, one KV block takes {loaded.layout.block_bytes}")
    return num_blocks


def _fitting_model_len(config: EngineConfig, loaded: LoadedModel, num_blocks: int) -> int:
    """The longest sequence, prompt and completion, that the pool can hold. Its last token needs no KV."""
    capacity_tokens = num_blocks * config.block_size
    if config.max_model_len is not None and config.max_model_len > capacity_tokens + 1:
        raise ConfigError(
            f"engine.max_model_len: {config.max_model_len} is more than the pool's {capacity_tokens} tokens"
        )
    return min(loaded.max_model_len, capacity_tokens + 1)
