"""Arguments to messages: what is written, what is refused, and by which name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pdserve.client.request import GenerateOptions, checked_timeout, generate_request, tokenize_request
from pdserve.proto.errors import InvalidRequest


def test_text_ids_and_chat_each_fill_their_own_input() -> None:
    assert generate_request("hello", {}).prompt == "hello"
    assert list(generate_request([1, 2, 3], {}).token_ids.ids) == [1, 2, 3]
    chat = generate_request([{"role": "user", "content": "hi"}], {})
    assert chat.WhichOneof("input") == "chat"
    assert (chat.chat.messages[0].role, chat.chat.messages[0].content) == ("user", "hi")


def test_an_empty_text_is_still_a_text_input() -> None:
    assert generate_request("", {}).WhichOneof("input") == "prompt"
    assert tokenize_request("").WhichOneof("input") == "prompt"


def test_absent_options_stay_absent_and_zeros_are_present() -> None:
    message = generate_request("x", {"temperature": 0.0, "top_k": None, "seed": 0, "max_tokens": 0, "logprobs": 0})
    assert message.sampling.HasField("temperature")
    assert message.sampling.HasField("seed")
    assert message.stopping.HasField("max_tokens")
    assert message.response.HasField("logprobs")
    assert not message.sampling.HasField("top_k")
    assert not message.sampling.HasField("top_p")


def test_every_option_reaches_its_field() -> None:
    message = generate_request(
        "x",
        {
            "max_tokens": 5,
            "temperature": 0.5,
            "top_k": 4,
            "top_p": 0.75,
            "min_p": 0.25,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "logit_bias": {3: 1.5, -1: 2},
            "seed": 9,
            "stop": ["a", "b"],
            "stop_token_ids": [8],
            "ignore_eos": True,
            "min_tokens": 2,
            "logprobs": 3,
            "include_stop_str_in_output": True,
            "request_id": "me",
            "model": "m",
        },
    )
    sampling, stopping = message.sampling, message.stopping
    assert (message.request_id, message.model, message.response.logprobs) == ("me", "m", 3)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 4, 0.75, 0.25)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (dict(sampling.logit_bias), sampling.seed) == ({3: 1.5, -1: 2.0}, 9)
    assert (stopping.max_tokens, stopping.min_tokens, stopping.ignore_eos) == (5, 2, True)
    assert (list(stopping.stop), list(stopping.stop_token_ids)) == (["a", "b"], [8])
    assert stopping.include_stop_str_in_output


def test_one_stop_string_is_one_and_not_its_letters() -> None:
    assert list(generate_request("x", {"stop": "END"}).stopping.stop) == ["END"]


def test_numpy_token_ids_are_taken() -> None:
    token_ids: list[Any] = list(np.arange(3))
    assert list(generate_request(token_ids, {}).token_ids.ids) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": "12"}, "stop_token_ids"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"request_id": 7}, "request_id"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_name(options: GenerateOptions, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request("x", options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "prompt",
    [[], b"bytes", 7, None, ["a", "b"], [1, "b"], [1.5], [2**70], "\ud800", {"role": "user"}, [{"role": "user"}]],
)
def test_a_prompt_that_is_none_of_the_three_is_refused(prompt: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request(prompt, {})  # type: ignore[arg-type]
    assert caught.value.field.startswith("prompt")


def test_a_chat_error_names_the_message() -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request([{"role": "user", "content": "a"}, {"role": "user", "content": 3}], {})  # type: ignore
    assert caught.value.field == "prompt[1].content"


def test_an_unknown_option_is_a_type_error_as_for_any_function() -> None:
    with pytest.raises(TypeError, match="max_new_tokens"):
        generate_request("x", {"max_new_tokens": 3})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf, 1e12, "5"])
def test_a_deadline_is_a_sane_number_of_seconds(timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout_s"):
        checked_timeout(timeout_s, 10.0)


def test_no_timeout_means_the_clients_own() -> None:
    assert checked_timeout(None, 10.0) == 10.0
