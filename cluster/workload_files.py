"""Workloads as `--workload` takes them: one line, or a YAML file, which a mix or a scenario needs.

    read_workload("azure-conv?rate=2x")
    read_workload("drift.yaml")

A file is read whole, within limits, and without YAML's aliases: a small file must not unfold into a huge one. What its
keys mean is `planner.workload`; paths in it are taken from its folder, paths in a line from the current one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pdserve.cluster.arrivals import Arrival
from pdserve.cluster.config import parse_yaml
from pdserve.cluster.planner.source import drain
from pdserve.cluster.planner.workload import parse_workload
from pdserve.cluster.planner.workload_spec import WorkloadSpec
from pdserve.proto.errors import ConfigError

SUFFIXES = (".yaml", ".yml")
MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32
SAMPLE = 2_000
"""Requests that are looked at to see what a workload is like."""

OPENING = (
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
)
CLOSING = (yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken, yaml.BlockEndToken)


def read_workload(written: str) -> WorkloadSpec:
    """The workload of a line or of a file.

    Raises:
        ConfigError: naming the file, or the field and what is wrong with it. Traces are not opened yet.
    """
    path = Path(written.strip()).expanduser()
    if path.suffix.lower() not in SUFFIXES or "?" in written or written.startswith("trace:"):
        return parse_workload(written, Path.cwd())
    tree = _read(path)
    try:
        return parse_workload(tree, path.parent.absolute())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error


def course_warnings(workload: WorkloadSpec) -> tuple[str, ...]:
    """What is to be known of runs in whole courses."""
    course_s = workload.drift_s()
    if not course_s:
        return ()
    return (
        f"the workload changes over {course_s:,.0f} s, and runs of fewer requests than come in that time go through it "
        "faster: queues then fill less than they would, so that goodputs may be too high (docs/planner.md, The course)",
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--workload: {path}: more than {MAX_FILE_BYTES} bytes is too large for a workload")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--workload: {path}: cannot be read: {why}") from error
    try:
        _check_tokens(text)
        tree = parse_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"--workload: {path}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    except ConfigError as error:
        raise ConfigError(f"--workload: {path}: {error.message}") from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"--workload: {path}: expected keys and values, with `kind` or `preset` among the keys")
    return tree


def _check_tokens(text: str) -> None:
    """Before anything is built of them."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > MAX_DEPTH:
            raise ConfigError("nested too deeply for a workload")
        if isinstance(token, yaml.AliasToken):
            raise ConfigError("YAML aliases are not allowed; write the part out again")


def first_ones(spec: WorkloadSpec) -> list[Arrival]:
    """As many requests of a workload as tell what it is like."""
    return list(itertools.islice(drain(spec.source(spec.own_rate() or 1.0, 0, SAMPLE)), SAMPLE))


def share_beyond(whole: WorkloadSpec, longest: int) -> float:
    """Of its requests, how many have more tokens than a model or a worker can hold."""
    seen = first_ones(whole)
    return sum(one.num_prompt_tokens + one.max_tokens > longest for one in seen) / len(seen)
