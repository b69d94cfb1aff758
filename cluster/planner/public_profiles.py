"""Public files of step times to profiles: tells the three formats apart by their content. Reads no files itself."""

from __future__ import annotations

from pdserve.cluster.planner.public_distserve import distserve_profiles
from pdserve.cluster.planner.public_facts import Conversion
from pdserve.cluster.planner.public_measurements import (
    AICONFIGURATOR_COLUMNS,
    SPLITWISE_COLUMNS,
    aiconfigurator_profiles,
    splitwise_profiles,
)
from pdserve.proto.errors import ConfigError


def convert(text: str, name: str) -> tuple[Conversion, ...]:
    """The profiles of a public file's text; `name` is what messages call the file.

    DistServe's two files differ in name only: one that ends in `vllm.json` is of vLLM's steps.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    if text.lstrip().startswith("{"):
        return distserve_profiles(text, name, "vLLM" if name.endswith("vllm.json") else "DistServe")
    lines = text.splitlines()
    columns = {column.strip() for column in lines[0].split(",")} if lines else set()
    if columns >= set(SPLITWISE_COLUMNS):
        return splitwise_profiles(lines, name)
    if columns >= set(AICONFIGURATOR_COLUMNS):
        return aiconfigurator_profiles(lines, name)
    raise ConfigError(
        f"{name}: is none of the known public formats: CSV with the columns {', '.join(SPLITWISE_COLUMNS)} (Splitwise) "
        f"or {', '.join(AICONFIGURATOR_COLUMNS)} (AIConfigurator), or DistServe's JSON"
    )
