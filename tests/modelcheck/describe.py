"""Messages and words as a reader of a counterexample sees them."""

from __future__ import annotations

from modelcheck.messages import Abort, Bytes, Expect, Message, Offer, OfferAnswer, Prefill, Redeem, Release, Told
from modelcheck.vocabulary import Setting, worker_name


def describe(setting: Setting, message: Message | Told) -> str:
    """One phrase: who says what to whom."""
    name, worker = setting.label(message.request), worker_name(message.worker)
    match message:
        case Expect():
            return f"router -> {worker}: Expect({name})"
        case Prefill():
            return f"router -> {worker}: Prefill({name})"
        case Abort():
            return f"router -> {worker}: Abort({name})"
        case Offer(part=part):
            return f"p0 -> {worker}: Offer({name}, part {part})"
        case OfferAnswer(part=part, kind=kind):
            sender = worker_name(setting.targets[message.request])
            return f"{sender} -> p0: the answer to Offer({name}, part {part}): {kind or 'accepted'}"
        case Redeem(target=target, part=part, link_epoch=link_epoch):
            return f"{worker_name(target)} -> p0: Redeem({name}, part {part}, link {link_epoch})"
        case Release(outcome=outcome):
            sender = worker_name(setting.targets[message.request])
            return f'{sender} -> p0: Release({name}, "{outcome.partition(":")[0]}")'
        case Bytes(part=part, link_epoch=link_epoch):
            return f"p0 => {worker}: the bytes of part {part} of {name}, on link {link_epoch}"
        case Told(index=index, is_finish=is_finish, error=error):
            word = f"{name} failed: {error}" if error else f"token {index} of {name}{', the last' * is_finish}"
            return f"{worker} -> router: {word}"


def loss_of(setting: Setting, message: Message) -> str:
    """The same for what goes wrong with it."""
    said = describe(setting, message)
    match message:
        case Bytes():
            return f"{said}: damaged on the wire"
        case Abort() | OfferAnswer():
            return f"{said}: lost"
    return f"{said}: no answer in time, the caller gives up"
