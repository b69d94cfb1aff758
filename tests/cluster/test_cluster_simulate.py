"""`pdserve simulate` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_runner import application
from planner_setups import make_profile
from typer.testing import CliRunner, Result

from pdserve.cluster.planner.profile import Power, dump
from pdserve.cluster.simulate_command import simulate

APP = application(simulate)
POOLS = ("--set", "engine.num_blocks=2000")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(dump(make_profile()))
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(APP, ["simulate", *POOLS, "--num-prompts", "60", *arguments])


def simulated(profile: Path, *arguments: str) -> dict[str, Any]:
    done = invoke("--profile", str(profile), "--json", *arguments)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_report_is_that_of_real_load_with_the_workers_and_where_their_figures_come_from(profile: Path) -> None:
    found = simulated(profile, "--workload", "short?rate=5")
    assert found["num_completed"] == found["num_requests"] == 60
    assert found["ttft"]["p50_ms"] > 0
    assert found["attainment"] > 0.9
    assert set(found["busy"]) == {"prefill-0", "decode-0"}
    assert found["profiles"]["decode"] == {"name": "made up", "source": "predicted"}
    phases = found["phase_means_ms"]
    assert all(phases[name] > 0 for name in ("prefill", "transfer", "decode"))
    # The phases of a request are its life, less what lies before the queue and after the last step.
    assert sum(phases.values()) == pytest.approx(found["e2e"]["mean_ms"], rel=0.1)


def test_an_answer_of_one_token_is_over_with_its_prompt_as_in_a_cluster(profile: Path) -> None:
    """The prefill worker gives it, and nothing is handed on."""
    found = simulated(profile, "--workload", "synthetic?prompt=200&output=1", "--request-rate", "40")
    phases = found["phase_means_ms"]
    assert phases["transfer"] == phases["decode"] == 0.0
    assert phases["queue"] >= 0.0
    assert phases["prefill"] > 0.0
    assert sum(phases.values()) == pytest.approx(found["e2e"]["mean_ms"], rel=0.35)


def test_the_same_seed_gives_the_same_report_and_another_rate_another(profile: Path) -> None:
    first, again = (simulated(profile, "--workload", "short", "--seed", "3") for _ in range(2))
    assert first == again
    faster = simulated(profile, "--workload", "short", "--seed", "3", "--request-rate", "50")
    assert faster["ttft"]["mean_ms"] > first["ttft"]["mean_ms"]


def test_people_see_tables_and_what_was_never_measured(profile: Path) -> None:
    narrow = make_profile()
    single = narrow.domain.decode_batch.model_copy(update={"largest": 1})
    narrow = narrow.model_copy(update={"domain": narrow.domain.model_copy(update={"decode_batch": single})})
    profile.write_text(dump(narrow))
    done = invoke("--profile", str(profile), "--workload", "short", "--request-rate", "40")
    assert done.exit_code == 0, done.output
    assert "prefill-0" in done.stdout
    assert "beyond what was measured" in done.stdout
    assert "predicted" in done.stdout


def test_each_role_may_have_a_profile_of_its_own(profile: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.json"
    slow.write_text(dump(make_profile(name="slow", overheads={"request_s": 1.0})))
    found = simulated(profile, "--workload", "short", "--profile", f"prefill={slow}")
    assert found["profiles"]["prefill"]["name"] == "slow"
    assert found["profiles"]["decode"]["name"] == "made up"
    assert found["ttft"]["p50_ms"] > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "no-such.json"], "--profile: no-such.json: cannot be read"),
        (["--workload", "no-such-workload"], "is neither a preset"),
        (["--workload", "trace:/no/such/trace.csv"], "/no/such/trace.csv"),
        (["--request-rate", "0"], "rate"),
        (["--set", "prefill.replicas=0", "--set", "decode.replicas=0"], "0 and 0 cannot serve"),
        (["--set", "engine.nonsense=1"], "engine.nonsense"),
    ],
    ids=["profile", "workload", "trace", "rate", "nobody", "setting"],
)
def test_wrong_use_is_one_line_and_exit_status_2(profile: Path, arguments: list[str], words: str) -> None:
    done = invoke("--profile", str(profile), *arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert words in line


def test_a_profile_that_makes_no_sense_names_its_field(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"format": 1, "name": "x"}')
    done = invoke("--profile", str(path))
    assert done.exit_code == 2
    assert "bad.json: model" in done.stderr


def test_a_role_without_a_profile_is_named(profile: Path) -> None:
    done = invoke("--profile", f"prefill={profile}")
    assert done.exit_code == 2
    assert "none for decode workers" in done.stderr


def test_one_worker_may_be_slower_than_the_rest_of_its_role(profile: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.json"
    slow.write_text(dump(make_profile(name="slow", overheads={"request_s": 1.0})))
    asked = ("--workload", "short", "--set", "prefill.replicas=2", "--set", "router.policy=round_robin")
    found = simulated(profile, *asked, "--profile", f"prefill-1={slow}")
    assert found["profiles"]["prefill"]["name"] == "made up"
    assert found["profiles"]["prefill-1"]["name"] == "slow"
    assert found["ttft"]["p90_ms"] > 1000 > found["ttft"]["mean_ms"]
    assert (found["cost"], found["energy"]) == (None, None)


def test_step_times_of_another_model_than_the_configurations_are_said(profile: Path) -> None:
    words = "made up is of the model model, the configuration of demo: step times are the profile's"
    assert words in simulated(profile, "--workload", "short")["notes"]
    profile.write_text(dump(make_profile(model="demo")))
    assert simulated(profile, "--workload", "short")["notes"] == []


def test_every_slo_class_is_judged_by_its_own_targets(profile: Path) -> None:
    asked = ("--workload", "short?classes=chat:3,batch:1", "--ttft-ms", "500", "--tpot-ms", "50")
    slos = ("--slo", "chat:ttft=1,tpot=50,share=0.95")
    found = simulated(profile, *asked, *slos)
    chat, rest = found["classes"]
    assert (chat["name"], chat["attainment"], chat["share"], chat["is_met"]) == ("chat", 0.0, 0.95, False)
    assert (rest["name"], rest["attainment"], rest["share"], rest["is_met"]) == ("all", 1.0, 0.9, True)
    assert chat["num_requests"] + rest["num_requests"] == 60
    assert found["attainment"] == rest["num_requests"] / 60  # the headline is judged like the classes
    (general,) = simulated(profile, *asked)["classes"]
    assert (general["name"], general["ttft_ms"]) == ("all", 500.0)
    shown = invoke("--profile", str(profile), *asked, *slos)
    assert "SLO classes" in shown.stdout
    assert "goodput (each class by its own targets)" in shown.stdout
    done = invoke("--profile", str(profile), *asked, "--slo", "code:ttft=1,tpot=1")
    assert "no request is of the class code; classes of the workload: batch, chat" in done.stderr


def test_cost_and_energy_are_those_of_the_whole_run_where_the_profile_knows_them(profile: Path) -> None:
    assert simulated(profile, "--workload", "short")["cost"] is None
    power = Power(idle_w=100.0, prefill_w=100.0, decode_w=100.0)
    profile.write_text(dump(make_profile(price_per_gpu_hour=1.8, power=power)))
    found = simulated(profile, "--workload", "short")
    # Two GPUs that draw 100 W whatever they do.
    a_request_s = found["duration_s"] / 60
    assert found["cost"]["per_hour"] == pytest.approx(3.6)
    assert found["cost"]["per_million_requests"] == pytest.approx(1e6 * a_request_s * 3.6 / 3600, rel=0.01)
    assert found["energy"]["joules_per_request"] == pytest.approx(200 * a_request_s, rel=0.01)
    shown = invoke("--profile", str(profile), "--workload", "short")
    assert "cost 3.6 an hour" in shown.stdout
    assert "J a request" in shown.stdout


def test_prompts_that_were_cut_to_the_models_context_are_told_of(profile: Path) -> None:
    cut = "100.0% of the requests are longer than 8,192 tokens and were cut to it"
    for prompt, is_cut in (("100000", True), ("100", False)):
        done = invoke("--profile", str(profile), "--workload", f"synthetic?prompt={prompt}&output=8&rate=1")
        assert (cut in done.stdout) == is_cut, done.output


SHORT = ("--workload", "synthetic?prompt=100&output=20", "--request-rate", "10")
ONLY_MIXED = ("--set", "prefill.replicas=0", "--set", "decode.replicas=0", "--set", "mixed.replicas=2")
NOBODY_READY = {"no prefill and no decode worker is ready", "no decode worker is ready"}


@pytest.mark.parametrize(
    "asked",
    [
        (*ONLY_MIXED, "--flip", "mixed-0@2=prefill", "--flip", "mixed-1@2=decode"),
        ("--flip", "decode-0@1=mixed", "--flip", "decode-0@3=decode"),
    ],
    ids=["to roles that nobody had", "there and back"],
)
def test_a_profile_counts_for_a_worker_in_any_role(profile: Path, asked: tuple[str, ...]) -> None:
    found = simulated(profile, *SHORT, *asked, "--num-prompts", "200")
    assert found["num_completed"] > 150
    assert set(found["errors"]) <= NOBODY_READY
    assert found["num_completed"] + sum(found["errors"].values()) == 200


def test_deaths_and_turns_that_did_not_happen_are_told(profile: Path) -> None:
    turns = ("--flip", "decode-1@1=prefill", "--flip", "decode-1@1.001=decode", "--flip", "decode-1@3.5=mixed")
    asked = ("--set", "decode.replicas=2", *turns, "--fail", "decode-1@3", "--fail", "decode-0@1e9+30")
    notes = simulated(profile, *SHORT, *asked)["notes"][1:]  # the first is of the model's name
    told = [
        "--flip decode-1@1=prefill did not happen: a later order took its place",
        "--flip decode-1@3.5=mixed did not happen: it was not alive then",
        "--fail decode-0@1000000000+30 did not happen: the last request had ended at ",
    ]
    assert len(notes) == len(told)
    assert all(note.startswith(words) for note, words in zip(notes, told, strict=True))
    shown = " ".join(invoke("--profile", str(profile), *SHORT, *asked).stdout.split())
    assert all(words.strip() in shown for words in told)


def test_no_worker_is_busy_for_longer_than_the_simulation(profile: Path) -> None:
    """The last step outlives the last request, which missed its deadline."""
    late = ("--workload", "synthetic?prompt=8000&output=5", "--request-rate", "100", "--num-prompts", "3")
    settings = ("--set", "engine.max_num_batched_tokens=8192", "--set", "router.default_timeout_s=0.5")
    found = invoke("--profile", str(profile), "--json", *late, *settings)
    assert found.exit_code == 1
    busy = json.loads(found.stdout)["busy"]
    assert 0.9 < busy["prefill-0"] <= 1.0
