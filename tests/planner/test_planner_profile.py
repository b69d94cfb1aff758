"""The profile file: what it holds, what it refuses, and that a fit's errors can be read off it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from pdserve.cluster.planner.profile import describe_fit, dump, load
from pdserve.proto.errors import ConfigError


def tree() -> dict[str, Any]:
    """A profile with two regions each, as the JSON of its file."""
    return {
        "format": 1,
        "name": "tiny on a CPU",
        "model": "tiny",
        "hardware": "2 cores",
        "tensor_parallel_size": 1,
        "source": "measured",
        "origin": "timed by hand",
        "num_gpus": 0,
        "kv_bytes_per_token": 1024,
        "kv_capacity_tokens": 8192,
        "max_model_len": 2048,
        "prefill": [
            prefill(128, fixed_s=0.01, num_samples=40, median_error=0.02, p95_error=0.05),
            prefill(None, fixed_s=-0.001, num_samples=12),
        ],
        "decode": [decode(8, num_samples=9, median_error=0.01, p95_error=0.02), decode(None)],
        "decode_bend": {"above_context_tokens": 2000, "extra_s_per_token": 4e-06},
        "mixed": {"overlap": 0.4, "extra_s": 0.001, "num_samples": 5, "median_error": 0.03, "p95_error": 0.06},
        "domain": {
            "chunk_tokens": {"smallest": 1, "largest": 512},
            "context_tokens": {"smallest": 0.5, "largest": 1800},
            "decode_batch": {"smallest": 1, "largest": 16},
            "decode_context_tokens": {"smallest": 1, "largest": 8000},
        },
        "links": {"shm": {"latency_s": 0.001, "bandwidth_bytes_per_s": 1e9}},
        "overheads": {"tokenize_s_per_token": 1e-6, "request_s": 0.002, "handoff_s": 0.001, "token_s": 0.0003},
        "contention": {
            "prefill": {"beside_prefill": 0.05, "beside_decode": 0.1},
            "decode": {"beside_prefill": 0.2, "beside_decode": 0.4},
        },
        "startup_s": 9.5,
        "flip_s": 0.01,
        "power": {"idle_w": None, "prefill_w": 60.0, "decode_w": 40.0},
        "price_per_gpu_hour": None,
    }


UNKNOWN = {"num_samples": 0, "median_error": None, "p95_error": None}


def prefill(upto: int | None, **fields: Any) -> dict[str, Any]:
    return {"upto_tokens": upto, "fixed_s": 0.01, "per_token_s": 1e-4, "per_pair_s": 1e-8} | UNKNOWN | fields


def decode(upto: int | None, **fields: Any) -> dict[str, Any]:
    return {"upto_batch": upto, "fixed_s": 0.02, "per_sequence_s": 1e-4, "per_context_token_s": 1e-8} | UNKNOWN | fields


def refusal(changed: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(json.dumps(changed), "tiny.json")
    return caught.value.message


def with_value(path: str, value: object) -> dict[str, Any]:
    """The tree with one value replaced or added; numbers in the path are positions."""
    changed = copy.deepcopy(tree())
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    node: Any = changed
    for part in parents:
        node = node[part]
    node[last] = value
    return changed


def test_a_profile_is_read_back_as_it_was_written() -> None:
    profile = load(json.dumps(tree()), "tiny.json")
    assert load(dump(profile), "copy") == profile
    assert json.loads(dump(profile)) == tree()


def test_what_a_file_may_leave_out_is_nothing_or_not_known() -> None:
    short = tree()
    for key in ("mixed", "overheads", "power", "price_per_gpu_hour", "tensor_parallel_size"):
        del short[key]
    profile = load(json.dumps(short), "tiny.json")
    assert (profile.mixed.overlap, profile.overheads.request_s, profile.power) == (0.0, 0.0, None)
    assert profile.tensor_parallel_size == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", "red", "tiny.json: colour: unknown key"),
        ("prefill.0.per_tokens_s", 1.0, "tiny.json: prefill.0.per_tokens_s: unknown key"),
        ("format", 2, "format: 2 is not known here; this version reads format 1"),
        ("source", "guessed", "tiny.json: source: Input should be 'measured', 'fitted' or 'predicted'"),
        ("kv_capacity_tokens", 0, "tiny.json: kv_capacity_tokens: "),
        ("kv_capacity_tokens", "many", "tiny.json: kv_capacity_tokens: "),
        ("prefill.1.per_pair_s", -1e-9, "tiny.json: prefill.1.per_pair_s: "),
        ("prefill.1.per_pair_s", float("nan"), "tiny.json: "),
        ("startup_s", float("inf"), "tiny.json: "),
        ("mixed.overlap", 1.5, "tiny.json: mixed.overlap: "),
        ("links.shm.bandwidth_bytes_per_s", 0, "tiny.json: links.shm.bandwidth_bytes_per_s: "),
        ("domain.decode_batch.smallest", 20, "tiny.json: domain.decode_batch: smallest 20 is above largest 16"),
        ("decode", [], "tiny.json: decode: "),
        ("decode", [decode(8), decode(8), decode(None)], "decode.1: its upper bound 8 is not above"),
        ("decode", [decode(8)], "decode.0: only the last region has no upper bound"),
        ("decode", [decode(None), decode(None)], "decode.0: only the last region has no upper bound"),
        ("prefill.0.fixed_s", -1e-6, "prefill.0.fixed_s: -1e-06 is negative in the first region"),
        ("decode.0", decode(8, fixed_s=0, per_sequence_s=0), "decode.0: a step of one token takes no time"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(path: str, value: object, message: str) -> None:
    found = refusal(with_value(path, value))
    assert message in found
    assert found.startswith("tiny.json: ")


def test_a_missing_field_is_named() -> None:
    short = tree()
    del short["domain"]["decode_batch"]
    assert refusal(short) == "tiny.json: domain.decode_batch: Field required"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "x" * (1 << 21)])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^tiny\.json: "):
        load(text, "tiny.json")


def test_each_region_tells_how_well_it_fits() -> None:
    assert describe_fit(load(json.dumps(tree()), "tiny.json")) == (
        "prefill, 1 to 128 tokens: error 2.0% median, 5.0% p95 (40 samples)",
        "prefill, above 128 tokens: error not known (12 samples)",
        "decode, 1 to 8 sequences: error 1.0% median, 2.0% p95 (9 samples)",
        "decode, above 8 sequences: error not known (0 samples)",
        "decode, beyond 2,000 tokens of context in a step: 4 us more for each",
        "mixed, overlap 0.40: error 3.0% median, 6.0% p95 (5 samples)",
        "prefill steps beside workers that prefill +5%, that decode +10%",
        "decode steps beside workers that prefill +20%, that decode +40%",
    )
