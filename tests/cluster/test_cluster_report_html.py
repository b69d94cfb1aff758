"""The HTML reports: well-formed, complete, nothing from outside, and nothing that a name can break."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from report_examples import (
    make_answer,
    make_attainment,
    make_finding,
    make_goodput,
    make_picture,
    make_setup,
    make_story,
)
from report_page import Page, played, report, simulation

from pdserve.cluster.planner.findings import Target
from pdserve.cluster.report_html import require_report, write_report
from pdserve.cluster.report_series import falling
from pdserve.proto.errors import ConfigError

TUNE_PLOTS = {"attainment", "goodput", "latency", "waterfall", "cost"}
HOSTILE = (
    """</script><script>alert("1")</script><img src=x onerror='alert(2)'>&amp; $\\frac{1}{0}$"""
    " {{ 7 * 7 }} \u202egnp.exe\x07"
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(make_answer(), tmp_path_factory.mktemp("tune"))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return simulation(make_story(), tmp_path_factory.mktemp("simulation"))


def test_a_tune_report_has_every_plot_with_its_words(tuned: Page) -> None:
    assert set(tuned.plots()) == TUNE_PLOTS
    for name, drawn in tuned.plots().items():
        texts = {child.attrib.get("id"): child.text for child in drawn}
        assert texts[f"{name}-title"]
        assert texts[f"{name}-desc"]


def test_a_simulation_report_has_every_plot(simulated: Page) -> None:
    assert set(simulated.plots()) == {"lapse", "latency", "waterfall"}


@pytest.mark.parametrize("kind", ["tuned", "simulated"])
def test_a_page_refers_to_nothing_outside_of_it(kind: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(kind)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    foreign = set(re.findall(r"\w+://[^\s\"'<)]*", page.source))
    assert foreign <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)


@pytest.mark.parametrize("kind", ["tuned", "simulated"])
def test_every_id_is_given_once_and_every_reference_has_its_target(kind: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(kind)
    assert len(page.ids) == len(set(page.ids))
    wanted = {address[1:] for address in page.addresses if address.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert wanted <= set(page.ids)


@pytest.mark.parametrize("kind", ["tuned", "simulated"])
def test_the_page_allows_itself_one_script_and_that_is_the_one_it_has(
    kind: str, request: pytest.FixtureRequest
) -> None:
    page: Page = request.getfixturevalue(kind)
    (code,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.source
    assert "default-src 'none'" in page.source


def test_colours_are_left_to_the_style_so_that_a_page_can_be_dark(tuned: Page) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", tuned.source, re.DOTALL))
    assert "var(--split)" in drawn
    assert not re.search(r"(?<!&)#[0-9a-f]{6}\b", drawn)
    style = tuned.source.partition("<style>")[2].partition("</style>")[0]
    for name in set(re.findall(r"var\((--\w+)\)", drawn)):
        assert style.count(f"{name}:") == 2


def test_the_table_has_the_figures_as_they_were_found(tuned: Page) -> None:
    assert tuned.row("4P4D")[:8] == [
        *("4P4D", "21.4", "20.76 – 22.04", "90.0 %"),
        *("210.1", "718.7", "24.71", "48.54"),
    ]
    assert "best split, on the plateau" in tuned.row("4P4D")
    assert "search stopped early" in tuned.row("2P6D")
    assert tuned.row("1P7D")[:3] == ["1P7D", "0", "–"]
    assert "infeasible: TTFT" in tuned.row("1P7D")
    priced = make_answer().findings[0].cost
    assert priced is not None
    assert f"{priced.per_million_output_tokens:.4g}" in tuned.row("4P4D")


def test_what_all_set_ups_share_is_said_once(tuned: Page) -> None:
    assert "All set-ups: GPUs 8; tensor parallel 1; batch 256; policy least_loaded." in tuned.text
    assert "policy" not in tuned.cells[0]


def test_the_head_has_question_verdict_reasons_and_warnings(tuned: Page) -> None:
    answer = make_answer()
    for said in (answer.verdict, *answer.reasons, *answer.warnings, answer.question.workload, answer.question.model):
        assert said in tuned.text
    assert "TTFT ≤ 500 ms and TPOT ≤ 50 ms for 90 % of requests" in tuned.text
    assert "How to read this" in tuned.text


def test_several_classes_of_targets_are_all_named(tmp_path: Path) -> None:
    targets = (Target("chat", 500, 50, 0.9), Target("batch", 5000, 200, 0.99))
    question = replace(make_answer().question, targets=targets)
    page = report(make_answer(question=question), tmp_path)
    assert "Target: batch" in page.text
    assert "TTFT ≤ 5,000 ms and TPOT ≤ 200 ms for 99 % of requests" in page.text


def test_where_classes_have_shares_of_their_own_no_line_says_that_all_requests_have_one(tmp_path: Path) -> None:
    """A goodput is where the first class falls to its share; no mean of shares is what it was measured at."""
    targets = (Target("chat", 500, 50, 0.9), Target("batch", 5000, 200, 0.99))
    page = report(make_answer(question=replace(make_answer().question, targets=targets)), tmp_path)
    drawn = re.findall(r'<svg class="plot" role="img" aria-labelledby="attainment.*?</svg>', page.source, re.DOTALL)
    assert "target 9" not in drawn[0]
    assert "a goodput is where the first class falls to its own share (chat 0.9, batch 0.99)" in page.text
    alike = tuple(replace(target, share=0.9) for target in targets)
    assert (
        "target 90 %" in report(make_answer(question=replace(make_answer().question, targets=alike)), tmp_path).source
    )


def test_a_rate_that_was_not_found_is_not_called_infeasible(tmp_path: Path) -> None:
    findings = list(make_answer().findings)
    nothing = replace(findings[-1].goodput, rate=0.0, failing="")
    findings[-1] = replace(findings[-1], goodput=nothing, is_refined=True)
    row = report(make_answer(findings=tuple(findings)), tmp_path).row(findings[-1].setup.name)
    assert "no rate found" in " ".join(row)
    assert "infeasible" not in " ".join(row)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    question = replace(
        make_answer().question,
        workload=HOSTILE,
        model=HOSTILE,
        profiles=(HOSTILE,),
        targets=(Target(HOSTILE, 500, 50, 0.9), Target("other", 900, 90, 0.9)),
    )
    findings = [
        replace(finding, setup=replace(finding.setup, policy=f"{HOSTILE}{number}"))
        for number, finding in enumerate(make_answer().findings)
    ]
    page = report(
        make_answer(
            question=question, findings=tuple(findings), verdict=HOSTILE, reasons=(HOSTILE,), warnings=(HOSTILE,)
        ),
        tmp_path,
    )
    assert len(page.scripts) == 1
    assert not page.handlers
    assert '</script><script>alert("1")</script>' in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in page.source
    assert "\x07" not in page.source
    assert set(page.plots()) == TUNE_PLOTS


def test_hostile_names_are_text_in_a_simulation(tmp_path: Path) -> None:
    picture = make_picture(3.0)
    picture = replace(picture, phases=tuple(replace(phase, name=HOSTILE + phase.name) for phase in picture.phases))
    story = make_story(workload=HOSTILE, setup=HOSTILE, errors={HOSTILE: 3}, warnings=(HOSTILE,), picture=picture)
    tracks = tuple(replace(track, worker_id=HOSTILE + track.worker_id) for track in story.lapse.tracks)
    page = simulation(replace(story, lapse=replace(story.lapse, tracks=tracks)), tmp_path)
    assert len(page.scripts) == 2
    assert not page.handlers
    assert played(page)["workers"][0]["id"].startswith("</script>")
    assert set(page.plots()) == {"lapse", "latency", "waterfall"}


def test_an_infeasible_answer_is_a_report_all_the_same(tmp_path: Path) -> None:
    findings = (make_finding(make_setup(4, 4), 0.0), make_finding(make_setup(mixed=8), 0.0))
    answer = make_answer(findings=findings, best_split=0, best_colocated=1, plateau=())
    page = report(answer, tmp_path)
    assert set(page.plots()) == {"attainment", "goodput"}
    assert "no rate will do" in page.text
    assert "Latency distributions: no set-up holds the targets at any rate." in page.text
    assert "the profile has no price" in page.text


def test_no_split_tried(tmp_path: Path) -> None:
    findings = (make_finding(make_setup(mixed=8), 12.0),)
    page = report(make_answer(findings=findings, best_split=None, best_colocated=0, verdict="8M."), tmp_path)
    assert set(page.plots()) == TUNE_PLOTS - {"goodput"}
    assert "no split was tried" in page.text
    assert "best split" not in page.text


def test_no_colocated_tried_and_no_price(tmp_path: Path) -> None:
    findings = (make_finding(make_setup(4, 4), 12.0, is_priced=False),)
    page = report(make_answer(findings=findings, best_split=0, best_colocated=None, verdict="4P4D."), tmp_path)
    assert set(page.plots()) == TUNE_PLOTS - {"cost"}
    assert "cost / M input" not in page.text
    assert "best colocated" not in page.text


def test_nothing_tried_at_all(tmp_path: Path) -> None:
    page = report(make_answer(findings=(), best_split=None, best_colocated=None, plateau=()), tmp_path)
    assert not page.plots()
    assert "No set-up was tried." in page.text


def test_an_interval_without_an_upper_end_is_drawn_and_written(tmp_path: Path) -> None:
    finding = make_finding(make_setup(4, 4), 12.0)
    open_ended = replace(finding, goodput=replace(make_goodput(12.0), low=11.0, high=math.inf))
    page = report(make_answer(findings=(open_ended,), best_split=0, best_colocated=None), tmp_path)
    assert "11 – ∞" in page.row("4P4D")
    assert set(page.plots()) == TUNE_PLOTS


def test_latencies_that_nobody_has_or_that_never_end_leave_the_rest_standing(tmp_path: Path) -> None:
    finding = make_finding(make_setup(4, 4), 12.0)
    ttft_ms = (*make_picture(12.0).ttft_ms[:-2], math.inf, math.inf)
    picture = replace(make_picture(12.0), ttft_ms=ttft_ms, tpot_ms=())
    page = report(
        make_answer(findings=(replace(finding, picture=picture),), best_split=0, best_colocated=None), tmp_path
    )
    assert set(page.plots()) == TUNE_PLOTS
    assert "TPOT p50" not in page.cells[0]


def test_the_curve_through_noise_falls_and_keeps_closest_to_what_is_sure() -> None:
    assert falling([make_attainment(value) for value in (0.9, 0.5, 0.7, 0.2)]) == pytest.approx([0.9, 0.6, 0.6, 0.2])
    assert falling([make_attainment(0.9, 0.01), make_attainment(0.95, 0.1)]) == pytest.approx([0.9, 0.9], abs=0.002)
    assert falling([]) == []


def test_many_gpus_still_have_readable_names_below_the_axis(tmp_path: Path) -> None:
    findings = tuple(make_finding(make_setup(prefill, 64 - prefill), 30.0 - prefill / 3) for prefill in range(1, 64))
    page = report(make_answer(findings=findings, best_split=0, best_colocated=None, plateau=("1P63D",)), tmp_path)
    written = [one.text or "" for one in page.plots()["goodput"].iter("{http://www.w3.org/2000/svg}text")]
    assert 10 < sum(bool(re.fullmatch(r"\d+P\d+D", text)) for text in written) < 40


def test_the_same_answer_gives_the_same_file(tmp_path: Path, tuned: Page) -> None:
    assert report(make_answer(), tmp_path).source == tuned.source


def test_without_the_packages_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pdserve.cluster.report_")]:
        if not name.endswith("report_html"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib is not installed; run: pip install 'pdserve\[report\]'"):
        write_report(make_answer(), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--html: .*cannot be written"):
        write_report(make_answer(), tmp_path / "missing" / "report.html")
    for path in (tmp_path, tmp_path / "missing" / "report.html"):
        with pytest.raises(ConfigError, match=r"--html: .*cannot be written"):
            require_report(path)
    require_report(tmp_path / "report.html")


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(AttributeError):
        write_report(None, path)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
