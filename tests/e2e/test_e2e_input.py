"""Bad input gets the right status and a field's name; no process restarts, nothing leaks, the next request is right."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from families import random_prompt, reference_generate
from harness import Cluster, running

from pdserve.client import AsyncClient, Client
from pdserve.proto import inference_pb2 as pb
from pdserve.proto import inference_pb2_grpc as pb_grpc

pytestmark = pytest.mark.cluster

INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
NAN, INF = float("nan"), float("inf")
ONE = pb.TokenIds(ids=[5])


def sampling(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=ONE, sampling=pb.SamplingOptions(**fields))


def stopping(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=ONE, stopping=pb.StoppingOptions(**fields))


BAD: tuple[tuple[str, pb.GenerateRequest], ...] = (
    ("sampling.temperature", sampling(temperature=-0.1)),
    ("sampling.temperature", sampling(temperature=NAN)),
    ("sampling.top_k", sampling(top_k=-2)),
    ("sampling.top_p", sampling(top_p=1.5)),
    ("sampling.min_p", sampling(min_p=-0.5)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=0.0)),
    ("sampling.presence_penalty", sampling(presence_penalty=INF)),
    ("sampling.frequency_penalty", sampling(frequency_penalty=NAN)),
    ("sampling.seed", sampling(seed=-1)),
    ("sampling.logit_bias", sampling(logit_bias={512: 1.0})),
    ("sampling.logit_bias", sampling(logit_bias={-1: 1.0})),
    ("stopping.max_tokens", stopping(max_tokens=0)),
    ("stopping.max_tokens", stopping(max_tokens=2**40)),
    ("stopping.min_tokens", stopping(min_tokens=9, max_tokens=8)),
    ("stopping.stop_token_ids", stopping(stop_token_ids=[512])),
    ("stopping.stop", stopping(stop=["x"])),  # this model has no tokenizer
    ("response.logprobs", pb.GenerateRequest(token_ids=ONE, response=pb.ResponseOptions(logprobs=10**6))),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[]))),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[512]))),
    ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1]))),
    ("prompt", pb.GenerateRequest(prompt="text without a tokenizer")),
    ("", pb.GenerateRequest()),
    ("", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 513))),
)


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str], family_dir: Any) -> Iterator[Cluster]:
    with running(environment, family_dir("llama"), "engine.num_blocks=128") as started:
        yield started


def test_every_bad_field_is_refused_by_name_and_nothing_is_harmed(cluster: Cluster, family_dir: Any) -> None:
    before = [(one["worker_id"], one["generation"], one["pid"]) for one in cluster.status()["workers"]]
    with grpc.insecure_channel(cluster.endpoint) as channel:
        stub = pb_grpc.InferenceStub(channel)
        for field, request in BAD:
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(request, timeout=10))
            code, details = caught.value.code(), caught.value.details() or ""
            assert code is INVALID, f"{field}: {code}: {details}"
            assert field in details, f"{field} is not named by: {details}"
    after = [(one["worker_id"], one["generation"], one["pid"]) for one in cluster.status()["workers"]]
    assert after == before, "a worker was restarted"
    prompt = random_prompt(33)
    with Client(cluster.endpoint) as client:
        completion = client.generate(prompt, max_tokens=32, temperature=0.0, ignore_eos=True)
    assert completion.token_ids == reference_generate(family_dir("llama"), prompt, 32).token_ids
    cluster.assert_drained()


def test_invalid_utf8_is_an_invalid_argument(cluster: Cluster) -> None:
    raw = pb.GenerateRequest(prompt="ab").SerializeToString().replace(b"ab", b"\xff\xfe")
    with grpc.insecure_channel(cluster.endpoint) as channel:
        call: Any = channel.unary_stream(
            "/pdserve.v1.Inference/Generate",
            request_serializer=None,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call(raw, timeout=10))
    assert caught.value.code() is INVALID


def test_seeded_sampling_does_not_depend_on_company_or_on_preemption(
    cluster: Cluster, environment: dict[str, str], family_dir: Any
) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
    prompts = [random_prompt(20 + number, number) for number in range(10)]
    with Client(cluster.endpoint) as client:
        alone = [client.generate(prompt, seed=number, **options) for number, prompt in enumerate(prompts)]
    batched = generate_at_once(cluster.endpoint, prompts, options)
    tight = ("decode.engine.num_blocks=16", "decode.engine.max_num_seqs=8", "engine.num_blocks=64")
    with running(environment, family_dir("llama"), *tight) as small:
        preempted = generate_at_once(small.endpoint, prompts, options)
        assert small.loads()["decode-0"]["num_preemptions"] > 0, "nothing was preempted: the case is vacuous"
        small.assert_drained()
    assert [one.token_ids for one in batched] == [one.token_ids for one in alone]
    assert [one.token_ids for one in preempted] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in alone}) == len(prompts)


def generate_at_once(endpoint: str, prompts: list[tuple[int, ...]], options: dict[str, Any]) -> list[Any]:
    """All prompts at once, seeded by their number."""

    async def everything() -> list[Any]:
        async with AsyncClient(endpoint) as client:
            work = (client.generate(prompt, seed=number, **options) for number, prompt in enumerate(prompts))
            return await asyncio.gather(*work)

    return asyncio.run(everything())
