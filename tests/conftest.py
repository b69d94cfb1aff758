"""What every test may rely on: one torch thread, no network for model files, tiny checkpoints built on demand, and
properties that are judged by what they say and not by how long a slow machine takes to try them.

Knows no part of the project; a folder's own fixtures live in that folder's conftest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

# Read by huggingface_hub when it is first imported, so set before `families` imports transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
# `families` and the other shared helpers are plain modules of this folder.
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from families import build_family
from hypothesis import HealthCheck, settings
from transformers.utils import logging as transformers_logging

FamilyDir: TypeAlias = Callable[..., Path]

# A run that others must be able to repeat draws the same examples each time.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("tests")
# Two cores often run several test processes: more threads only wait for each other.
torch.set_num_threads(1)
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> FamilyDir:
    """`family_dir(name, seed=0)`: the folder of that family's tiny checkpoint, written once per session."""
    root = tmp_path_factory.mktemp("families")

    def build(name: str, seed: int = 0) -> Path:
        directory = root / f"{name}-{seed}"
        return directory if directory.exists() else build_family(name, directory, seed)

    return build
