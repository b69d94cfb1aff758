"""The report of `pdserve simulate`: what it shows, and that the command writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_runner import application
from planner_setups import make_profile
from report_examples import make_lapse, make_story
from report_page import Page, played, simulation
from typer.testing import CliRunner

from pdserve.cluster.load import LoadResult, RequestRecord
from pdserve.cluster.load_report import summarize
from pdserve.cluster.planner.findings import ClassReport, Target
from pdserve.cluster.planner.profile import dump
from pdserve.cluster.planner.timelapse import Timelapse
from pdserve.cluster.report_story import story_of
from pdserve.cluster.simulate_command import simulate
from pdserve.proto.types import SLO, RequestTiming, Role


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return simulation(make_story(), tmp_path_factory.mktemp("simulated"))


def test_the_time_lapse_is_in_the_page_as_it_was_sampled(simulated: Page) -> None:
    lapse = make_story().lapse
    data = played(simulated)
    assert data["at"] == [round(at_s, 3) for at_s in lapse.at_s]
    assert data["inflight"] == list(lapse.router_inflight)
    assert [one["id"] for one in data["workers"]] == [track.worker_id for track in lapse.tracks]
    assert data["workers"][7]["used"] == list(lapse.tracks[7].used_blocks)
    assert None in lapse.tracks[7].used_blocks


def test_a_simulation_shows_its_totals_latencies_and_failures(simulated: Page) -> None:
    assert simulated.row("TTFT") == ["TTFT", "210", "455", "980.5", "260.1", "1,830"]
    for said in ("3P5D attains 92.8 % at 16.02 requests/s", "14.71", "1,994 of 2,000", "6 × RESOURCE_EXHAUSTED"):
        assert said in simulated.text


def test_a_load_report_becomes_a_story_with_the_same_figures(tmp_path: Path) -> None:
    timing = RequestTiming(0.0, 0.0, 0.2, 1.2, 1.2, 11)
    loaded = summarize(
        LoadResult((RequestRecord(timing, 100), RequestRecord(timing, 100)), 0.0, 2.0, num_capped=0, num_clipped=0),
        SLO(500.0, 50.0),
    )
    story = story_of(
        loaded,
        setup="1P1D",
        workload="short",
        profiles={Role.DECODE: make_profile()},
        seed=3,
        picture=None,
        lapse=make_lapse(1, 1),
        classes=(ClassReport(Target("all", 500.0, 50.0, 0.9), 2, 2),),
    )
    page = simulation(story, tmp_path)
    assert page.row("TTFT")[1] == "200"
    assert "decode: made up, predicted" in page.text
    assert f"1P1D attains {100 * loaded.attainment:.1f} %" in page.text


def test_a_simulation_shows_every_class_by_its_own_targets(tmp_path: Path) -> None:
    chat = ClassReport(Target("chat", 300.0, 40.0, 0.95), 1500, 1400)
    batch = ClassReport(Target("batch", 9000.0, 90.0, 0.5), 500, 457)
    none = ClassReport(Target("all", 1000.0, 100.0, 0.9), 0, 0)
    page = simulation(make_story(classes=(chat, batch, none)), tmp_path)
    assert page.row("chat") == ["chat", "300", "40", "1,500", "93.3 %", "95.0 %", "missed"]
    assert page.row("batch") == ["batch", "9,000", "90", "500", "91.4 %", "50.0 %", "met"]
    assert page.row("all") == ["all", "1,000", "100", "0", "–", "90.0 %", "met"]
    assert "Target: chat" in page.text
    assert "met both targets of their class" in page.text
    assert "Target: " not in simulation(make_story(), tmp_path).text


def test_simulate_writes_its_report(tmp_path: Path) -> None:
    profile, path = tmp_path / "profile.json", tmp_path / "report.html"
    profile.write_text(dump(make_profile()))
    options = ("--profile", str(profile), "--workload", "short", "--request-rate", "5", "--html", str(path))
    done = CliRunner().invoke(
        application(simulate), ["simulate", "--set", "engine.num_blocks=500", "--num-prompts", "60", "--json", *options]
    )
    assert done.exit_code == 0, done.output
    found, page = json.loads(done.stdout), Page(path.read_text(encoding="utf-8"))
    assert set(page.plots()) == {"lapse", "latency", "waterfall"}
    assert f"1P1D attains {100 * found['attainment']:.1f} %" in page.text
    assert "prefill: made up, predicted" in page.text
    data = played(page)
    assert [one["id"] for one in data["workers"]] == ["prefill-0", "decode-0"]
    assert max(data["inflight"]) > 0
    assert data["at"][-1] > 1.0


def test_simulate_writes_every_class_and_puts_misses_down_by_its_targets(tmp_path: Path) -> None:
    profile, path = tmp_path / "profile.json", tmp_path / "report.html"
    profile.write_text(dump(make_profile()))
    options = ("--profile", str(profile), "--workload", "short?classes=chat:3,batch:1", "--html", str(path))
    targets = ("--ttft-ms", "60000", "--tpot-ms", "1000", "--slo", "chat:ttft=0.001,tpot=1000")
    done = CliRunner().invoke(application(simulate), ["simulate", "--num-prompts", "60", "--json", *options, *targets])
    assert done.exit_code == 0, done.output
    found, page = json.loads(done.stdout), Page(path.read_text(encoding="utf-8"))
    chat, rest = found["classes"]
    assert (chat["attainment"], rest["attainment"]) == (0.0, 1.0)
    assert page.row("chat")[-3:] == ["0.0 %", "90.0 %", "missed"]
    assert page.row("all")[-3:] == ["100.0 %", "90.0 %", "met"]
    assert f"attains {100 * found['attainment']:.1f} %" in page.text
    # Nobody misses TPOT: all misses are of what comes before the first token.
    shares = [float(row[-1].rstrip(" %")) for row in page.cells if row[:1] == ["1P1D"] and len(row) == 6]
    assert sum(shares[:3]) == pytest.approx(100.0, abs=0.2)
    assert shares[3:] == [0.0, 0.0, 0.0]


def test_simulate_says_at_once_that_a_report_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "report.html"
    done = CliRunner().invoke(application(simulate), ["simulate", "--profile", "unread", "--html", str(path)])
    assert done.exit_code == 2
    assert f"--html: {path}: cannot be written" in done.output


def test_a_thousand_workers_fit_into_the_figure_and_some_of_them_into_the_player(tmp_path: Path) -> None:
    page = simulation(make_story(lapse=make_lapse(300, 700, num_samples=80)), tmp_path)
    data = played(page)
    assert len(data["workers"]) + data["left_out"] == 1000
    assert len(page.source) < 2_000_000


def test_a_simulation_of_nothing_says_so(tmp_path: Path) -> None:
    story = make_story(lapse=Timelapse().lapse(), picture=None, spreads={}, num_completed=0)
    page = simulation(story, tmp_path)
    assert not page.plots()
    assert "nothing was sampled" in page.text
    assert "Nothing completed." in page.text


def test_one_moment_is_enough_for_a_lapse(tmp_path: Path) -> None:
    assert "lapse" in simulation(make_story(lapse=make_lapse(num_samples=1)), tmp_path).plots()
