"""The compiled simulator is the same simulator: the same records to the last bit, and nothing of it left to chance."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Run with and without the compiled modules in front: prints what the simulator is, and a digest of every record.
SIMULATE = """
import hashlib, json
import pdserve.engine.scheduler as scheduler
from pdserve.proto.types import Role
from pdserve.cluster.planner.simulation import simulate
from pdserve.cluster.planner.workload import parse_workload
from planner_setups import make_config, make_profile

digests = []
for sizes, num_blocks in (((1, 1, 0), None), ((2, 1, 1), 120), ((0, 0, 2), 90)):
    config = make_config(*sizes, engine={} if num_blocks is None else {"num_blocks": num_blocks})
    for exact in (True, False):
        source = parse_workload("synthetic?prompt=200/500&output=40/120&rate=9").for_model(900).source(9.0, 1, 150)
        outcome = simulate(config, dict.fromkeys(Role, make_profile()), source, exact=exact)
        assert set(outcome.blocks_left.values()) == {0}
        digests.append(hashlib.sha256(repr(outcome.records).encode()).hexdigest())
print(json.dumps({"scheduler": scheduler.__file__, "digests": digests}))
"""


def simulated(*first: Path) -> dict[str, object]:
    path = os.pathsep.join(str(folder) for folder in (*first, ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", SIMULATE], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def compile_into(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "compile.py"), str(folder)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_compiled_or_not_the_records_are_the_same(tmp_path: Path) -> None:
    done = compile_into(tmp_path / "compiled")
    assert done.returncode == 0, done.stdout
    compiled, interpreted = simulated(tmp_path / "compiled"), simulated()
    assert str(compiled["scheduler"]).startswith(str(tmp_path))
    assert str(compiled["scheduler"]).endswith(".so")
    assert str(interpreted["scheduler"]).endswith(".py")
    assert compiled["digests"] == interpreted["digests"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    done = compile_into(tmp_path)
    assert done.returncode == 2
    assert "holds something else" in done.stdout
    assert (tmp_path / "precious").read_text() == "text"
