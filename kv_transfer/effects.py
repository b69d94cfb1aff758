"""What a hand-off state machine asks its owner to do or to know, common to both sides. Frozen, with reasons.

Knows no state: `lease` and `reservation` decide, their owner's hands carry out.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.proto.errors import PdserveError, rebuild
from pdserve.proto.types import HandoffId


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """The hand-off's claim on these blocks ends now; nothing reads or writes them on its behalf any more."""

    id: HandoffId
    block_ids: tuple[int, ...]
    from_quarantine: bool
    reason: str


@dataclass(frozen=True, slots=True)
class QuarantineBlocks:
    """The hand-off is over but its wire is not proven idle: nobody may use these blocks until `FreeBlocks`."""

    id: HandoffId
    block_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The event was not applied and whoever sent it must be told. `kind` names a class of the error tree."""

    id: HandoffId
    kind: str
    message: str

    def error(self) -> PdserveError:
        return rebuild(self.kind, self.message)


@dataclass(frozen=True, slots=True)
class Ignored:
    """The event was a duplicate or came too late; nothing changed and nobody needs to know but the log."""

    id: HandoffId
    reason: str


def raise_refusal(effects: tuple[object, ...]) -> None:
    """Raise the typed error of the first `Refused` among `effects`."""
    for effect in effects:
        if isinstance(effect, Refused):
            raise effect.error()
