"""A key given twice in a file that people write: an error that names it wherever JSON or YAML is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from planner_setups import make_profile

from pdserve.cluster.config import DEFAULT_CONFIG, load_config
from pdserve.cluster.planner.profile import dump
from pdserve.cluster.planner.public_profiles import convert
from pdserve.cluster.profile_files import read_profile
from pdserve.cluster.prompt_batch import parse_line
from pdserve.cluster.trace import Trace
from pdserve.cluster.unique_keys import unique_keys
from pdserve.cluster.workload_files import read_workload
from pdserve.proto.errors import ConfigError, InvalidRequest

REQUEST = '{"timestamp": 0, "input_length": 5, "output_length": 5}\n'


def test_json_without_repetition_is_what_it_always_was() -> None:
    text = '{"a": {"b": 1}, "b": [{"a": 2}, {"a": 3}], "c": {}}'
    assert json.loads(text, object_pairs_hook=unique_keys) == json.loads(text)


def twice(text: str, field: str) -> str:
    """The text with this line of it written once more, with another value."""
    line = next(line for line in text.splitlines() if line.strip().startswith(f'"{field}":'))
    return text.replace(line, f"{line.partition(':')[0]}: 0.5,\n{line}", 1)


PROFILE = dump(make_profile())
CASES: dict[str, tuple[str, str, str, Callable[[Path], object]]] = {
    "profile": ("one.json", twice(PROFILE, "flip_s"), "flip_s", lambda path: read_profile(str(path))),
    "region": ("one.json", twice(PROFILE, "per_token_s"), "per_token_s", lambda path: read_profile(str(path))),
    "table": ("x.json", '{"a": {"1": {}, "1": {}}}', "1", lambda path: convert(path.read_text(), str(path))),
    "trace": ("t.jsonl", REQUEST + '{"timestamp": 1, "timestamp": 2}\n', "timestamp", lambda path: list(Trace(path))),
    "workload": ("w.yaml", "kind: synthetic\nrate: 2\nrate: 3\n", "rate", lambda path: read_workload(str(path))),
    "flow": ("w.yaml", '{kind: mix, parts: [{share: 1, "share": 2}]}', "share", lambda path: read_workload(str(path))),
    "config": ("c.yaml", "model: a\nname: b\nmodel: c\n", "model", lambda path: load_config(path, [])),
    "section": ("c.yaml", "model: a\nrouter:\n  port: 1\n  port: 2\n", "port", lambda path: load_config(path, [])),
}


@pytest.mark.parametrize("case", CASES)
def test_a_key_given_twice_is_one_error_that_names_file_and_key(case: str, tmp_path: Path) -> None:
    name, text, key, read = CASES[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    assert f"the key {key!r} is given twice" in caught.value.message
    assert name in caught.value.message
    assert "\n" not in caught.value.message


def test_lines_are_named_where_the_reader_knows_them(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: a\nname: b\nmodel: c\n")
    with pytest.raises(ConfigError, match="line 3"):
        load_config(tmp_path / "c.yaml", [])
    (tmp_path / "t.jsonl").write_text(REQUEST + '{"timestamp": 1, "timestamp": 2}\n')
    with pytest.raises(ConfigError, match="line 2: the key 'timestamp'"):
        list(Trace(tmp_path / "t.jsonl"))


def test_one_key_in_two_objects_is_not_given_twice(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: a\nprefill: {replicas: 1}\ndecode: {replicas: 2}\n")
    assert load_config(tmp_path / "c.yaml", []).decode.replicas == 2


def test_an_override_names_its_option() -> None:
    with pytest.raises(ConfigError, match=r"--set prefill: .*the key 'replicas' is given twice"):
        load_config(DEFAULT_CONFIG, ["prefill={replicas: 1, replicas: 2}"])


def test_a_line_of_prompts_is_refused_by_itself() -> None:
    with pytest.raises(InvalidRequest, match="line: the key 'max_tokens' is given twice"):
        parse_line(b'{"prompt": "x", "max_tokens": 1, "max_tokens": 2}', {})
