"""What `--profile` means: roles, single workers, and profiles that do not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planner_setups import make_config, make_profile

from pdserve.cluster.planner.profile import dump
from pdserve.cluster.profile_files import other_model, read_fleet, read_profiles, worker_ids
from pdserve.proto.errors import ConfigError

SETTINGS = make_config(prefill=1, decode=2)


def write(folder: Path, file: str, **changes: Any) -> str:
    (folder / file).write_text(dump(make_profile(**changes)))
    return str(folder / file)


def test_single_workers_may_have_profiles_of_their_own(tmp_path: Path) -> None:
    one, slow = write(tmp_path, "one.json"), write(tmp_path, "slow.json", name="slow")
    found = read_fleet([one, f"decode-1={slow}"], SETTINGS)
    assert {name: profile.name for name, profile in found.by_name.items()} == {
        "prefill": "made up",
        "decode": "made up",
        "decode-1": "slow",
    }


def test_a_profile_of_no_role_is_that_of_every_role_of_those_without_workers_too(tmp_path: Path) -> None:
    one, slow = write(tmp_path, "one.json"), write(tmp_path, "slow.json", name="slow")
    found = read_fleet([one, f"prefill={slow}"], SETTINGS)
    assert list(found.by_name) == ["prefill", "decode"]
    assert {name: profile.name for name, profile in found.ever.items()} == {
        "prefill": "slow",
        "decode": "made up",
        "mixed": "made up",
    }
    assert set(read_fleet([f"prefill={one}", f"decode={one}"], SETTINGS).ever) == {"prefill", "decode"}


def test_a_worker_that_is_not_there_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path, "one.json")
    with pytest.raises(ConfigError, match="there is no worker decode-2; there are prefill-0, decode-0, decode-1"):
        read_fleet([one, f"decode-2={one}"], SETTINGS)


def test_where_all_workers_of_a_role_must_be_alike_a_single_one_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path, "one.json")
    with pytest.raises(ConfigError, match="decode-1=FILE: single workers cannot differ here"):
        read_profiles([one, f"decode-1={one}"], SETTINGS)


def test_different_profiles_of_one_name_are_refused_as_results_go_by_names(tmp_path: Path) -> None:
    one, same = write(tmp_path, "one.json"), write(tmp_path, "same.json")
    other = write(tmp_path, "other.json", startup_s=99.0)
    assert read_profiles([f"prefill={one}", f"decode={same}"], SETTINGS)
    for mine in ("decode", "decode-1"):
        with pytest.raises(ConfigError, match="two different profiles are called made up; rename one"):
            read_fleet([one, f"{mine}={other}"], SETTINGS)


def test_profiles_of_two_models_are_refused(tmp_path: Path) -> None:
    one, other = write(tmp_path, "one.json"), write(tmp_path, "other.json", name="b", model="8B")
    for mine in ("decode", "decode-1"):
        with pytest.raises(ConfigError, match="b is of the model 8B, made up of model; all profiles must be of one"):
            read_fleet([one, f"{mine}={other}"], SETTINGS)


def test_a_profile_that_another_one_replaces_is_not_compared(tmp_path: Path) -> None:
    one, other = write(tmp_path, "one.json"), write(tmp_path, "other.json", name="b", model="8B")
    assert {profile.name for profile in read_profiles([one, other], SETTINGS).values()} == {"b"}


def test_a_model_goes_by_its_folders_name_or_by_the_one_it_is_served_under() -> None:
    profile = make_profile(model="demo")
    here = SETTINGS.model_copy(update={"model": "/models/demo"})
    assert other_model([profile], here) == ""
    there = SETTINGS.model_copy(update={"model": "/models/renamed"})
    assert other_model([profile], there) == "made up is of the model demo, the configuration of renamed"
    assert other_model([profile], there.model_copy(update={"served_model_name": "demo"})) == ""


def test_workers_go_by_role_and_number() -> None:
    assert worker_ids(SETTINGS) == ["prefill-0", "decode-0", "decode-1"]
