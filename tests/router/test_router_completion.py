"""Putting a completion together: any interleaving of two ordered streams, with repetitions, gives the same tokens."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from router_fakes import failure, tokens

from pdserve.proto.errors import InternalError, Overloaded, WorkerLost
from pdserve.proto.types import FinishReason, HandoffId, Phases, SequenceEvent
from pdserve.router.completion import Completion

ID = HandoffId("r", 0, 1)


def split() -> Completion:
    completion = Completion("p", "d", 1000)
    completion.holders.update(("p", "d"))
    return completion


def event(index: int, *ids: int, **rest: object) -> SequenceEvent:
    return SequenceEvent(ID, index, tokens(*ids), **rest)  # type: ignore[arg-type]


@given(st.data())
def test_any_interleaving_with_repetitions_gives_exact_indices(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(2, 20))
    cuts = sorted(data.draw(st.sets(st.integers(2, num_tokens - 1), max_size=5))) if num_tokens > 2 else []
    edges = [1, *cuts, num_tokens]
    decode = [
        event(start, *range(start, end), finish_reason=FinishReason.LENGTH if end == num_tokens else None)
        for start, end in itertools.pairwise(edges)
    ]
    place = data.draw(st.integers(0, len(decode)))
    schedule = [("d", each) for each in decode]
    schedule.insert(place, ("p", event(0, 0, phases=Phases(prefill_s=1.0))))
    completion, taken = split(), []
    for worker_id, each in schedule:
        for _ in range(data.draw(st.integers(1, 3))):
            completion.accept(worker_id, each)
        if data.draw(st.booleans()):
            taken += completion.take()
    taken += completion.take()
    assert completion.error is None
    assert completion.ending is not None
    assert [token.token_id for token in taken] == list(range(num_tokens))
    assert completion.phases.prefill_s == 1.0
    assert completion.holders == set()


def test_the_end_is_not_told_before_the_first_token_is_here() -> None:
    completion = split()
    completion.accept("d", event(1, 1, finish_reason=FinishReason.STOP))
    assert completion.take() == []
    assert completion.ending is None
    completion.accept("p", event(0, 0))
    assert [token.token_id for token in completion.take()] == [0, 1]
    assert completion.ending is not None


def test_a_gap_on_either_stream_is_our_bug() -> None:
    for worker_id, index in (("p", 1), ("d", 2)):
        completion = split()
        completion.accept(worker_id, event(index, 9))
        assert isinstance(completion.error, InternalError)
        assert completion.holders == {"p", "d"}


def test_a_prefill_worker_that_goes_on_after_its_first_token_is_our_bug() -> None:
    completion = split()
    completion.accept("p", event(0, 0, 1))
    assert isinstance(completion.error, InternalError)


def test_a_full_buffer_ends_the_request_and_stops_growing() -> None:
    completion = Completion("m", "m", 10)
    for index in range(100):
        completion.accept("m", event(index, index))
    assert isinstance(completion.error, Overloaded)
    assert len(completion.take()) == 11


def test_the_prefill_worker_matters_until_the_decode_worker_has_spoken() -> None:
    completion = split()
    completion.accept("p", event(0, 0))
    completion.lose("p", "gone")
    assert isinstance(completion.error, WorkerLost)
    survivor = split()
    survivor.accept("p", event(0, 0))
    survivor.accept("d", event(1, 1))
    survivor.lose("p", "gone")
    survivor.accept("p", failure(ID, 1, "TransferFailed"))
    assert survivor.error is None


def test_losing_the_prefill_worker_before_its_token_is_fatal_even_if_decode_has_spoken() -> None:
    completion = split()
    completion.accept("d", event(1, 1))
    completion.lose("p", "gone")
    assert isinstance(completion.error, WorkerLost)


def test_losing_the_decode_worker_after_its_last_word_is_harmless() -> None:
    completion = split()
    completion.accept("d", event(1, 1, finish_reason=FinishReason.LENGTH))
    completion.lose("d", "gone")
    completion.accept("p", event(0, 0))
    assert completion.error is None
    assert completion.ending is not None


def test_an_error_is_rebuilt_and_its_sender_holds_nothing_any_more() -> None:
    completion = split()
    completion.accept("d", failure(ID, 1, "Overloaded", "no room"))
    assert isinstance(completion.error, Overloaded)
    assert completion.holders == {"p"}


def test_another_workers_word_is_ignored() -> None:
    completion = split()
    completion.accept("x", event(5, 5))
    completion.lose("x", "gone")
    assert completion.error is None
