"""The `kv_transfer` section of the configuration: links, leases and the deadline of every wait of a hand-off.

Validated once and frozen. Knows nothing of which workers exist or which links a pair can use.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class KVTransferConfig(BaseModel):
    """`links` is in order of preference. All times are in seconds, all of them deadlines of one waiter."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    links: list[Literal["shm", "gloo"]] = Field(default=["shm", "gloo"], min_length=1)
    host: str = Field(default="127.0.0.1", min_length=1)
    """Interface on which links listen: an address or a name that peers on other hosts can reach."""

    lease_s: float = Field(default=30.0, gt=0)
    """How long a prefill worker keeps blocks for a decode worker that stays silent."""
    renew_s: float = Field(default=5.0, gt=0)
    """How often a decode worker renews the leases it still wants; below `lease_s`."""

    reserve_timeout_s: float = Field(default=600.0, gt=0)
    """Decode worker: from the router's announcement to the offer; the request's own deadline counts too."""
    room_timeout_s: float = Field(default=600.0, gt=0)
    """Decode worker: from the offer until blocks are free."""
    transfer_timeout_s: float = Field(default=10.0, gt=0)
    """Either worker: one transfer, opening of the link included."""
    verify_timeout_s: float = Field(default=10.0, gt=0)
    """Decode worker: checking the digests."""
    control_timeout_s: float = Field(default=5.0, gt=0)
    """Either worker: one control call to the other."""

    max_links: int = Field(default=64, ge=1)
    """Open links of one worker; the least recently used idle one makes room."""
    max_message_bytes: int = Field(default=64 << 20, ge=1 << 16)
    """Largest message, and size of the staging buffer, of a link that stages."""
    quarantine_budget_blocks: int = Field(default=1024, ge=0)
    """A worker with more blocks in quarantine than this is to be replaced."""

    @field_validator("links")
    @classmethod
    def _distinct(cls, links: list[str]) -> list[str]:
        if len(set(links)) != len(links):
            raise ValueError("names a link kind twice")
        return links

    @model_validator(mode="after")
    def _renewed_in_time(self) -> KVTransferConfig:
        if self.renew_s >= self.lease_s:
            raise ValueError(f"renew_s ({self.renew_s}) must be less than lease_s ({self.lease_s})")
        return self
