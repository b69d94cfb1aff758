"""Which set-ups `pdserve tune` may choose from."""

from __future__ import annotations

from typing import Any

import pytest
from planner_setups import make_profile

from pdserve.cluster.planner.capacity import Capacity, Lengths
from pdserve.cluster.planner.findings import Setup, Target
from pdserve.cluster.planner.fleets import Fleet, Limit, combinations, fleets_of, parse_split
from pdserve.cluster.planner.setup_config import config_of, deadline_s
from pdserve.cluster.planner.setups import Choices, clipped, key_of, neighbours, place_of, start, wanted, with_sizes
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role


def one_fleet(**changes: Any) -> Fleet:
    (fleet,) = fleets_of([make_profile(**changes)], {})
    return fleet


def names(fleet: Fleet, limit: Limit) -> list[str]:
    return [start(fleet, counts, Choices()).name for counts in combinations(fleet, limit)]


def setup_of(text: str, choices: Choices | None = None) -> Setup:
    return start(one_fleet(), parse_split(text), choices or Choices())


def test_every_way_to_share_out_the_gpus_is_there_once() -> None:
    assert names(one_fleet(), Limit(num_gpus=3)) == ["1P2D", "2P1D", "1P1D1M", "3M"]
    eight = names(one_fleet(), Limit(num_gpus=8))
    assert len(eight) == len(set(eight)) == 7 + 21 + 1


def test_workers_of_several_gpus_are_shared_out_whole() -> None:
    pairs = one_fleet(tensor_parallel_size=2, num_gpus=2)
    assert names(pairs, Limit(num_gpus=5)) == ["1P1D", "2M"]
    assert start(pairs, {Role.MIXED: 2}, Choices()).num_gpus == 4


def test_a_worker_without_gpus_counts_as_one() -> None:
    assert names(one_fleet(num_gpus=0), Limit(num_gpus=2)) == ["1P1D", "2M"]


def test_money_buys_as_many_workers_as_it_is_enough_for_whatever_they_cost() -> None:
    cheap, dear = make_profile(name="cheap", price_per_gpu_hour=1.0), make_profile(name="dear", price_per_gpu_hour=2.5)
    split, colocated_dear, colocated_cheap = fleets_of([], {Role.PREFILL: [dear], Role.DECODE: [cheap]})
    limit = Limit(price_per_hour=6.0)
    assert names(split, limit) == ["1P3D", "2P1D"]
    assert names(colocated_dear, limit) == ["2M"]
    assert names(colocated_cheap, limit) == ["6M"]


def test_money_needs_a_price() -> None:
    with pytest.raises(ConfigError, match="made up: price_per_gpu_hour: is not known"):
        names(one_fleet(), Limit(price_per_hour=5))
    assert names(one_fleet(), Limit(price_per_hour=5, price_per_gpu_hour=2.5)) == ["1P1D", "2M"]


def test_each_tensor_parallel_degree_is_a_fleet_of_its_own() -> None:
    one, two = make_profile(), make_profile(name="two", tensor_parallel_size=2, num_gpus=2)
    assert [fleet.gpus_per_worker for fleet in fleets_of([two, one], {})] == [1, 2]


def test_hardware_by_role_is_kept_apart_and_mixed_workers_may_be_of_either_or_of_their_own() -> None:
    big, small = make_profile(name="big"), make_profile(name="small")
    found = fleets_of([], {Role.PREFILL: [big], Role.DECODE: [small]})
    kinds = [{str(role): profile.name for role, profile in fleet.profiles.items()} for fleet in found]
    assert kinds == [{"prefill": "big", "decode": "small"}, {"mixed": "big"}, {"mixed": "small"}]
    (own,) = fleets_of([small], {Role.PREFILL: [big]})
    assert {str(role): profile.name for role, profile in own.profiles.items()} == {
        "prefill": "big",
        "decode": "small",
        "mixed": "small",
    }


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([], "none was given"),
        ([make_profile(), make_profile(name="b", model="other")], "b is of the model other, made up of model"),
        ([make_profile(), make_profile(name="b")], "both of tensor_parallel_size 1"),
        ([make_profile(), make_profile(flip_s=9.0)], "two different profiles are called made up"),
    ],
    ids=["none", "model", "degree", "name"],
)
def test_profiles_that_cannot_be_compared_are_refused(profiles: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fleets_of(profiles, {})


def test_workers_of_different_size_are_refused() -> None:
    sides = {Role.PREFILL: [make_profile(name="a", num_gpus=2)], Role.DECODE: [make_profile(name="b")]}
    with pytest.raises(ConfigError, match="a and b: num_gpus differ"):
        fleets_of([], sides)
    with pytest.raises(ConfigError, match="made up and big: num_gpus differ"):
        fleets_of([make_profile()], {Role.MIXED: [make_profile(name="big", num_gpus=2)]})


def test_a_side_of_a_degree_that_the_other_side_has_not_is_refused_and_not_left_out() -> None:
    """DistServe's published placement of OPT-13B. Without a word it would be answered for TP2 alone, unsplit."""
    two, one = make_profile(name="two", tensor_parallel_size=2, num_gpus=2), make_profile(name="one")
    words = "decode=one is of tensor_parallel_size 1, and there is no prefill profile of that degree"
    with pytest.raises(ConfigError, match=words):
        fleets_of([], {Role.PREFILL: [two], Role.DECODE: [one]})
    with pytest.raises(ConfigError, match="prefill=two is of tensor_parallel_size 2, and there is no decode profile"):
        fleets_of([one], {Role.PREFILL: [two]})
    with pytest.raises(ConfigError, match="there is no decode profile"):
        fleets_of([], {Role.PREFILL: [one], Role.MIXED: [make_profile(name="both")]})
    (mixed,) = fleets_of([], {Role.MIXED: [one]})
    assert set(mixed.profiles) == {Role.MIXED}


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (Limit(num_gpus=300), "--gpus: enough for 300 workers of a kind, more than the 256"),
        (Limit(price_per_hour=600, price_per_gpu_hour=2), "--price-per-hour: enough for 300 workers"),
    ],
)
def test_more_workers_than_are_planned_as_one_are_refused(limit: Limit, words: str) -> None:
    """256 mixed workers would be compared with splits of 300."""
    with pytest.raises(ConfigError, match=words):
        names(one_fleet(), limit)
    assert len(names(one_fleet(num_gpus=2, tensor_parallel_size=2), Limit(num_gpus=20))) == 9 + 36 + 1


@pytest.mark.parametrize("num_gpus", [300, 256])
def test_named_splits_may_share_out_more(num_gpus: int) -> None:
    choices = Choices(splits=("100P150D", "256M"))
    assert wanted(one_fleet(), Limit(num_gpus=num_gpus), choices) == [
        parse_split(text) for text in choices.splits or ()
    ]


@pytest.mark.parametrize("limit", [Limit(), Limit(num_gpus=1, price_per_hour=1), Limit(num_gpus=0), Limit(num_gpus=-1)])
def test_nothing_to_share_out_is_refused(limit: Limit) -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        limit.check()


@pytest.mark.parametrize(("text", "name"), [("2P6D", "2P6D"), ("8m", "8M"), ("1M2D1P", "1P2D1M")])
def test_a_split_is_read_as_it_is_shown(text: str, name: str) -> None:
    assert setup_of(text).name == name


@pytest.mark.parametrize("text", ["", "8", "2P", "6D", "2P6", "P6D", "0P6D", "2P6D1P", "2P1M", "999M"])
def test_what_is_no_split_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--splits"):
        parse_split(text)


def test_only_the_splits_that_were_named_are_tried_and_each_must_fit() -> None:
    fleet, limit = one_fleet(), Limit(num_gpus=4)
    assert wanted(fleet, limit, Choices(splits=("1P2D", "4M"))) == [parse_split("1P2D"), parse_split("4M")]
    with pytest.raises(ConfigError, match="2P6D needs more than there is"):
        wanted(fleet, limit, Choices(splits=("2P6D",)))


def test_sizes_that_nobody_measured_are_left_out() -> None:
    domain = make_profile().domain
    narrow = domain.model_copy(
        update={
            "chunk_tokens": domain.chunk_tokens.model_copy(update={"largest": 1024.0}),
            "decode_batch": domain.decode_batch.model_copy(update={"largest": 8.0}),
        }
    )
    choices = clipped(Choices(), one_fleet(domain=narrow))
    assert choices.chunk_sizes == (256, 512, 1024)
    assert choices.max_num_seqs == (8,)


@pytest.mark.parametrize("text", ["2P2D", "4M", "1P2D1M"])
def test_every_set_up_that_can_be_reached_is_a_configuration_that_can_be_simulated(text: str) -> None:
    """Every sequence computes a token in each step: a chunk must have room for them."""
    profile, target = make_profile(), Target("all", 500, 50, 0.9)
    choices = Choices(chunk_sizes=(64, 256, 1024), max_num_seqs=(32, 128, 512))
    todo, seen = [setup_of(text, choices)], set()
    while todo:
        setup = todo.pop()
        if key_of(setup) in seen:
            continue
        seen.add(key_of(setup))
        config = config_of(setup, {profile.name: profile}, target)
        for role, num in setup.num_workers.items():
            assert config.replicas(role) == num
            assert config.engine_for(role).max_num_seqs == setup.max_num_seqs[role]
        todo += [other for _, other in neighbours(setup, choices)]
    assert len(seen) > 8


def test_a_step_changes_one_choice_by_one_step() -> None:
    setup = setup_of("2P2D")
    steps = dict(neighbours(setup, Choices()))
    assert set(steps) == {
        "prefill chunk down",
        "prefill chunk up",
        "decode sequences down",
        "decode sequences up",
        "policy round_robin",
    }
    assert steps["prefill chunk up"].max_num_batched_tokens[Role.PREFILL] == 4096
    assert steps["decode sequences down"].max_num_seqs[Role.DECODE] == 128
    assert all(place_of(other) == place_of(setup) for other in steps.values())


def test_sizes_can_be_carried_over() -> None:
    tuned = dict(neighbours(setup_of("2P2D"), Choices()))["prefill chunk down"]
    other = with_sizes(setup_of("1P2D1M"), tuned, Choices())
    assert other.name == "1P2D1M"
    assert other.max_num_batched_tokens[Role.PREFILL] == 1024
    assert other.max_num_batched_tokens[Role.MIXED] == setup_of("1M").max_num_batched_tokens[Role.MIXED]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk_sizes": ()}, "--chunk-sizes"),
        ({"max_num_seqs": (0, 4)}, "--max-num-seqs"),
        ({"chunk_sizes": (16,), "max_num_seqs": (32,)}, "--chunk-sizes: 16 is below"),
        ({"policies": ("luck",)}, "--policies: luck"),
    ],
    ids=["chunks", "sequences", "room", "policy"],
)
def test_choices_that_make_no_sense_name_their_option(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Choices(**changes).check()


def test_the_router_gives_no_request_up_that_is_within_its_targets() -> None:
    profiles, target = {"made up": make_profile()}, Target("all", 1_000, 100, 0.9)
    least_s = deadline_s((Target("fast", 100, 10, 0.9), target), 6_000)
    assert least_s == pytest.approx(2 * 601)
    router = config_of(setup_of("2M"), profiles, target, least_s).router
    assert router.default_timeout_s == router.max_timeout_s == 1_202
    router = config_of(setup_of("2M"), profiles, target, deadline_s((target,), 1_000)).router
    assert (router.default_timeout_s, router.max_timeout_s) == (202, 600), "what is long enough is left alone"
    router = config_of(setup_of("2M"), profiles, target, deadline_s((target,), 10)).router
    assert router.default_timeout_s == 120


def test_sides_without_a_link_in_common_are_refused_by_name() -> None:
    profiles = {"made up": make_profile(links={})}
    with pytest.raises(ConfigError, match="have none in common"):
        config_of(setup_of("1P1D"), profiles, Target("all", 500, 50, 0.9))


def test_the_guess_follows_what_the_traffic_needs() -> None:
    """Long prompts need prefill workers, long answers decode workers."""
    profiles = {"made up": make_profile()}
    best = {}
    for kind, lengths in {"prompts": Lengths(2000, 20, 50), "answers": Lengths(50, 500, 50)}.items():
        capacity = Capacity(profiles, lengths)
        setups = [setup_of(f"{num}P{8 - num}D") for num in range(1, 8)]
        best[kind] = max(setups, key=capacity.rate).num_workers[Role.PREFILL]
        assert capacity.rate(setup_of("8M")) > 0
        assert capacity.num_inflight(setup_of("8M")) > 0
    assert best["prompts"] > best["answers"]
