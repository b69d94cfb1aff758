"""The streaming contract as the client checks it."""

from __future__ import annotations

from typing import Any

import pytest
from fake_inference import delta, finished

from pdserve.client.folding import CompletionFold
from pdserve.client.results import Completion
from pdserve.proto import inference_pb2 as pb
from pdserve.proto.errors import InternalError
from pdserve.proto.types import FinishReason, TokenInfo


def fold(*responses: pb.GenerateResponse) -> Completion:
    state = CompletionFold()
    for response in responses:
        state.add(response)
    return state.completion()


def test_deltas_add_up_to_the_completion() -> None:
    completion = fold(delta(0, 5, text="a"), delta(1, 6, 7), delta(3, text="bc"), finished(3))
    assert completion.token_ids == (5, 6, 7)
    assert completion.text == "abc"
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.usage.total_tokens == 6
    assert completion.timings.transfer_ms == 3
    assert (completion.prefill_worker, completion.decode_worker) == ("p0", "d0")
    assert completion.logprobs is None
    assert completion.stop_match is None


def test_a_completion_may_be_empty() -> None:
    assert fold(finished(0)).token_ids == ()


def test_each_delta_says_where_it_belongs() -> None:
    state = CompletionFold()
    deltas = [state.add(delta(0, 5, text="a")), state.add(delta(1, 6, 7)), state.add(delta(0, text="late"))]
    assert [(d.index, d.token_ids, d.text) for d in deltas if d] == [(0, (5,), "a"), (1, (6, 7), ""), (3, (), "late")]


@pytest.mark.parametrize(
    ("finish", "match"), [({"stop_text": "END"}, "END"), ({"stop_token_id": 0}, 0), ({"stop_text": ""}, "")]
)
def test_what_stopped_it_is_kept_even_when_it_is_zero_or_empty(finish: dict[str, Any], match: str | int) -> None:
    final = pb.GenerateResponse(request_id="r", finished=pb.Finished(reason=pb.FINISH_REASON_STOP, **finish))
    completion = fold(final)
    assert completion.stop_match == match
    assert completion.finish_reason is FinishReason.STOP


def test_logprobs_come_with_their_tokens() -> None:
    tokens = [pb.TokenInfo(token_id=4, logprob=-0.5, top=[pb.TopLogprob(token_id=4, logprob=-0.5)])]
    output = pb.GenerateResponse(request_id="r", output=pb.TokenOutput(index=0, tokens=tokens))
    assert fold(output, finished(1)).logprobs == (TokenInfo(4, -0.5, ((4, -0.5),)),)


@pytest.mark.parametrize(
    "responses",
    [
        pytest.param((delta(0, 1), delta(2, 3), finished(2)), id="gap"),
        pytest.param((delta(1, 1), finished(1)), id="first token missing"),
        pytest.param((delta(0, 1), delta(0, 1), finished(2)), id="repeated"),
        pytest.param((delta(0, 1),), id="no final event"),
        pytest.param((), id="nothing at all"),
        pytest.param((delta(0, 1), finished(3)), id="last tokens missing"),
        pytest.param((finished(0), finished(0)), id="two ends"),
        pytest.param((finished(0), delta(0, 1)), id="token after the end"),
        pytest.param((delta(0, 1), delta(1, 2, request_id="other")), id="another request's token"),
        pytest.param((pb.GenerateResponse(request_id="r"),), id="empty message"),
        pytest.param((finished(0, reason=0),), id="no reason"),
        pytest.param((finished(0, reason=99),), id="reason from the future"),
        pytest.param((None,), id="unreadable bytes"),
    ],
)
def test_a_server_that_breaks_the_contract_is_caught(responses: tuple[pb.GenerateResponse, ...]) -> None:
    with pytest.raises(InternalError, match="malformed answer"):
        fold(*responses)
