"""The configuration file: what is refused, by which name, and what is derived."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.cluster.config import DEFAULT_CONFIG, load_config
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_the_shipped_configuration_is_a_split_pair_over_the_shipped_model() -> None:
    config = load_config(DEFAULT_CONFIG, [])
    assert [config.replicas(role) for role in Role] == [1, 1, 0]
    assert Path(config.model) == DEFAULT_CONFIG.parent / "models" / "demo"


def test_asking_for_mixed_workers_alone_gives_no_split_pair() -> None:
    config = load_config(DEFAULT_CONFIG, ["mixed.replicas=2"])
    assert [config.replicas(role) for role in Role] == [0, 0, 2]
    both = load_config(DEFAULT_CONFIG, ["mixed.replicas=1", "prefill.replicas=1", "decode.replicas=2"])
    assert [both.replicas(role) for role in Role] == [1, 2, 1]


def test_a_relative_model_is_found_from_the_file_or_from_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "model: weights")
    assert load_config(path, []).model == str(tmp_path / "weights")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_config(path, ["model=other"]).model == str(elsewhere / "other")


def test_a_role_overrides_keys_of_the_common_engine_section() -> None:
    config = load_config(DEFAULT_CONFIG, ["engine.max_num_seqs=32", "decode.engine.max_num_seqs=8"])
    assert config.engine_for(Role.DECODE).max_num_seqs == 8
    assert config.engine_for(Role.PREFILL).max_num_seqs == 32


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("engine.blocksize=16", "engine.blocksize: unknown key"),
        ("enginee.block_size=16", "enginee: unknown key"),
        ("engine.block_size=zero", "engine.block_size"),
        ("engine.block_size=0", "engine.block_size"),
        ("engine.max_num_batched_tokens=-1", "engine.max_num_batched_tokens"),
        ("prefill.replicas=-1", "prefill.replicas"),
        ("prefill.replicas=0", "prefill.replicas, decode.replicas"),
        ("prefill.replicas=two", "prefill.replicas"),
        ("decode.engine.block_size=0", "decode.engine.block_size"),
        ("decode.engine.nonsense=1", "decode.engine.nonsense: unknown key"),
        ("kv_transfer.links=[carrier_pigeon]", "kv_transfer.links"),
        ("kv_transfer.links=[gloo, gloo]", "kv_transfer.links"),
        ("kv_transfer.renew_s=99", "kv_transfer"),
        ("kv_transfer.digest_key=secret", "kv_transfer.digest_key"),
        ("kv_transfer.digest_key=aabb", "kv_transfer.digest_key"),
        ("kv_transfer.wire_dtype=int4", "kv_transfer.wire_dtype"),
        ("kv_transfer.digest_key=' '", "kv_transfer.digest_key"),
        ("kv_transfer.max_pulls=0", "kv_transfer.max_pulls"),
        ("kv_transfer.max_pulls=1000", "kv_transfer.max_pulls"),
        ("kv_transfer.transfer_timeout_s=.inf", "kv_transfer.transfer_timeout_s"),
        ("kv_transfer.lease_s=.nan", "kv_transfer.lease_s"),
        ("kv_transfer.control_timeout_s=1.0e+10", "kv_transfer.control_timeout_s"),
        ("kv_transfer.host=", "kv_transfer.host"),
        ("kv_transfer.host='::1'", "kv_transfer.host"),
        ("kv_transfer.host='127.0.0.1:80'", "kv_transfer.host"),
        ("engine.kv_cache_dtype=int4", "engine.kv_cache_dtype"),
        ("router.port=70000", "router.port"),
        ("router.slo.ttft_ms=-5", "router.slo.ttft_ms"),
        ("model=[1]", "model"),
        ("engine=5", "engine"),
        ("engine.block_size", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("engine..x=5", "expected section.key=value"),
        ("a.b.c.d.e.f.g.h.i=1", "expected section.key=value"),
        ("name={", "name: the value is not valid YAML"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_its_path(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEFAULT_CONFIG, [override])
    assert named in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "expected a mapping"),
        ("- a list", "expected a mapping"),
        ("model: [", "not valid YAML"),
        ("model: x\n\tname: y", "not valid YAML"),
        ("model: &a x\nname: *a", "aliases are not allowed"),
        ("model: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("[" * 5000, "YAML"),
        ("name: local", "model: Field required"),
        ("# " + "x" * (2 << 20), "too large"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), [])
    assert named in caught.value.message or "nested too deeply" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml", [])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(binary, [])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, [])
