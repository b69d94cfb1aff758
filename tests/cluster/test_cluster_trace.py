"""Trace files: three shapes, and every way in which a line can be bad."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path

import pytest

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.trace import MAX_BLANK_BYTES, MAX_LINE_BYTES, Trace, TraceOptions, parse_window
from pdserve.proto.errors import ConfigError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.6805900,396,109\n"
    "2023-11-17 00:00:00,5,6\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "7.5,GPT-4,10,20,30,x\n"
)
SERVEGEN = (
    "timestamp_s,client_id,input_tokens,output_tokens,reason_ratio\n0.005,54,594,214,0.507\n0.009,47,45,437,0.890\n"
)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def mooncake(*rows: tuple[int, int, int]) -> str:
    return "".join(
        f'{{"timestamp": {t}, "input_length": {i}, "output_length": {o}, "hash_ids": [0, {t}]}}\n' for t, i, o in rows
    )


def load(folder: Path, content: str | bytes, **options: object) -> list[Arrival]:
    return list(Trace(write(folder, content), TraceOptions(**options)))  # type: ignore[arg-type]


def test_csv_with_date_times(tmp_path: Path) -> None:
    found = load(tmp_path, AZURE)
    assert [(a.num_prompt_tokens, a.max_tokens) for a in found] == [(374, 44), (396, 109), (5, 6)]
    assert [a.at_s for a in found] == pytest.approx([0.0, 4.0, 20653.31941], abs=1e-4)


def test_date_times_with_a_zone_keep_their_distance(tmp_path: Path) -> None:
    content = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5+00:00,1,2\n2024-05-10 02:00:01.5+02:00,1,2\n"
    )
    assert [a.at_s for a in load(tmp_path, content)] == [0.0, 1.0]


def test_csv_with_seconds(tmp_path: Path) -> None:
    assert load(tmp_path, BURSTGPT) == [Arrival(0.0, 472, 18), Arrival(2.5, 10, 20)]
    assert [(a.num_prompt_tokens, a.max_tokens) for a in load(tmp_path, SERVEGEN)] == [(594, 214), (45, 437)]


def test_jsonl_spreads_a_coarse_stamp_until_the_next(tmp_path: Path) -> None:
    content = mooncake((0, 10, 1), (0, 20, 2), (0, 30, 3), (3000, 40, 4), (3000, 50, 5), (13000, 60, 6), (13000, 70, 7))
    found = load(tmp_path, content)
    assert [a.at_s for a in found] == pytest.approx([0, 1, 2, 3, 4.5, 13, 14.5])
    assert [a.num_prompt_tokens for a in found] == [10, 20, 30, 40, 50, 60, 70]
    assert found[3].prefix_ids == (0, 3000)
    assert [a.at_s for a in load(tmp_path, content, spread_s=0.0)] == [0, 0, 0, 3, 3, 13, 13]


@pytest.mark.parametrize("content", [AZURE, BURSTGPT, SERVEGEN, mooncake((0, 1, 2), (1000, 3, 4))])
def test_gzip_crlf_bom_blank_lines_and_a_missing_last_newline_change_nothing(tmp_path: Path, content: str) -> None:
    plain = load(tmp_path, content)
    lines = content.splitlines()
    assert load(tmp_path, gzip.compress(content.encode())) == plain
    assert load(tmp_path, "\r\n".join(lines) + "\r\n") == plain
    assert load(tmp_path, b"\xef\xbb\xbf" + content.encode()) == plain
    assert load(tmp_path, "\n\n" + "\n \n".join(lines)) == plain


def test_jitter_spreads_a_coarse_stamp_at_random_in_order_and_alike_each_time(tmp_path: Path) -> None:
    rows = [(3000 * stamp, 10 * stamp + n + 1, 1) for stamp in range(200) for n in range(9)]
    trace = Trace(write(tmp_path, mooncake(*rows)), TraceOptions(jitter=True))
    found = list(trace)
    assert [a.num_prompt_tokens for a in found] == [prompt for _, prompt, _ in rows]
    assert all(3 * (n // 9) <= a.at_s < 3 * (n // 9 + 1) for n, a in enumerate(found))
    assert sum(a.at_s % 3.0 for a in found) / len(found) == pytest.approx(1.5, rel=0.05)
    assert len({round(a.at_s % 3.0, 6) for a in found}) > 1700
    assert list(trace) == found
    fine = Trace(write(tmp_path, SERVEGEN), TraceOptions(jitter=True))
    assert list(fine) == load(tmp_path, SERVEGEN)


def test_the_version_of_a_trace_changes_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE)
    before = Trace(path).version()
    assert Trace(path).version() == before
    path.write_text(BURSTGPT)
    assert Trace(path).version() != before
    with pytest.raises(ConfigError, match="missing: cannot be read"):
        Trace(tmp_path / "missing").version()


def test_scaling_and_the_window(tmp_path: Path) -> None:
    rows = mooncake(*((second * 1000, 100, 10) for second in range(10)))
    assert [a.at_s for a in load(tmp_path, rows, rate_scale=4.0)] == pytest.approx([s / 4 for s in range(10)])
    cut = load(tmp_path, rows, window_s=(3.0, 6.0), rate_scale=2.0)
    assert [a.at_s for a in cut] == pytest.approx([0.0, 0.5, 1.0])
    assert {(a.num_prompt_tokens, a.max_tokens) for a in load(tmp_path, rows, length_scale=0.05)} == {(5, 1)}


def test_empty_requests_are_skipped_and_counted(tmp_path: Path) -> None:
    trace = Trace(write(tmp_path, "timestamp,input_tokens,output_tokens\n0,5,0\n1,0,5\n2,5,5\n"))
    assert list(trace) == [Arrival(2.0, 5, 5)]
    assert trace.num_skipped == 2
    list(trace)
    assert trace.num_skipped == 2


HEAD = "timestamp,input_tokens,output_tokens\n0,1,1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "holds no requests", id="empty file"),
        pytest.param("\n \n", "holds no requests", id="blank file"),
        pytest.param("timestamp,input_tokens,output_tokens\n", "holds no requests", id="header alone"),
        pytest.param("a,b,c\n1,2,3\n", "line 1: the header names none", id="unknown header"),
        pytest.param(HEAD + "1,2\n", "line 3: has 2 columns", id="short row"),
        pytest.param(HEAD + "1,2,3,4\n", "line 3: has 4 columns", id="long row"),
        pytest.param(HEAD + "soon,2,3\n", "line 3: time: 'soon'", id="no time"),
        pytest.param(HEAD + "nan,2,3\n", "line 3: time", id="nan time"),
        pytest.param(HEAD + "1,-2,3\n", "line 3: '-2'", id="negative count"),
        pytest.param(HEAD + "1,2.5,3\n", "line 3: '2.5'", id="half a token"),
        pytest.param(HEAD + "1,1e99,3\n", "line 3: '1e99'", id="huge count"),
        pytest.param(HEAD + "1,inf,3\n", "line 3: 'inf'", id="endless count"),
        pytest.param(HEAD + "1,,3\n", "line 3: '' is not a number of tokens", id="no count"),
        pytest.param(HEAD + "1,many,3\n", "line 3: 'many' is not a number of tokens", id="a word for a count"),
        pytest.param(HEAD + "5,1,1\n\n4,1,1\n", "line 5: its time is before", id="back in time"),
        pytest.param(HEAD + '1,"2,3\n', "line 3", id="open quote"),
        pytest.param(HEAD.encode() + b"\xff,1,1\n", "line 3: is not UTF-8", id="not text"),
        pytest.param(HEAD + "1,1,1" + " " * MAX_LINE_BYTES + "\n", "line 3: longer than", id="huge line"),
        pytest.param(mooncake((0, 1, 1)) + "{oops\n", "line 2: is not JSON", id="not JSON"),
        pytest.param(mooncake((0, 1, 1)) + "[1]\n", "line 2: is not a JSON object", id="not an object"),
        pytest.param(mooncake((0, 1, 1)) + "[" * 200_000 + "\n", "line 2", id="deep nesting"),
        pytest.param('{"timestamp": 0, "input_length": 1}\n', "line 1: output_length: is missing", id="no output"),
        pytest.param('{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', "line 1: timestamp", id="NaN"),
        pytest.param('{"timestamp": true, "input_length": 1, "output_length": 1}\n', "timestamp", id="true time"),
        pytest.param('{"timestamp": 0, "input_length": [1], "output_length": 1}\n', "line 1", id="list count"),
        pytest.param(
            '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [-1]}\n', "hash_ids", id="hash id"
        ),
        pytest.param(gzip.compress(HEAD.encode())[:-12], "cannot be read", id="truncated gzip"),
        pytest.param(b"\x1f\x8bjunk junk junk", "cannot be read", id="not really gzip"),
    ],
)
def test_a_bad_file_is_one_typed_error_that_names_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, content)
    assert message in caught.value.message
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_opened_is_a_typed_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        list(Trace(tmp_path / name))


def test_an_empty_window_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in the window 50:60"):
        load(tmp_path, AZURE.rsplit("2023", 1)[0], window_s=(50.0, 60.0))


@pytest.mark.parametrize("options", [{"rate_scale": 0}, {"rate_scale": -1}, {"length_scale": 0}, {"spread_s": -1}])
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, AZURE, **options)


def test_windows_are_written_start_colon_end() -> None:
    assert parse_window("5:10") == (5.0, 10.0)
    assert parse_window(":10") == (0.0, 10.0)
    assert parse_window("5:") == (5.0, float("inf"))
    for bad in ("5", "a:b", "10:5", "-1:5", "nan:1", "1:nan", ""):
        with pytest.raises(ConfigError, match="window"):
            parse_window(bad)


def test_a_long_trace_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "".join(f"{n},5,5\n" for n in range(1, 20_000)))
    tracemalloc.start()
    try:
        count = sum(1 for _ in Trace(path))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak_bytes < 512 << 10


def test_blank_lines_without_end_are_not_read_to_their_end(tmp_path: Path) -> None:
    """They are refused before the junk that the file ends with, so that it cannot have been read that far."""
    blank = gzip.compress(HEAD.encode() + b"\n" * (MAX_BLANK_BYTES + (64 << 10)))
    with pytest.raises(ConfigError, match=rf"line {MAX_BLANK_BYTES + 3}: more than {MAX_BLANK_BYTES} bytes of blank"):
        load(tmp_path, blank + b"junk")


def test_blank_lines_with_requests_between_them_may_be_many(tmp_path: Path) -> None:
    gap = b" " * (MAX_BLANK_BYTES // 2 - 1) + b"\n"
    assert len(load(tmp_path, HEAD.encode() + gap + gap + b"1,1,1\n" + gap + b"2,1,1\n")) == 3


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "trace.csv"
    os.mkfifo(fifo)
    with pytest.raises(ConfigError, match="no regular file"):
        list(Trace(fifo))
