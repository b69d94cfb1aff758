"""What the checked system's actors say to each other and hear, and what comes of it. Frozen values.

`worker` and `generation` are the addressee's; a request and a worker are numbers. Knows nothing of how messages travel.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelcheck.vocabulary import Fault, Kind, Mark


@dataclass(frozen=True, slots=True)
class Expect:
    request: int
    worker: int
    generation: int
    source_generation: int


@dataclass(frozen=True, slots=True)
class Prefill:
    request: int
    worker: int
    generation: int
    target_generation: int


@dataclass(frozen=True, slots=True)
class Abort:
    request: int
    worker: int
    generation: int


@dataclass(frozen=True, slots=True)
class Offer:
    """`digests[i]` is the content that the part's block `i` had when it was offered."""

    request: int
    worker: int
    generation: int
    source_generation: int
    part: int
    first_block: int
    block_ids: tuple[int, ...]
    digests: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True, slots=True)
class OfferAnswer:
    """`kind` is "" or the refusal's."""

    request: int
    worker: int
    generation: int
    part: int
    kind: str
    is_transient: bool = False


@dataclass(frozen=True, slots=True)
class Redeem:
    request: int
    worker: int
    generation: int
    target: int
    target_generation: int
    part: int
    link_epoch: int


@dataclass(frozen=True, slots=True)
class Release:
    request: int
    worker: int
    generation: int
    outcome: str


@dataclass(frozen=True, slots=True)
class Bytes:
    """A part on the wire: what the source's blocks held when they were sent."""

    request: int
    worker: int
    generation: int
    part: int
    link_epoch: int
    contents: tuple[int, ...]


Message = Expect | Prefill | Abort | Offer | OfferAnswer | Redeem | Release | Bytes
CALLS = (Expect, Prefill, Offer, Redeem)
"""Messages whose sender waits for an answer."""


# What else happens to an actor.


@dataclass(frozen=True, slots=True)
class CallAnswer:
    """The router's call came back: `reply` is "" or the refusal; `WorkerLost` if nobody answered."""

    request: int
    reply: str


@dataclass(frozen=True, slots=True)
class RedeemAnswer:
    request: int
    part: int
    link_epoch: int
    reply: str


@dataclass(frozen=True, slots=True)
class ReadDone:
    """A one-sided read returned these contents; `None` if the source's memory was gone."""

    request: int
    part: int
    contents: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class ConnectionReset:
    """The source of this fetch is gone, and with it the other end of the link."""

    request: int


@dataclass(frozen=True, slots=True)
class LeaseGone:
    """The answer to a renewal: the source keeps nothing for this hand-off."""

    request: int


@dataclass(frozen=True, slots=True)
class PeerGone:
    worker: int
    generation: int


@dataclass(frozen=True, slots=True)
class Told:
    """A worker's word to the router on its output stream. `error` is a kind, or "" for the token at `index`."""

    request: int
    worker: int
    index: int
    is_finish: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """A request arrives and is placed on these generations."""

    request: int
    source_generation: int
    target_generation: int


@dataclass(frozen=True, slots=True)
class Cancel:
    request: int


Stimulus = (
    Message | CallAnswer | RedeemAnswer | ReadDone | ConnectionReset | LeaseGone | PeerGone | Told | Start | Cancel
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an actor became, and what it did to others.

    `reply` answers the stimulus if that was a call. `ended` are requests that the router ended, with "" or the error's
    kind. `broken` names a violated property, or is "".
    """

    state: object
    note: str = ""
    kind: Kind = Kind.MUST
    reply: str = ""
    sends: tuple[Message, ...] = ()
    marks: tuple[tuple[int, Mark], ...] = ()
    ended: tuple[tuple[int, str], ...] = ()
    broken: str = ""
    fault: Fault | None = None
