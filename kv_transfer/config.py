"""The `kv_transfer` section of the configuration: links, leases and the deadline of every wait of a hand-off.

Validated once and frozen. Knows nothing of which workers exist or which links a pair can use.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pdserve.kv_transfer.reservation import Timeouts

MAX_S = 86_400.0


Seconds = Annotated[float, Field(gt=0, le=MAX_S, allow_inf_nan=False)]


class KVTransferConfig(BaseModel):
    """`links` is in order of preference. All times are in seconds; the timeouts are deadlines of one waiter each."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    links: list[Literal["shm", "cuda_ipc", "nccl", "gloo"]] = Field(
        default=["shm", "cuda_ipc", "nccl", "gloo"], min_length=1
    )
    host: str = Field(default="127.0.0.1", pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$")
    """Interface on which links listen: an IPv4 address or a name that peers on other hosts can reach."""

    wire_dtype: Literal["auto", "int8"] = "auto"
    """What KV travels in: as the prefill worker keeps it, or in int8, about a quarter of float32's bytes."""

    lease_s: Seconds = 30.0
    """How long a prefill worker keeps blocks for a decode worker that stays silent."""
    renew_s: Seconds = 5.0
    """How often a decode worker renews the leases it still wants; below `lease_s`."""

    reserve_timeout_s: Seconds = 600.0
    """Decode worker: from the router's announcement to the offer; the request's own deadline counts too."""
    room_timeout_s: Seconds = 600.0
    """Decode worker: from the offer until blocks are free."""
    part_timeout_s: Seconds = 600.0
    """Decode worker: from one part of the KV to the offer of the next."""
    transfer_timeout_s: Seconds = 10.0
    """Either worker: one part, opening of the link and checking of its digests included."""
    max_pulls: int = Field(default=2, ge=1, le=100)
    """How often a decode worker fetches a part that does not arrive, or arrives wrong."""
    control_timeout_s: Seconds = 5.0
    """Either worker: one control call to the other."""

    offer_retry_s: Seconds = 0.5
    """Prefill worker: how soon an offer without an answer is repeated."""

    digest_key: str = Field(default="", repr=False)
    """Hexadecimal; with it the digests are keyed (BLAKE2b), so that nobody without it can forge KV. Empty: XXH3, which
    guards against accidents only."""

    max_links: int = Field(default=64, ge=1)
    """Open links of one worker; the least recently used idle one makes room."""
    max_message_bytes: int = Field(default=64 << 20, ge=1 << 16)
    """Upper bound of one message of a link; staging memory is a few of them."""
    quarantine_budget_blocks: int = Field(default=1024, ge=0)
    """A worker with more blocks in quarantine than this, for longer than wires take to fall idle, is to be replaced."""

    @field_validator("links")
    @classmethod
    def _distinct(cls, links: list[str]) -> list[str]:
        if len(set(links)) != len(links):
            raise ValueError("names a link kind twice")
        return links

    @field_validator("digest_key")
    @classmethod
    def _hexadecimal(cls, key: str) -> str:
        try:
            num_bytes = len(bytes.fromhex(key))
        except ValueError:
            raise ValueError("is not hexadecimal") from None
        if key and not 16 <= num_bytes <= 64:
            raise ValueError(f"has {num_bytes} bytes, wants 16 to 64")
        return key

    @property
    def digest_key_bytes(self) -> bytes:
        return bytes.fromhex(self.digest_key)

    @property
    def timeouts(self) -> Timeouts:
        return Timeouts(
            reserve_s=self.reserve_timeout_s,
            room_s=self.room_timeout_s,
            part_s=self.part_timeout_s,
            # Behind the link's own deadline: a fetch that is late reports it itself, and may be repeated.
            transfer_s=self.transfer_timeout_s + self.control_timeout_s,
            renew_s=self.renew_s,
            max_pulls=self.max_pulls,
        )

    @property
    def quarantine_patience_s(self) -> float:
        """Longer than a wire that works takes to fall idle: a link is waited for, the source is asked, blocks move."""
        return 2 * (self.transfer_timeout_s + self.control_timeout_s)

    @model_validator(mode="after")
    def _renewed_in_time(self) -> KVTransferConfig:
        if self.renew_s >= self.lease_s:
            raise ValueError(f"renew_s ({self.renew_s}) must be less than lease_s ({self.lease_s})")
        return self
