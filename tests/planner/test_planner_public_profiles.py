"""Public measurements, fits and predictions become profiles that say what they are and how well they fit.

The folder with the original files is taken from PDSERVE_TRACES. Without it, small stand-ins of the same formats are
made from known costs; the bounds on errors hold for both.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pdserve.cluster.planner.profile import FitError, Profile, dump, load
from pdserve.cluster.planner.public_distserve import BATCH_SIZES, INPUT_LENGTHS
from pdserve.cluster.planner.public_facts import MODELS, Conversion, Kind
from pdserve.cluster.planner.public_profiles import convert
from pdserve.cluster.planner.step_model import StepModel, excesses
from pdserve.cluster.planner.step_shape import StepShape, chunk_pairs
from pdserve.proto.errors import ConfigError

FOLDER = os.environ.get("PDSERVE_TRACES")
SPLITWISE = "splitwise_sim_perf_model.csv.gz"
DISTSERVE = "distserve_profiler-a100-80g.distserve.json"
DISTSERVE_VLLM = "distserve_profiler-a100-80g.vllm.json"
AICONFIGURATOR = "aic_0.12.0_h200_sxm_vllm_bf16_tp1_predictions.csv"

SPLITWISE_HEADER = (
    "model,hardware,prompt_size,batch_size,token_size,peak_power,average_power,prompt_time,token_time,e2e_time,"
    "tensor_parallel"
)


def prefill_ms(batch: int, tokens: int) -> float:
    return 30.0 + 0.12 * batch * tokens + 2e-6 * batch * tokens**2


def decode_ms(batch: int, context_tokens: float) -> float:
    return 35.0 + 0.3 * batch + 2e-4 * batch * context_tokens


def splitwise_row(
    batch: int,
    prompt: int,
    output: int,
    *,
    random: np.random.Generator,
    stopped_after: int | None = None,
    hardware: str = "a100-80gb",
    watts: tuple[float, float] = (1.0, 0.6),
) -> str:
    num_steps = stopped_after or output - 1
    prompt_time = prefill_ms(batch, prompt) * random.lognormal(0, 0.02)
    token_time = decode_ms(batch, prompt + num_steps / 2) * random.lognormal(0, 0.02)
    total = prompt_time + num_steps * token_time
    return f"llama2-70b,{hardware},{prompt},{batch},{output},{watts[0]},{watts[1]},{prompt_time},{token_time},{total},4"


def splitwise_text(hardware: str = "a100-80gb", watts: tuple[float, float] = (1.0, 0.6)) -> str:
    random = np.random.default_rng(0)
    runs = [(1, prompt, 128) for prompt in (128, 256, 512, 1024, 2048, 4096, 8192)]
    runs += [(batch, 512, 128) for batch in (2, 4, 8, 16, 32, 64)]
    rows = [splitwise_row(*run, random=random, hardware=hardware, watts=watts) for run in runs for _ in range(5)]
    return "\n".join([SPLITWISE_HEADER, *rows])


def distserve_entry(**changes: object) -> dict[str, object]:
    return {
        "decoding_large_small_bs_threshold": 95,
        "prefill": [18.0, 0.1, 7e-6],
        "decoding_smallbs": [20.0, 6e-4, 0.04],
        "decoding_largebs": [7.0, 5.8e-4, 0.16],
    } | changes


def aiconfigurator_text() -> str:
    rows = ["model,phase,batch_size,context_or_isl_tokens,predicted_ms"]
    for batch in (1, 4):
        rows += [f"Qwen/Qwen3-8B,prefill,{batch},{n},{prefill_ms(batch, n)}" for n in (128, 512, 1024, 4096, 8192)]
    for batch in (1, 2, 8, 32, 128, 256):
        rows += [f"Qwen/Qwen3-8B,decode,{batch},{n},{decode_ms(batch, n)}" for n in (256, 1024, 4096)]
    return "\n".join(rows)


STAND_INS = {
    SPLITWISE: splitwise_text,
    DISTSERVE: lambda: json.dumps({"facebook/opt-13b": {"1": distserve_entry()}}),
    DISTSERVE_VLLM: lambda: json.dumps({"facebook/opt-66b": {"2": distserve_entry(prefill=[58.0, 0.38, -7e-6])}}),
    AICONFIGURATOR: aiconfigurator_text,
}


def text_of(name: str) -> str:
    """The original's text, or that of its stand-in."""
    if FOLDER is None:
        return STAND_INS[name]()
    content = (Path(FOLDER) / name).read_bytes()
    return (gzip.decompress(content) if name.endswith(".gz") else content).decode()


@functools.cache
def conversions(name: str) -> tuple[Conversion, ...]:
    return convert(text_of(name), name)


def medians(regions: Sequence[FitError]) -> list[float]:
    return [region.median_error for region in regions if region.median_error is not None]


@pytest.mark.parametrize("name", STAND_INS)
def test_every_profile_of_a_public_file_can_be_written_and_read(name: str) -> None:
    profiles = [conversion.profile for conversion in conversions(name)]
    assert profiles
    assert len({profile.name for profile in profiles}) == len(profiles)
    for profile in profiles:
        assert load(dump(profile), "copy") == profile
        assert profile.num_gpus == profile.tensor_parallel_size
        assert profile.kv_capacity_tokens > profile.max_model_len or "opt-66b" in profile.name
        assert "Assumed, not measured" in profile.origin


@pytest.mark.parametrize(
    ("name", "source"), [(DISTSERVE, "fitted"), (DISTSERVE_VLLM, "fitted"), (AICONFIGURATOR, "predicted")]
)
def test_a_profile_is_labelled_by_where_its_times_come_from(name: str, source: str) -> None:
    assert {conversion.profile.source for conversion in conversions(name)} == {source}


def test_splitwise_is_measured_but_for_the_capped_gpu_whose_times_were_derived() -> None:
    sources = {conversion.profile.hardware: conversion.profile.source for conversion in conversions(SPLITWISE)}
    assert sources["a100-80gb"] == "measured"
    assert sources.get("h100-80gb-pcap", "predicted") == "predicted"


@pytest.mark.parametrize(
    ("name", "prefill_bound", "decode_bound"), [(SPLITWISE, 0.16, 0.06), (AICONFIGURATOR, 0.04, 0.05)]
)
def test_the_median_error_of_every_region_stays_within_what_was_reached(
    name: str, prefill_bound: float, decode_bound: float
) -> None:
    for conversion in conversions(name):
        profile = conversion.profile
        prefill, decode = medians(profile.prefill), medians(profile.decode)
        assert len(prefill) == len(profile.prefill), profile.name
        assert len(decode) == len(profile.decode), profile.name
        assert max(prefill) < prefill_bound, profile.name
        assert max(decode) < decode_bound, profile.name


@pytest.mark.parametrize(("name", "bound"), [(SPLITWISE, 0.05), (AICONFIGURATOR, 0.025)])
def test_over_all_regions_the_median_error_is_a_few_percent(name: str, bound: float) -> None:
    profiles = [conversion.profile for conversion in conversions(name)]
    assert statistics.median(medians([region for p in profiles for region in (*p.prefill, *p.decode)])) < bound


@pytest.mark.parametrize("name", [DISTSERVE, DISTSERVE_VLLM])
def test_distserve_profiles_agree_with_the_published_formulas(name: str) -> None:
    tree = json.loads(text_of(name))
    for conversion in conversions(name):
        profile = conversion.profile
        entry = tree[profile.model][str(profile.tensor_parallel_size)]
        model = StepModel(profile)
        for batch in BATCH_SIZES:
            for length in INPUT_LENGTHS:
                prefill = StepShape(batch * length, batch * chunk_pairs(length, 0), 0, 0)
                decode = StepShape(0, 0.0, batch, batch * length)
                if excesses(profile.domain, prefill) or excesses(profile.domain, decode):
                    continue
                assert model.duration_s(prefill) == pytest.approx(published_prefill_s(entry, batch, length), rel=0.05)
                # The published decode formula falls where large batches begin; a profile's time never does.
                assert model.duration_s(decode) == pytest.approx(published_decode_s(entry, batch, length), rel=0.15)
                if batch <= 95:
                    assert model.duration_s(decode) == pytest.approx(published_decode_s(entry, batch, length))


def published_prefill_s(entry: dict[str, list[float]], batch: int, length: int) -> float:
    fixed, per_token, per_square = entry["prefill"]
    return (fixed + per_token * batch * length + per_square * batch * length**2) / 1e3


def published_decode_s(entry: dict[str, list[float]], batch: int, length: int) -> float:
    fixed, per_context, per_sequence = entry["decoding_smallbs" if batch <= 95 else "decoding_largebs"]
    return (fixed + per_context * batch * length + per_sequence * batch) / 1e3


@pytest.mark.parametrize("name", [DISTSERVE, DISTSERVE_VLLM])
def test_errors_that_nobody_published_are_not_made_up(name: str) -> None:
    for conversion in conversions(name):
        regions = (*conversion.profile.prefill, *conversion.profile.decode)
        assert [(region.num_samples, region.median_error) for region in regions] == [(0, None)] * len(regions)
        assert any("within" in note for note in conversion.notes)


def test_a_negative_coefficient_is_fitted_anew_and_told() -> None:
    broken = {"facebook/opt-66b": {"2": distserve_entry(prefill=[58.0, 0.38, -7e-6])}}
    (conversion,) = convert(json.dumps(broken), "x.vllm.json")
    assert conversion.profile.name == "opt-66b-a100-80gb-tp2-vllm"
    assert conversion.notes[0].startswith("prefill: coefficients refitted, one being negative; within ")


def test_known_costs_come_back_from_a_table_of_runs() -> None:
    (conversion,) = convert(splitwise_text(), "runs.csv")
    model = StepModel(conversion.profile)
    assert model.duration_s(StepShape(2048, chunk_pairs(2048, 0), 0, 0)) == pytest.approx(
        prefill_ms(1, 2048) / 1e3, rel=0.03
    )
    assert model.duration_s(StepShape(0, 0.0, 16, 16 * 576)) == pytest.approx(decode_ms(16, 576) / 1e3, rel=0.03)


def test_a_batch_that_did_not_run_as_one_is_left_out_and_told() -> None:
    stuck = "llama2-70b,a100-80gb,512,128,128,0,0,790.0,67.0,159000.0,4"
    (conversion,) = convert(splitwise_text() + "\n" + stuck, "runs.csv")
    assert "left out: batch 128 of 512 tokens did not run as one batch" in conversion.notes
    assert conversion.profile.domain.decode_batch.largest == 64


def test_a_run_that_stopped_early_counts_with_the_context_it_reached() -> None:
    random = np.random.default_rng(1)
    early = [splitwise_row(1, 512, 8192, random=random, stopped_after=200) for _ in range(5)]
    (conversion,) = convert("\n".join([splitwise_text(), *early]), "runs.csv")
    # Half-way through 8,191 steps the context would be 4,607; the longest that was reached is that of 64 sequences.
    (profile,) = (conversion.profile,)
    assert profile.domain.decode_context_tokens.largest == pytest.approx(64 * (512 + 127 / 2), rel=0.01)


def test_power_is_a_share_of_the_tdp_and_not_made_up_where_the_table_has_none() -> None:
    (measured,) = convert(splitwise_text(watts=(0.9, 0.5)), "runs.csv")
    (capped,) = convert(splitwise_text(hardware="h100-80gb-pcap", watts=(0.0, 0.0)), "runs.csv")
    assert measured.profile.power is not None
    assert measured.profile.power.prefill_w == pytest.approx(4 * 0.9 * 400)
    assert measured.profile.power.decode_w == pytest.approx(4 * 0.5 * 400)
    assert capped.profile.power is None


def test_the_limits_of_a_model_and_a_gpu_are_those_that_are_public() -> None:
    # DistServe's paper: the KV of 512 tokens of OPT-66B is 1.13 GB.
    assert 512 * MODELS["facebook/opt-66b"].kv_bytes_per_token / 2**30 == pytest.approx(1.13, abs=0.01)
    # And its profiler found room for 66,144 tokens beside OPT-13B on one A100.
    assert Kind("facebook/opt-13b", "a100-80gb", 1, "x").kv_capacity_tokens == pytest.approx(66_144, rel=0.1)


def test_every_gpu_of_a_worker_adds_its_link() -> None:
    (conversion,) = convert(splitwise_text(), "runs.csv")
    links = conversion.profile.links
    assert links["cuda_ipc"].bandwidth_bytes_per_s == 4 * 300e9
    assert links["nccl"].bandwidth_bytes_per_s == 4 * 25e9


def with_cell(text: str, row: int, column: int, value: str) -> str:
    lines = [line.split(",") for line in text.splitlines()]
    lines[row][column] = value
    return "\n".join(",".join(line) for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is none of the known public formats"),
        ("a,b\n1,2", "is none of the known public formats"),
        (SPLITWISE_HEADER, "x: holds no rows"),
        (with_cell(splitwise_text(), 3, 7, "fast"), "x: line 4: prompt_time: 'fast' is not a number"),
        (with_cell(splitwise_text(), 3, 7, "nan"), "x: line 4: prompt_time: 'nan' is not a number"),
        (with_cell(splitwise_text(), 3, 8, "0"), "x: line 4: token_time: '0' is not a time in milliseconds"),
        (with_cell(splitwise_text(), 3, 3, "1.5"), "x: line 4: batch_size: '1.5' is not a whole number above 0"),
        (with_cell(splitwise_text(), 3, 0, "gpt"), "x: model 'gpt' is not known here; known: llama2-70b, "),
        (with_cell(splitwise_text(), 3, 1, "abacus"), "x: hardware 'abacus' is not known here; known: a100-80gb, "),
        (splitwise_text() + "\nllama2-70b,a100-80gb", "does not have the 11 columns of the header"),
        (with_cell(aiconfigurator_text(), 2, 1, "idle"), "x: line 3: phase: 'idle' is neither prefill nor decode"),
        ("{", "x: is not JSON"),
        ("{}", "x: expected keys and values"),
        ('{"facebook/opt-13b": 1}', "x: facebook/opt-13b: expected keys and values"),
        ('{"facebook/opt-13b": {"one": {"a": 1}}}', "'one' is not a tensor-parallel degree"),
        ('{"facebook/opt-13b": {"1": {"a": 1}}}', "opt-13b.1.decoding_large_small_bs_threshold: expected 1 numbers"),
        (
            json.dumps({"facebook/opt-13b": {"1": distserve_entry(prefill=[1, 2])}}),
            "opt-13b.1.prefill: expected 3 numbers",
        ),
        (
            json.dumps({"facebook/opt-13b": {"1": distserve_entry(prefill=[0, 0, 0])}}),
            "opt-13b.1: its prefill coefficients give steps that take no time",
        ),
        (
            json.dumps({"facebook/opt-13b": {"1": distserve_entry(decoding_large_small_bs_threshold=0.5)}}),
            "opt-13b.1.decoding_large_small_bs_threshold: 0.5 is no batch size",
        ),
        (json.dumps({"facebook/opt-66b": {"1": distserve_entry()}}), "the weights leave no memory for KV"),
    ],
)
def test_a_file_that_cannot_be_converted_is_refused_by_line_or_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(text, "x")
    assert message in caught.value.message
    assert caught.value.message.startswith("x: ")


def test_the_profile_says_itself_what_it_assumes() -> None:
    profile: Profile = conversions(AICONFIGURATOR)[0].profile
    assert "not measured" in profile.origin
    assert "no overlap in mixed steps" in profile.origin


def test_predictions_are_for_the_gpu_and_the_degree_in_the_files_name() -> None:
    (conversion,) = convert(aiconfigurator_text(), "aic_0.12.0_H100_sxm_vllm_bf16_tp2_predictions.csv")
    profile = conversion.profile
    assert (profile.hardware, profile.tensor_parallel_size, profile.num_gpus) == ("h100-80gb", 2, 2)
    assert "h100-80gb-tp2" in profile.name


@pytest.mark.parametrize(
    "name", ["predictions.csv", "aic_h200_sxm.csv", "aic_b200_sxm_tp1.csv", "aic_tp2.csv", "aic_h200_sxm_http1.csv"]
)
def test_predictions_for_nobody_knows_what_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="does not say of which GPU and tensor-parallel degree"):
        convert(aiconfigurator_text(), name)
