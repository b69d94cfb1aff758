"""Deaths and role flips as they are written on a command line."""

from __future__ import annotations

import math

import pytest

from pdserve.cluster.planner.steering import Fail, Flip
from pdserve.cluster.steering_options import parse_script
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

WORKERS = ("prefill-0", "prefill-1", "decode-0")


def test_actions_come_in_order_of_time() -> None:
    script = parse_script(["decode-0@60+30", "prefill-0@5.5"], ["prefill-1@20=decode"], WORKERS)
    found = []
    while script.next_s() < math.inf:
        now_s = script.next_s()
        found += [(now_s, action) for action in script.act(now_s, (), 0)]
    assert found == [
        (5.5, Fail("prefill-0", math.inf)),
        (20.0, Flip("prefill-1", Role.DECODE)),
        (60.0, Fail("decode-0", 30.0)),
    ]


@pytest.mark.parametrize(
    ("written", "at_s", "back_s"),
    [
        ("1e9", 1e9, math.inf),
        ("1e+3", 1e3, math.inf),
        ("1e+3+30", 1e3, 30.0),
        (".5+1e-3", 0.5, 1e-3),
        ("1_000+1e+2", 1000.0, 100.0),
        ("0+0", 0.0, 0.0),
    ],
)
def test_seconds_are_whatever_float_reads(written: str, at_s: float, back_s: float) -> None:
    assert parse_script([f"decode-0@{written}"], [], WORKERS).left == ((at_s, Fail("decode-0", back_s)),)


def test_a_flip_may_be_at_any_such_moment_too() -> None:
    assert parse_script([], ["decode-0@1e+3=mixed"], WORKERS).left == ((1e3, Flip("decode-0", Role.MIXED)),)


@pytest.mark.parametrize(
    ("failures", "flips", "message"),
    [
        (["decode-0"], [], "--fail: 'decode-0' is not WORKER@SECONDS"),
        (["decode-0@soon"], [], "is not WORKER@SECONDS"),
        (["decode-0@1.2.3"], [], "'decode-0@1.2.3' is not WORKER@SECONDS"),
        (["decode-0@60+"], [], "is not WORKER@SECONDS"),
        (["decode-0@-1"], [], "--fail: -1 s is no moment; give a number of seconds from 0 on"),
        (["decode-0@5+-1"], [], "--fail: -1 s is no moment"),
        (["decode-0@nan"], [], "--fail: nan s is no moment"),
        ([], ["decode-0@inf=prefill"], "--flip: inf s is no moment"),
        (["decode-9@60"], [], "there is no worker decode-9; there are prefill-0, prefill-1, decode-0"),
        ([], ["prefill-1@20"], "--flip: 'prefill-1@20' is not WORKER@SECONDS=ROLE"),
        ([], ["prefill-1@20=router"], "router is no role; one of prefill, decode, mixed"),
    ],
)
def test_what_makes_no_sense_is_named(failures: list[str], flips: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_script(failures, flips, WORKERS)
    assert message in str(caught.value)
