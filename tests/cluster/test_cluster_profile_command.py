"""`pdserve profile` as its users meet it, as far as that takes no cluster."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from command_runner import application
from planner_setups import make_config, make_profile
from typer.testing import CliRunner, Result

from pdserve.cluster import profile_command, profile_files, profiling_clusters, state
from pdserve.cluster.planner.profile import Contention, Power, Profile, Slowdown, dump, load
from pdserve.cluster.planner.public_facts import Conversion
from pdserve.cluster.planner.public_measurements import SPLITWISE_COLUMNS
from pdserve.cluster.planner.step_shape import StepShape
from pdserve.cluster.profile_command import choose_conversion, profile
from pdserve.cluster.profile_files import read_profile, read_profiles, shipped_names
from pdserve.cluster.profiling_clusters import MeasuredPair, MeasuredSteps
from pdserve.cluster.profiling_links import Handoff
from pdserve.cluster.profiling_plan import WorkerLimits
from pdserve.cluster.profiling_run import BurstLog, LoneCost
from pdserve.cluster.profiling_samples import Timing
from pdserve.cluster.state import ClusterState
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import KVLayout, Role, WorkerInfo, WorkerRef

APP = application(profile)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(APP, ["profile", *arguments])


def one_line(done: Result) -> str:
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget-s", "0"], "--budget-s: 0.0 is not a positive number"),
        (["--budget-s", "nan"], "--budget-s: nan"),
        (["--flip-s", "inf", "--set", "model=/no/such/model"], "--flip-s: inf is neither 0 nor a positive number"),
        (["--flip-s", "-1", "--set", "model=/no/such/model"], "--flip-s: -1.0 is neither"),
        (["--flip-s", "nan", "--set", "model=/no/such/model"], "--flip-s: nan is neither"),
        (["--from-cluster", "prod", "--flip-s", "nan"], "--flip-s: nan is neither"),
        (["--from-cluster", "prod", "--config", "x.yaml"], "--config: has no meaning with --from-cluster"),
        (["--from-cluster", "prod", "--set", "a.b=1"], "--set: has no meaning with --from-cluster"),
        (["--from-cluster", "prod", "--seed", "0"], "--seed: has no meaning with --from-cluster"),
        (["--convert", "x.csv", "--config", "x.yaml"], "--config: has no meaning with --convert"),
        (["--convert", "x.csv", "--set", "a.b=1"], "--set: has no meaning with --convert"),
        (["--convert", "x.csv", "--seed", "0"], "--seed: has no meaning with --convert"),
        (["--convert", "x.csv", "--budget-s", "9"], "--budget-s: has no meaning with --convert"),
        (["--convert", "x.csv", "--flip-s", "1"], "--flip-s: has no meaning with --convert"),
        (["--convert", "x.csv", "--hardware", "mine"], "--hardware: has no meaning with --convert"),
        (["--convert", "x.csv", "--from-cluster", "prod"], "--from-cluster: has no meaning with --convert"),
        (["--convert", "x.csv", "--base", "x.json"], "--base: has no meaning with --convert"),
        (["--set", "model=/no/such/model"], "/no/such/model: no such directory"),
        (["--set", "engine.nonsense=1"], "engine.nonsense"),
        (["--from-cluster", "nobody"], "no cluster named 'nobody' is running"),
        (["--base", "x.json"], "--base: has a meaning with --from-cluster only"),
        (["--convert", "no-such.csv"], "--convert: no-such.csv: cannot be read"),
        (["--output", "/nowhere/mine.json"], "--output: /nowhere/mine.json: cannot be written"),
        (["--output", "a" * 256], f"--output: {'a' * 256}: cannot be written: File name too long"),
        (["--name", "a" * 256], f"without --output: {'a' * 256}.json: cannot be written: File name too long"),
        (["--price-per-gpu-hour", "-1"], "--price-per-gpu-hour: -1.0 is neither 0 nor a positive number"),
        (["--power-idle-w", "nan"], "--power-idle-w: nan is neither"),
        (["--power-prefill-w", "inf", "--power-decode-w", "1"], "--power-prefill-w: inf is neither"),
        (["--power-prefill-w", "60"], "--power-decode-w: is missing; power needs the watts of prefill and of decode"),
        (["--power-idle-w", "60"], "--power-prefill-w: is missing"),
    ],
    ids=lambda value: "_".join(value[:3]) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line_and_exit_status_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert words in one_line(invoke(*arguments))


def write_public(path: Path) -> Path:
    """As Splitwise publishes its measurements, of two GPUs."""
    rows = [",".join(SPLITWISE_COLUMNS)]
    for hardware in ("a100-80gb", "h100-80gb"):
        for prompt_tokens in (128, 256, 512, 1024, 2048):
            for batch in (1, 2, 4, 8, 16):
                prompt_ms, token_ms = 10 + 0.1 * prompt_tokens * batch, 20 + 0.5 * batch
                sizes = {"prompt_size": prompt_tokens, "batch_size": batch, "token_size": 128, "tensor_parallel": 8}
                times = {"prompt_time": prompt_ms, "token_time": token_ms, "e2e_time": prompt_ms + 127 * token_ms}
                cells = {"model": "llama2-70b", "hardware": hardware, **sizes, **times}
                rows.append(",".join(str(cells.get(column, 1.0)) for column in SPLITWISE_COLUMNS))
    text = "\n".join(rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_a_public_file_becomes_a_profile_by_name(tmp_path: Path, name: str) -> None:
    public = write_public(tmp_path / name)
    line = one_line(invoke("--convert", str(public)))
    assert "holds several profiles; give --name, one of: " in line
    wanted = next(one for one in line.partition("one of: ")[2].split(", ") if "h100" in one)
    output = tmp_path / "out.json"
    done = invoke("--convert", str(public), "--name", wanted, "--output", str(output))
    assert done.exit_code == 0, done.output
    found = load(output.read_text(), "out.json")
    assert found.name == wanted
    assert "prefill" in done.stdout
    assert f"wrote {output}" in done.stdout


def converted(folder: Path, *arguments: str) -> Profile:
    """A profile from a public file, of a GPU whose price and watts are known."""
    public, output = write_public(folder / "table.csv"), folder / "out.json"
    name = one_line(invoke("--convert", str(public))).partition("one of: ")[2].split(", ")[0]
    done = invoke("--convert", str(public), "--name", name, "--output", str(output), *arguments)
    assert done.exit_code == 0, done.output
    return load(output.read_text(), "out.json")


def test_what_is_given_of_price_and_power_is_in_the_file_and_said_to_be_given(tmp_path: Path) -> None:
    watts = ("--power-idle-w", "80", "--power-prefill-w", "600", "--power-decode-w", "400.5")
    found = converted(tmp_path, "--price-per-gpu-hour", "2.5", *watts)
    assert found.price_per_gpu_hour == 2.5
    assert found.power == Power(idle_w=80, prefill_w=600, decode_w=400.5)
    assert found.origin.endswith(" Given, not measured: price_per_gpu_hour, power.")


def test_idle_watts_may_stay_unknown_and_nothing_given_changes_nothing(tmp_path: Path) -> None:
    plain = converted(tmp_path)
    found = converted(tmp_path, "--power-prefill-w", "600", "--power-decode-w", "0")
    assert found.power == Power(idle_w=None, prefill_w=600, decode_w=0)
    assert found.price_per_gpu_hour == plain.price_per_gpu_hour
    assert "Given" not in plain.origin


LAYOUT = KVLayout("model", "float32", 1, 1, 8, block_size=16)


def some_timings() -> list[Timing]:
    """Of a worker that is alone."""
    shapes = [StepShape(tokens, tokens**2 / 2, 0, 0) for tokens in (8, 16, 32, 64, 128, 256)]
    shapes += [StepShape(0, 0.0, batch, batch * context) for batch in (1, 2, 4, 8, 16) for context in (32, 128)]
    took_s = {shape: 0.01 + 1e-4 * (shape.num_prefill_tokens + shape.num_decodes) for shape in shapes}
    return [Timing(shape, took_s[shape], took_s[shape], took_s[shape]) for shape in shapes * 4]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster that is watched at once; its names are what it was asked for."""
    info = WorkerInfo(WorkerRef("mixed-0", 0, "here"), Role.MIXED, LAYOUT, 100, 512, 1000, "host")
    asked: list[str] = []

    async def steps(cluster: ClusterState, budget_s: float) -> tuple[tuple[WorkerInfo, ...], list[Timing]]:
        asked.append(cluster.name)
        return (info,), some_timings()

    monkeypatch.setattr(profile_command, "watch_steps", steps)
    monkeypatch.setattr(state, "require", lambda name: ClusterState(name, "", {}, "", "model", 0, 0.0))
    return asked


@pytest.mark.usefixtures("watched")
def test_steps_of_a_running_cluster_tell_no_costs_so_that_those_of_the_base_hold(tmp_path: Path) -> None:
    power = Power(prefill_w=60, decode_w=40)
    base, output = tmp_path / "base.json", tmp_path / "out.json"
    base.write_text(dump(make_profile(price_per_gpu_hour=2.0, power=power)))
    arguments = ("--from-cluster", "prod", "--base", str(base), "--output", str(output))
    assert invoke(*arguments).exit_code == 0
    found = load(output.read_text(), "out.json")
    assert (found.price_per_gpu_hour, found.power) == (2.0, power)
    assert invoke(*arguments, "--price-per-gpu-hour", "3").exit_code == 0
    found = load(output.read_text(), "out.json")
    assert (found.price_per_gpu_hour, found.power) == (3.0, power)


@pytest.mark.usefixtures("watched")
def test_a_role_change_that_is_given_counts_also_beside_a_base_and_is_said_to_be_assumed(tmp_path: Path) -> None:
    base, output = tmp_path / "base.json", tmp_path / "out.json"
    base.write_text(dump(make_profile(flip_s=0.7)))
    arguments = ("--from-cluster", "prod", "--output", str(output))
    for more, flip_s in (
        ((), 0.1),
        (("--flip-s", "3"), 3.0),
        (("--base", str(base)), 0.7),
        (("--base", str(base), "--flip-s", "0"), 0.0),
    ):
        assert invoke(*arguments, *more).exit_code == 0
        found = load(output.read_text(), "out.json")
        assert found.flip_s == flip_s
        assert (f"Assumed, not measured: a role change in {flip_s:g} s." in found.origin) == (flip_s != 0.7)


@pytest.mark.usefixtures("watched")
def test_steps_that_tell_no_contention_leave_that_of_the_base(tmp_path: Path) -> None:
    costs = Contention(
        prefill=Slowdown(beside_prefill=0.3, beside_decode=0.1), decode=Slowdown(beside_prefill=0.2, beside_decode=0.0)
    )
    base, output = tmp_path / "base.json", tmp_path / "out.json"
    base.write_text(dump(make_profile(contention=costs)))
    done = invoke("--from-cluster", "prod", "--base", str(base), "--output", str(output))
    assert done.exit_code == 0, done.output
    assert load(output.read_text(), "out.json").contention == costs
    assert "these steps do not tell what company costs a step: that is the base's" in done.stdout


def test_the_file_that_nobody_named_is_checked_before_a_cluster_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.json", "mine.json"):
        (tmp_path / name).mkdir()
    line = one_line(invoke("--from-cluster", "prod"))
    assert "without --output: model.json: cannot be written: is no regular file" in line
    assert "without --output: mine.json: cannot" in one_line(invoke("--from-cluster", "prod", "--name", "mine"))
    assert watched == []


def make_model(folder: Path) -> Path:
    """As far as can be seen without loading it."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_the_file_that_nobody_named_is_checked_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_model(tmp_path / "tiny"))
    Path("tiny.json").mkdir()
    for model in (".", str(tmp_path / "tiny")):
        line = one_line(invoke("--set", f"model={model}"))
        assert "without --output: tiny.json: cannot be written: is no regular file" in line


def test_a_link_whose_bandwidth_hand_offs_do_not_tell_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone, log = LoneCost(0.003, 0.001), BurstLog(tuple(some_timings()), 1, ())
    steps = MeasuredSteps(log, lone, 0.0, 5.0, LAYOUT, WorkerLimits(16, 256, 512, 1600))
    slower_s = {"shm": 0.0, "gloo": 1e-9}
    monkeypatch.setattr(profiling_clusters, "measure_steps", lambda *measured: steps)
    monkeypatch.setattr(
        profiling_clusters,
        "measure_pair",
        lambda settings, kind, *rest: MeasuredPair(
            BurstLog((), 0, ()),
            tuple(Handoff(size, 0.003 + size * slower_s[kind], 0.001) for size in (1000, 100_000)),
            lone,
        ),
    )
    output, model = tmp_path / "out.json", make_model(tmp_path / "tiny")
    done = invoke("--set", f"model={model}", "--set", "kv_transfer.links=[shm,gloo]", "--output", str(output))
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stderr.splitlines() if "links" in line)
    assert line.startswith("warning: thin: shm links: more bytes took no longer")
    assert line.endswith("raise --budget-s")


def test_an_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    public = write_public(tmp_path / "table.csv")
    line = one_line(invoke("--convert", str(public)))
    wanted = line.partition("one of: ")[2].split(", ")[0]
    assert "cannot be written" in one_line(
        invoke("--convert", str(public), "--name", wanted, "--output", str(tmp_path / "no" / "out.json"))
    )


def test_the_only_profile_of_a_file_needs_no_name() -> None:
    only = Conversion(make_profile(), ())
    assert choose_conversion((only,), None, "file") is only
    with pytest.raises(ConfigError, match="holds no profile 'x'"):
        choose_conversion((only,), "x", "file")


def test_a_bare_name_is_a_shipped_profile_and_a_file_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "tiny-cpu.json").write_text(dump(make_profile(name="shipped")))
    monkeypatch.setattr(profile_files, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    assert read_profile("tiny-cpu").name == "shipped"
    (tmp_path / "tiny-cpu").write_text(dump(make_profile(name="mine")))
    assert read_profile("tiny-cpu").name == "mine"
    with pytest.raises(ConfigError, match=r"other: cannot be read.*shipped: tiny-cpu"):
        read_profile("other")


def test_roles_can_have_profiles_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(dump(make_profile(name=name)))
    found = read_profiles([str(tmp_path / "one"), f"decode={tmp_path / 'two'}"], make_config())
    assert {role: one.name for role, one in found.items()} == {Role.PREFILL: "one", Role.DECODE: "two"}


@pytest.mark.parametrize("name", shipped_names())
def test_what_is_shipped_can_be_read_and_says_where_it_is_from(name: str) -> None:
    found = read_profile(name)
    assert found.name == name
    assert found.source == "measured"
    assert {"shm", "gloo"} <= set(found.links)
    assert "pdserve profile" in found.origin


def test_the_demo_models_profile_is_shipped() -> None:
    assert "demo-cpu" in shipped_names()
