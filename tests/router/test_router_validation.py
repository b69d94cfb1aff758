"""Every field of a request: what passes, what is refused, and that refusals name the field and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.proto import inference_pb2 as pb
from pdserve.proto.errors import InvalidRequest, NotFound
from pdserve.proto.types import SamplingParams
from pdserve.router.config import RouterConfig
from pdserve.router.validation import ModelLimits, check_request, sampling_params, stop_options

LIMITS = ModelLimits("model", 400, 1000, (1, 3), has_tokenizer=True)
CONFIG = RouterConfig()
NAN, INF = float("nan"), float("inf")


def request(
    sampling: dict[str, Any] | None = None, stopping: dict[str, Any] | None = None, **rest: Any
) -> pb.GenerateRequest:
    fields: dict[str, Any] = {"token_ids": pb.TokenIds(ids=[5, 6, 7]), **rest}
    return pb.GenerateRequest(
        sampling=pb.SamplingOptions(**(sampling or {})), stopping=pb.StoppingOptions(**(stopping or {})), **fields
    )


def check(message: pb.GenerateRequest, limits: ModelLimits = LIMITS) -> SamplingParams:
    check_request(message, limits, CONFIG)
    stop_options(message.stopping, CONFIG)
    return sampling_params(message, 3, limits, CONFIG, lambda: 77)


BAD_SAMPLING = [
    ("temperature", -0.1), ("temperature", NAN), ("temperature", INF), ("temperature", 1e32),
    ("top_k", -1), ("top_k", -2), ("top_k", 1 << 31), ("top_k", 1 << 62),
    ("top_p", 0.0), ("top_p", -0.5), ("top_p", 1.01), ("top_p", NAN), ("top_p", INF),
    ("min_p", -0.1), ("min_p", 1.5), ("min_p", NAN),
    ("repetition_penalty", 0.0), ("repetition_penalty", 1e-30), ("repetition_penalty", -1.0),
    ("repetition_penalty", 1e30),
    ("repetition_penalty", NAN),
    ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("presence_penalty", NAN),
    ("frequency_penalty", 3.0), ("frequency_penalty", -INF),
    ("seed", -1), ("seed", -(1 << 63)),
    ("logit_bias", {400: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {1 << 40: 1.0}),
    ("logit_bias", {5: NAN}), ("logit_bias", {5: INF}), ("logit_bias", {5: -101.0}),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
]  # fmt: skip

BAD_STOPPING = [
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 998), ("max_tokens", (1 << 31) - 1), ("max_tokens", 1 << 40),
    ("min_tokens", -1), ("min_tokens", 998),
    ("stop", [""]), ("stop", ["x" * 129]), ("stop", ["x"] * 17),
    ("stop_token_ids", [400]), ("stop_token_ids", [5, -1]), ("stop_token_ids", [1 << 40]),
    ("stop_token_ids", [5] * 129),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_SAMPLING)
def test_a_sampling_field_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check(request(sampling={name: value}))
    assert raised.value.field == f"sampling.{name}"


@pytest.mark.parametrize(("name", "value"), BAD_STOPPING)
def test_a_stopping_field_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check(request(stopping={name: value}))
    assert raised.value.field.split("[")[0] == f"stopping.{name}"


BAD_REQUESTS = [
    ({"token_ids": pb.TokenIds()}, "token_ids"),
    ({"token_ids": pb.TokenIds(ids=[5, 6, 7, 400])}, "token_ids[3]"),
    ({"token_ids": pb.TokenIds(ids=[-1])}, "token_ids[0]"),
    ({"token_ids": pb.TokenIds(ids=[1 << 31])}, "token_ids[0]"),
    ({"token_ids": pb.TokenIds(ids=[5] * 1000)}, "token_ids"),
    ({"prompt": "x" * ((1 << 20) + 1)}, "prompt"),
    ({"chat": pb.ChatMessages()}, "chat.messages"),
    ({"chat": pb.ChatMessages(messages=[pb.ChatMessage(content="x")])}, "chat.messages[0].role"),
    ({"chat": pb.ChatMessages(messages=[pb.ChatMessage(role="us\ner", content="x")])}, "chat.messages[0].role"),
    ({"chat": pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")] * 1025)}, "chat.messages"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"request_id": "a\x00b"}, "request_id"),
    ({"request_id": "a\nb"}, "request_id"),
    ({"request_id": "a\u202eb"}, "request_id"),
    ({"response": pb.ResponseOptions(logprobs=21)}, "response.logprobs"),
    ({"response": pb.ResponseOptions(logprobs=-1)}, "response.logprobs"),
]


@pytest.mark.parametrize(("fields", "field"), BAD_REQUESTS)
def test_a_request_field_out_of_range_is_named(fields: dict[str, Any], field: str) -> None:
    if {"prompt", "chat"} & set(fields):
        fields = {"token_ids": None, **fields}
    with pytest.raises(InvalidRequest) as raised:
        check(request(**fields))
    assert raised.value.field == field


def test_an_empty_message_lacks_an_input() -> None:
    with pytest.raises(InvalidRequest) as raised:
        check(pb.GenerateRequest())
    assert raised.value.field == "input"


def test_refusals_never_repeat_what_the_client_sent() -> None:
    secret = "hunter2"
    with pytest.raises(InvalidRequest) as raised:
        check(request(request_id=secret * 30))
    assert secret not in raised.value.message
    with pytest.raises(NotFound) as missing:
        check(request(model=secret))
    assert secret not in missing.value.message


def test_an_empty_request_gets_the_documented_defaults() -> None:
    params = check(request())
    assert params == SamplingParams(max_tokens=997, seed=77, stop_token_ids=(1, 3))


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1.0, 1e30])
def test_extreme_temperatures_are_taken_as_they_are(temperature: float) -> None:
    assert check(request(sampling={"temperature": temperature})).temperature == pytest.approx(temperature)


def test_values_on_the_edge_pass_through() -> None:
    sampling = {
        "top_k": 401, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": 100.0, "presence_penalty": -2.0,
        "frequency_penalty": 2.0, "seed": (1 << 63) - 1, "logit_bias": {399: -100.0, 0: 100.0},
    }  # fmt: skip
    stopping = {"max_tokens": 997, "min_tokens": 997, "stop_token_ids": [399, 0]}
    params = check(request(sampling, stopping, response=pb.ResponseOptions(logprobs=20)))
    assert params.top_k == 400
    assert params.seed == (1 << 63) - 1
    assert params.logit_bias == ((0, 100.0), (399, -100.0))
    assert params.stop_token_ids == (0, 1, 3, 399)
    assert (params.max_tokens, params.min_tokens, params.logprobs) == (997, 997, 20)


def test_an_explicit_zero_is_not_an_absent_field() -> None:
    params = check(request({"temperature": 0.0, "seed": 0}, response=pb.ResponseOptions(logprobs=0)))
    assert (params.temperature, params.seed, params.logprobs) == (0.0, 0, 0)


def test_ignoring_the_end_of_sequence_leaves_the_clients_own_stops() -> None:
    assert check(request(stopping={"ignore_eos": True, "stop_token_ids": [9]})).stop_token_ids == (9,)


def test_without_a_tokenizer_text_is_refused_and_ids_are_not() -> None:
    bare = ModelLimits("model", 400, 1000, (1,), has_tokenizer=False)
    check(request(), bare)
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")])
    refused: list[tuple[dict[str, Any], str]] = [({"prompt": "x"}, "prompt"), ({"chat": chat}, "chat")]
    for fields, field in refused:
        with pytest.raises(InvalidRequest) as raised:
            check(request(**{"token_ids": None, **fields}), bare)
        assert raised.value.field == field
        assert "token_ids" in raised.value.message
    with pytest.raises(InvalidRequest) as raised:
        check(request(stopping={"stop": ["x"]}), bare)
    assert raised.value.field == "stopping.stop"
