"""A live worker as a policy sees it: what it last said about itself, and what this router has sent it since.

Knows nothing of connections, of time or of other workers. Frozen values.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.proto.types import KVLayout, WorkerLoad


@dataclass(frozen=True, slots=True)
class Pending:
    """Sent to a worker by this router, and not yet visible in the worker's own load."""

    num_requests: int = 0
    prompt_tokens: int = 0
    num_blocks: int = 0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker. `load.role` is what it does now."""

    load: WorkerLoad
    layout: KVLayout
    pending: Pending = Pending()

    @property
    def worker_id(self) -> str:
        return self.load.worker_id

    @property
    def num_sequences(self) -> int:
        return self.load.num_running + self.load.num_waiting + self.pending.num_requests

    @property
    def backlog_tokens(self) -> int:
        return self.load.queued_tokens + self.pending.prompt_tokens

    @property
    def spare_blocks(self) -> int:
        """Neither taken nor promised."""
        return self.load.free_blocks - self.load.reserved_blocks - self.pending.num_blocks

    def has_room(self, num_tokens: int) -> bool:
        return self.spare_blocks >= self.layout.num_blocks(num_tokens)

    def could_hold(self, num_tokens: int) -> bool:
        """If it were empty."""
        return self.load.total_blocks >= self.layout.num_blocks(num_tokens)
