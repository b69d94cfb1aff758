"""Set-ups in a word, as `2M`, `1P1D` or `1P1D1M`, to configurations. Pure."""

from __future__ import annotations

import os
import re
from typing import Any

from pdserve.cluster.config import ClusterConfig
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

SET_UP = re.compile(r"(?:(\d{1,3})P)?(?:(\d{1,3})D)?(?:(\d{1,3})M)?", re.IGNORECASE)


def set_up_config(settings: ClusterConfig, written: str) -> ClusterConfig:
    """The configuration with these workers; without any said, as it is. The cluster gets a name of its own.

    Raises:
        ConfigError: the word is none of these, or such workers cannot serve.
    """
    name = f"{settings.name[:20]}-validate-{os.getpid()}"
    if not written:
        return settings.model_copy(update={"name": name})
    found = SET_UP.fullmatch(written)
    if found is None:
        raise ConfigError(f"--setup: {written!r} is no set-up; write 2M, 1P1D or 1P1D1M")
    prefill, decode, mixed = (int(count or 0) for count in found.groups())
    if not mixed and not (prefill and decode):
        raise ConfigError(f"--setup: {written!r} cannot serve; give at least 1P1D, or 1M")
    sizes = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
    pools: dict[str, Any] = {
        str(role): settings.pool(role).model_copy(update={"replicas": count}) for role, count in sizes.items()
    }
    return settings.model_copy(update={**pools, "name": name})
