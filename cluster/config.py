"""The one configuration file: sections composed of each folder's own, read once, frozen.

Unknown keys and wrong types are refused with the path of the key. `--set section.key=value` is applied to the
raw tree before validation, so that both ways in meet the same checks. Learns nothing at run time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml.constructor import ConstructorError

from pdserve.cluster.unique_keys import repeated
from pdserve.engine.config import EngineConfig
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role
from pdserve.router.config import RouterConfig

DEFAULT_CONFIG = Path(__file__).parent.parent / "deploy" / "local.yaml"
MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 8


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PoolConfig(Section):
    """One pool of equal workers. `engine` overrides keys of the common engine section for this role.

    `replicas: null` means 1 for prefill and decode unless mixed workers were asked for, and 0 for mixed.
    `cores` is the number of CPU cores a worker is pinned to; null shares the machine out evenly.
    """

    replicas: int | None = Field(default=None, ge=0, le=4096)
    cores: int | None = Field(default=None, ge=1)
    num_gpus: float = Field(default=0.0, ge=0)
    engine: dict[str, Any] = Field(default_factory=dict)


class RayConfig(Section):
    """`address: null` starts a private Ray on this machine; otherwise join the one named."""

    address: str | None = None
    object_store_memory_bytes: int = Field(default=80_000_000, ge=78_643_200)


class ClusterConfig(Section):
    """Everything a cluster is started from."""

    name: str = "local"
    model: str
    served_model_name: str | None = None
    engine: EngineConfig = Field(default_factory=EngineConfig)
    prefill: PoolConfig = Field(default_factory=PoolConfig)
    decode: PoolConfig = Field(default_factory=PoolConfig)
    mixed: PoolConfig = Field(default_factory=PoolConfig)
    kv_transfer: KVTransferConfig = Field(default_factory=KVTransferConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    worker_start_timeout_s: float = Field(default=180.0, gt=0)

    def pool(self, role: Role) -> PoolConfig:
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}[role]

    def replicas(self, role: Role) -> int:
        """Workers of a role, the unset ones derived: a split pair, unless mixed workers were asked for."""
        asked = self.pool(role).replicas
        if asked is not None:
            return asked
        return 0 if role is Role.MIXED or self.mixed.replicas else 1

    def engine_for(self, role: Role) -> EngineConfig:
        """The common engine section with the role's overrides."""
        try:
            return EngineConfig.model_validate({**self.engine.model_dump(), **self.pool(role).engine})
        except ValidationError as error:
            raise ConfigError(describe(error, prefix=f"{role}.engine")) from error


def load_config(path: Path, overrides: list[str]) -> ClusterConfig:
    """Read, override, validate.

    Relative `model` paths are taken from the file's folder, or from the current one when set by `--set`.

    Raises:
        ConfigError: naming the file or the key.
    """
    tree = _read_yaml(path)
    _anchor_model(tree, path.parent)
    for override in overrides:
        _apply(tree, override)
    _anchor_model(tree, Path.cwd())
    try:
        config = ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {describe(error)}") from error
    _check(config)
    return config


def describe(error: ValidationError, prefix: str = "") -> str:
    """The first problem as `key.path: what is wrong`, and how many more there are."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    key = ".".join([*([prefix] if prefix else []), *(str(part) for part in first["loc"])]) or "file"
    what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {what}{more}"


def _check(config: ClusterConfig) -> None:
    """What no single section can see."""
    for role in Role:
        config.engine_for(role)
    split = config.replicas(Role.PREFILL), config.replicas(Role.DECODE)
    if config.replicas(Role.MIXED) == 0 and 0 in split:
        raise ConfigError(
            f"prefill.replicas, decode.replicas: {split[0]} and {split[1]} cannot serve; "
            "give both at least 1, or set mixed.replicas"
        )


class _StrictLoader(yaml.SafeLoader):
    """Safe loading without aliases (a small file must not unfold into a huge tree) and without keys given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("YAML aliases are not allowed")
        if len(self.states) > 16 * MAX_DEPTH:
            raise ConfigError("nested too deeply")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(problem=repeated(key.value), problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def parse_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ConfigError: it has aliases, or is nested too deeply.
        yaml.YAMLError: it is not YAML, or has a key twice in one place.
    """
    return yaml.load(text, Loader=_StrictLoader)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        size = os.stat(path).st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: {size} bytes is too large for a configuration file")
        text = path.read_text(encoding="utf-8")
        tree = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """`section.key=value`, the value read as YAML."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--set {key}: {error}") from error
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(f"--set {key}: the value is not valid YAML: {why}") from error
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {part} is not a section")
        node = child
    node[parts[-1]] = value


def _anchor_model(tree: dict[str, Any], folder: Path) -> None:
    model = tree.get("model")
    if isinstance(model, str) and model and not Path(model).expanduser().is_absolute():
        tree["model"] = str((folder / model).resolve())
    elif isinstance(model, str) and model:
        tree["model"] = str(Path(model).expanduser())
