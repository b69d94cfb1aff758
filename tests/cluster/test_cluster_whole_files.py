"""A file is written whole or not at all, and nothing that is no file is ever replaced by one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdserve.cluster.whole_files import require_writable, write_whole
from pdserve.proto.errors import ConfigError


def test_what_is_no_regular_file_stays_what_it_is(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for place in (fifo, tmp_path):
        with pytest.raises(ConfigError, match=r"--html: .*: is no regular file"):
            write_whole("--html", place, "page")
    assert fifo.is_fifo()


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("real")
    write_whole("--html", link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_folder_that_does_not_exist_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a file in a folder that exists"):
        require_writable("--output", tmp_path / "nowhere" / "file")
    require_writable("--output", tmp_path / "file")
    assert not (tmp_path / "file").exists()
