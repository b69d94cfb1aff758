"""Putting a completion together: any interleaving of two ordered streams, with repetitions, gives the same tokens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_fakes import failure, tokens

from pdserve.proto.errors import InternalError, Overloaded, Unavailable, WorkerLost
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


FIRST = Phases(transfer_wait_s=0.5, transfer_s=0.25, decode_queue_s=0.125, transferred_tokens=3)
LAST = Phases(transfer_wait_s=0.5, transfer_s=0.25, decode_queue_s=0.125, decode_s=4.0, transferred_tokens=3)


def test_a_workers_later_word_on_its_phases_replaces_the_earlier_one() -> None:
    completion = split()
    completion.accept("p", event(0, 0, phases=Phases(prefill_queue_s=1.0, prefill_s=2.0)))
    completion.accept("d", event(1, 1, phases=FIRST))
    completion.accept("d", event(2, 2))
    completion.accept("d", event(3, 3, phases=LAST, finish_reason=FinishReason.LENGTH))
    assert completion.phases.transferred_tokens == 3
    assert completion.stages_s(99.0) == {
        "queue": 1.0,
        "prefill": 2.0,
        "transfer_wait": 0.5,
        "transfer": 0.25,
        "decode_queue": 0.125,
        "decode": 4.0,
    }


def test_before_the_decode_workers_last_word_its_decoding_is_what_was_measured() -> None:
    completion = split()
    completion.accept("p", event(0, 0, phases=Phases(prefill_s=2.0)))
    completion.accept("d", event(1, 1, phases=FIRST))
    completion.accept("d", event(2, 2))
    assert completion.phases.transferred_tokens == 3
    assert completion.stages_s(7.0)["decode"] == 7.0
    assert completion.stages_s(7.0)["transfer"] == 0.25


def test_a_stage_that_nobody_told_of_or_that_it_never_went_through_is_not_there() -> None:
    assert split().stages_s(1.0) == {}
    only_first = split()
    only_first.accept("p", event(0, 0, phases=Phases(prefill_s=2.0), finish_reason=FinishReason.STOP))
    assert set(only_first.stages_s(1.0)) == {"queue", "prefill"}
    silent = split()
    silent.accept("d", event(1, 1))
    assert silent.stages_s(1.0) == {"decode": 1.0}
    mixed = Completion("m", "m", 10)
    mixed.accept("m", event(0, 0, 1, phases=Phases(prefill_s=2.0, decode_s=3.0), finish_reason=FinishReason.STOP))
    assert mixed.stages_s(1.0) == {"queue": 0.0, "prefill": 2.0, "decode": 3.0}


@pytest.mark.parametrize("kind", ["StaleReference", "LayoutMismatch", "WrongRole"])
def test_what_workers_refuse_each_other_is_no_fault_of_the_client(kind: str) -> None:
    completion = split()
    completion.accept("d", failure(ID, 1, kind, "is not expected here"))
    assert type(completion.error) is Unavailable
    assert completion.error.message == "worker d refused: is not expected here"


def test_a_duplicate_between_workers_is_our_own_bug() -> None:
    completion = split()
    completion.accept("d", failure(ID, 1, "DuplicateRequest"))
    assert isinstance(completion.error, InternalError)
