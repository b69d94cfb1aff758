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


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_whatever_comes_between_making_and_renaming_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    (tmp_path / "file").write_text("old")

    def fail(*arguments: object) -> None:
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(failure):
        write_whole("--output", tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_name_may_be_as_long_as_names_can_be_and_no_longer(tmp_path: Path) -> None:
    require_writable("--output", tmp_path / ("a" * 255))
    write_whole("--output", tmp_path / ("a" * 255), "text")
    with pytest.raises(ConfigError, match=r"--output: .*: cannot be written: File name too long"):
        require_writable("--output", tmp_path / ("a" * 256))


def test_links_in_a_circle_are_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(ConfigError, match=r"--output: .*one: cannot be written: "):
        require_writable("--output", tmp_path / "one")


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_whole("--output", tmp_path / "file", "text")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
