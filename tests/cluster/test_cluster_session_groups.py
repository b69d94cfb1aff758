"""Whoever measures on a kernel that may starve the client is told so."""

from __future__ import annotations

from pathlib import Path

from pdserve.cluster.session_groups import warning


def test_only_a_kernel_that_groups_by_session_is_warned_of(tmp_path: Path) -> None:
    switch = tmp_path / "sched_autogroup_enabled"
    assert warning(switch) is None, "no such switch"
    switch.write_text("0\n")
    assert warning(switch) is None
    switch.write_text("1\n")
    found = warning(switch)
    assert found is not None
    assert "sched_autogroup_enabled is 1" in found
