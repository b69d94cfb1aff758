"""What a worker answers its peers, whatever they send, and what it does when answering shows a bug of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.cluster.worker_server import WorkerServices
from pdserve.proto import worker_pb2 as pb
from pdserve.proto.errors import StaleReference

ID = pb.HandoffId(request_id="r", epoch=1)


class Requests:
    """A worker's requests of which every part can be made to fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.released: list[str] = []

    def require_generation(self, generation: int) -> None:
        if generation != 2:
            raise StaleReference("another generation")

    def require_prefill(self) -> Any:
        return SimpleNamespace(release=self._release, renew=lambda ids: ids[:1])

    def _release(self, id: Any, outcome: str) -> None:
        if self.error is not None:
            raise self.error
        self.released.append(outcome)


async def ask(requests: Requests, *messages: pb.PeerRequest) -> tuple[list[pb.PeerReply], list[Exception]]:
    bugs: list[Exception] = []
    anything: Any = requests

    async def stream() -> AsyncIterator[pb.PeerRequest]:
        for message in messages:
            yield message

    services = WorkerServices(anything, bugs.append)
    context: Any = None
    return [reply async for reply in services.Ask(stream(), context)], bugs


def release(number: int, generation: int = 2) -> pb.PeerRequest:
    return pb.PeerRequest(
        number=number, release=pb.ReleaseRequest(id=ID, source_generation=generation, outcome="redeemed")
    )


async def test_every_request_is_answered_under_its_number() -> None:
    requests = Requests()
    renew = pb.PeerRequest(number=8, renew=pb.RenewRequest(ids=[ID, ID], source_generation=2))
    replies, bugs = await ask(requests, release(7), renew, release(9, generation=1))
    assert [reply.number for reply in replies] == [7, 8, 9]
    assert [reply.error.kind for reply in replies] == ["", "", "StaleReference"]
    assert len(replies[1].lost) == 1
    assert (requests.released, bugs) == (["redeemed"], [])


def layout(**changes: Any) -> pb.KVLayout:
    fields: dict[str, Any] = {"model_hash": "m", "dtype": "float32"}
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "block_size": 16}
    return pb.KVLayout(**fields | sizes | changes)


def ticket(**changes: Any) -> pb.KVTicket:
    fields: dict[str, Any] = {"id": ID, "num_tokens": 16, "layout": layout(), "digest": "xxh3", "lease_s": 30.0}
    return pb.KVTicket(**fields | changes)


@pytest.mark.parametrize(
    "message",
    [
        pb.PeerRequest(number=1),
        pb.PeerRequest(number=1, offer=pb.OfferRequest()),
        pb.PeerRequest(number=1, redeem=pb.RedeemRequest()),
        pb.PeerRequest(number=1, release=pb.ReleaseRequest()),
        pb.PeerRequest(number=1, offer=pb.OfferRequest(part=pb.KVPart(block_ids=[1, 2], block_digests=[3]))),
        pb.PeerRequest(number=1, offer=pb.OfferRequest(ticket=ticket(layout=layout(block_size=0)))),
        pb.PeerRequest(number=1, offer=pb.OfferRequest(ticket=ticket(layout=layout(num_layers=0)))),
        pb.PeerRequest(number=1, offer=pb.OfferRequest(ticket=ticket(lease_s=float("nan")))),
        pb.PeerRequest(number=1, offer=pb.OfferRequest(ticket=ticket(num_tokens=0))),
    ],
    ids=[
        *("nothing", "an empty offer", "an empty redemption", "an empty release", "a part without a ticket"),
        *("blocks of no tokens", "no layers", "a lease of no length", "a ticket for nothing"),
    ],
)
async def test_a_message_that_makes_no_sense_is_refused_and_ends_nothing(message: pb.PeerRequest) -> None:
    (reply, after), bugs = await ask(Requests(), message, release(2))
    assert reply.error.kind in ("InvalidRequest", "StaleReference")
    assert after.error.kind == ""
    assert bugs == []


async def test_a_bug_is_told_as_an_opaque_id_and_ends_the_worker() -> None:
    """Half of what a message does may be done: the books cannot be trusted any more."""
    bug = AssertionError("a block is freed twice")
    (reply,), bugs = await ask(Requests(bug), release(1))
    assert reply.error.kind == "InternalError"
    assert "freed" not in reply.error.message
    assert bugs == [bug]
