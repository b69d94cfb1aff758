"""Trace files to arrivals, a line at a time.

Three shapes, told apart by content: CSV with date-time stamps (Azure), CSV with seconds (BurstGPT, ServeGen), JSONL
with milliseconds, lengths and `hash_ids` (Mooncake); each plain or gzipped. A line that cannot be read stops the
run with its number. Documented exception: a request of zero prompt or output tokens (traces log failed calls that
way) is skipped and counted. Knows nothing of how or whether the requests are sent.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import IO, TypeAlias, cast

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.unique_keys import unique_keys
from pdserve.proto.errors import ConfigError

MAX_LINE_BYTES = 1 << 20
MAX_BLANK_BYTES = 1 << 20
"""Of blank lines in a row: a few kilobytes unpack to gigabytes of them, and reading would not end."""
MAX_GROUP = 100_000
MAX_TOKENS = 10_000_000
GZIP_MAGIC = b"\x1f\x8b"

TIME_COLUMNS = ("timestamp", "timestamp_s", "time_s", "arrival_time", "arrived_at")
PROMPT_COLUMNS = ("contexttokens", "request tokens", "input_tokens", "input_length", "prompt_tokens")
OUTPUT_COLUMNS = ("generatedtokens", "response tokens", "output_tokens", "output_length", "completion_tokens")

# Time in seconds, prompt tokens, output tokens, prefix ids: cheaper than an Arrival, of which one is made in the end.
Row: TypeAlias = tuple[float, int, int, tuple[int, ...]]
Parser: TypeAlias = Callable[[str], Row]


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace is replayed. All times are of the trace, before scaling.

    `rate_scale` 2 sends twice as fast. `window_s` keeps what comes in `[start, end)` after the first stamp, moved to
    start at 0. `spread_s` is the resolution of coarse JSONL stamps: requests that share one are spread evenly until
    the next stamp, at most this long; 0 leaves them together. `jitter` spreads them at random instead, the same way in
    every reading: evenly they come more regularly than requests do. `length_scale` multiplies all token counts.
    """

    rate_scale: float = 1.0
    window_s: tuple[float, float] = (0.0, math.inf)
    spread_s: float = 3.0
    length_scale: float = 1.0
    jitter: bool = False


class Trace:
    """A trace file that can be read any number of times; `num_skipped` is of the latest reading."""

    def __init__(self, path: Path, options: TraceOptions | None = None) -> None:
        self.path = path
        self.options = options or TraceOptions()
        self.num_skipped = 0
        _check_options(self.options)

    def __iter__(self) -> Iterator[Arrival]:
        """Arrivals in order of time.

        Raises:
            ConfigError: the file cannot be read, or a line of it; the message names file and line.
        """
        start_s, end_s = self.options.window_s
        rate_scale, length_scale = self.options.rate_scale, self.options.length_scale
        num_arrivals = 0
        for at_s, prompt, output, prefix_ids in self._spread():
            if at_s >= end_s:
                break
            if at_s < start_s:
                continue
            num_arrivals += 1
            if length_scale != 1.0:
                prompt, output = max(1, round(prompt * length_scale)), max(1, round(output * length_scale))
            yield Arrival((at_s - start_s) / rate_scale, prompt, output, prefix_ids)
        if num_arrivals == 0:
            where = "" if (start_s, end_s) == (0.0, math.inf) else f" in the window {start_s:g}:{end_s:g}"
            raise ConfigError(f"{self.path}: holds no requests{where}")

    def version(self) -> tuple[int, int]:
        """Changes with the file, so that what was learned from it can be kept for as long as it is true.

        Raises:
            ConfigError: there is no such file.
        """
        try:
            found = self.path.stat()
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return found.st_size, found.st_mtime_ns

    def _spread(self) -> Iterator[Row]:
        """Rows with times from the first stamp on, groups of one coarse stamp spread out."""
        group: list[Row] = []
        spread_s = 0.0
        random = Random(0) if self.options.jitter else None
        for row, is_coarse in self._read():
            spread_s = self.options.spread_s if is_coarse else 0.0
            if spread_s == 0.0:
                yield row
                continue
            if group and row[0] > group[0][0]:
                yield from _spread_group(group, min(spread_s, row[0] - group[0][0]), random)
                group = []
            group.append(row)
            if len(group) > MAX_GROUP:
                raise ConfigError(f"{self.path}: more than {MAX_GROUP} requests share one time stamp")
        yield from _spread_group(group, spread_s, random)

    def _read(self) -> Iterator[tuple[Row, bool]]:
        """Rows at trace times less the first one, and whether their stamps are coarse."""
        self.num_skipped = 0
        parse: Parser | None = None
        first_s = latest_s = -math.inf
        for number, line in _lines(self.path):
            try:
                if parse is None and not line.startswith("{"):
                    parse = _csv_parser(line)
                    continue
                parse = parse or _parse_json
                at_s, prompt, output, prefix_ids = parse(line)
                if at_s < latest_s:
                    raise ValueError("its time is before that of the line above")
            except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, csv.Error) as error:
                raise ConfigError(f"{self.path}: line {number}: {_reason(error)}") from error
            first_s = at_s if first_s == -math.inf else first_s
            latest_s = at_s
            if prompt == 0 or output == 0:
                self.num_skipped += 1
                continue
            yield (at_s - first_s, prompt, output, prefix_ids), parse is _parse_json


def parse_window(text: str) -> tuple[float, float]:
    """`START:END` in seconds, either side may be left out."""
    start, separator, end = text.partition(":")
    try:
        window = float(start or 0), float(end or math.inf)
    except ValueError:
        window = (math.nan, math.nan)
    if not separator or not 0 <= window[0] < window[1]:
        raise ConfigError(f"window: {text!r} is not START:END in seconds")
    return window


def _check_options(options: TraceOptions) -> None:
    for name, value in (("rate-scale", options.rate_scale), ("length-scale", options.length_scale)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}: {value!r} is not a positive number")
    if not (math.isfinite(options.spread_s) and options.spread_s >= 0):
        raise ConfigError(f"spread: {options.spread_s!r} is not a number of seconds")


def _spread_group(group: list[Row], interval_s: float, random: Random | None) -> Iterator[Row]:
    """A group over the interval that its stamp stands for, in its order."""
    if random is None:
        parts = [position / len(group) for position in range(len(group))]
    else:
        parts = sorted(random.random() for _ in group)
    for part, (at_s, prompt, output, prefix_ids) in zip(parts, group, strict=True):
        yield at_s + interval_s * part, prompt, output, prefix_ids


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, never more than one in memory."""
    number = num_blank_bytes = 0
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: cannot be read: is no regular file, and a trace is read more than once")
    try:
        with path.open("rb") as probe:
            zipped = probe.read(2) == GZIP_MAGIC
        with cast("IO[bytes]", gzip.open(path, "rb") if zipped else path.open("rb")) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}: line {number}: longer than {MAX_LINE_BYTES} bytes")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    num_blank_bytes = 0
                    yield number, text
                    continue
                num_blank_bytes += len(line)
                if num_blank_bytes > MAX_BLANK_BYTES:
                    raise ConfigError(
                        f"{path}: line {number}: more than {MAX_BLANK_BYTES} bytes of blank lines in a row; "
                        "take them out if this is a trace"
                    )
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: line {number}: is not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _csv_parser(header: str) -> Parser:
    """A parser of the rows under this header."""
    names = [name.strip().lower() for name in next(csv.reader([header]))]
    time, prompt, output = (_column(names, known) for known in (TIME_COLUMNS, PROMPT_COLUMNS, OUTPUT_COLUMNS))

    def parse(line: str) -> Row:
        row = next(csv.reader([line])) if '"' in line else line.split(",")
        if len(row) != len(names):
            raise ValueError(f"has {len(row)} columns, the header has {len(names)}")
        return _seconds(row[time]), _count(row[prompt]), _count(row[output]), ()

    return parse


def _column(names: list[str], known: tuple[str, ...]) -> int:
    for name in known:
        if name in names:
            return names.index(name)
    raise ValueError(f"the header names none of the columns {', '.join(known)}")


def _parse_json(line: str) -> Row:
    entry = json.loads(line, object_pairs_hook=unique_keys)
    if not isinstance(entry, dict):
        raise ValueError("is not a JSON object")
    hash_ids = entry.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(type(value) is int and 0 <= value < 1 << 63 for value in hash_ids):
        raise ValueError("hash_ids: is not a list of whole numbers")
    stamp_ms = entry["timestamp"]
    if isinstance(stamp_ms, bool) or not isinstance(stamp_ms, int | float) or not math.isfinite(stamp_ms):
        raise ValueError(f"timestamp: {stamp_ms!r} is not a number of milliseconds")
    return stamp_ms / 1e3, _count(entry["input_length"]), _count(entry["output_length"]), tuple(hash_ids)


def _seconds(text: str) -> float:
    """Seconds, or a date and time (UTC unless it says otherwise) as seconds since 1970."""
    try:
        value = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(f"time: {text!r} is neither seconds nor a date and time") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(value):
        raise ValueError(f"time: {text!r} is not a moment")
    return value


def _count(value: object) -> int:
    """A number of tokens; `12.0` is a whole number too."""
    if isinstance(value, str) and len(value) < 8 and value.isdecimal():
        return int(value)
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not 0 <= number <= MAX_TOKENS or number != int(number):
        raise ValueError(f"{value!r} is not a number of tokens")
    return int(number)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]}: is missing"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg} at column {error.colno})"
    return str(error)
