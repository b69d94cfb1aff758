"""Imports only point down, and the modules that decide touch nothing that acts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT, imported_modules, is_generated, own_module, sources

# cluster -> prefill_worker, decode_worker, router, client -> engine, kv_transfer -> proto; siblings never meet.
# The edge (router, client) stays clear of the engine and the links too: it runs without torch.
ALLOWED: dict[str, frozenset[str]] = {
    "proto": frozenset(),
    "engine": frozenset({"proto"}),
    "kv_transfer": frozenset({"proto"}),
    "client": frozenset({"proto"}),
    "router": frozenset({"proto"}),
    "prefill_worker": frozenset({"engine", "kv_transfer", "proto"}),
    "decode_worker": frozenset({"engine", "kv_transfer", "proto"}),
    "cluster": frozenset(
        {"prefill_worker", "decode_worker", "router", "client", "engine", "kv_transfer", "proto"},
    ),
}

# Pure decision code. Every one of these must exist: a brain that is renamed must be renamed here.
BRAIN_MODULES = frozenset(
    {
        "cluster/pair_links.py",
        "cluster/placement.py",
        "cluster/registry.py",
        "cluster/worker_load.py",
        "decode_worker/timeline.py",
        "engine/block_pool.py",
        "engine/claims.py",
        "engine/plan.py",
        "engine/prefix.py",
        "engine/scheduler.py",
        "engine/sequence.py",
        "engine/turn.py",
        "kv_transfer/effects.py",
        "kv_transfer/lease.py",
        "kv_transfer/lease_step.py",
        "kv_transfer/leases.py",
        "kv_transfer/plan.py",
        "kv_transfer/reservation.py",
        "kv_transfer/reservation_step.py",
        "kv_transfer/reservations.py",
        "proto/errors.py",
        "proto/types.py",
        "router/admission.py",
        "router/candidates.py",
        "router/completion.py",
        "router/detokenizer.py",
        "router/policy.py",
        "router/ranking.py",
        "router/unseen.py",
        "router/view.py",
        "router/validation.py",
    }
)
NOT_IN_A_BRAIN = frozenset({"asyncio", "grpc", "ray", "time", "torch"})

# Run in a fresh interpreter: `names` are imported, then the heavy modules must be absent.
IMPORT_LIGHTLY = """
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
heavy = sorted({{"torch", "ray", "transformers"}} & set(sys.modules))
sys.exit("loaded " + ", ".join(heavy) if heavy else 0)
"""

# As above, with everything but the standard library and the client's declared dependencies made unfindable.
# typing_extensions is grpcio's own dependency.
IMPORT_ALONE = """
import importlib, sys
allowed = {{"grpc", "google", "pdserve", "typing_extensions"}} | set(sys.stdlib_module_names)
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{{name}} is not a dependency of the client", name=name)
        return None
sys.meta_path.insert(0, Blocker())
for name in {names!r}:
    importlib.import_module(name)
"""


def modules_of(folder: str) -> list[str]:
    """Import names of the folder's modules, stubs included, but for what runs on import."""
    paths = sorted((ROOT / folder).glob("*.py"))
    return [f"pdserve.{folder}.{path.stem}" for path in paths if path.stem not in ("__init__", "__main__")]


def run_fresh(script: str, names: list[str]) -> subprocess.CompletedProcess[str]:
    code = script.format(names=names)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def imported_folder(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "pdserve" and len(parts) > 1 else None


@pytest.mark.parametrize("folder", PACKAGES)
def test_imports_only_point_down(folder: str) -> None:
    allowed = ALLOWED[folder] | {folder}
    wrong = [
        f"{path}:{line} imports {name}"
        for path in sources(folder)
        for line, name in imported_modules(path)
        if (target := imported_folder(name)) is not None and target not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_has_its_place_in_the_layers() -> None:
    assert set(ALLOWED) == set(PACKAGES)


def test_the_import_scan_sees_imports_under_type_checking_and_in_functions(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden.py"
    hidden.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from pdserve.router import policy\n"
        "def f():\n    import pdserve.engine.model\n"
    )
    names = {name for _, name in imported_modules(hidden)}
    assert {"pdserve.router.policy", "pdserve.engine.model"} <= names
    assert {imported_folder(name) for name in names} == {None, "router", "engine"}


# All of the planner decides.
PLANNER = frozenset(path.as_posix() for path in sources("cluster/planner"))


@pytest.mark.parametrize("module", sorted(BRAIN_MODULES | PLANNER))
def test_a_brain_reaches_nothing_that_acts(module: str) -> None:
    """Neither directly nor through another of our modules."""
    reached: dict[Path, str] = {Path(module): module}
    todo = [Path(module)]
    wrong = []
    while todo:
        path = todo.pop()
        for line, name in imported_modules(path):
            if name.partition(".")[0] in NOT_IN_A_BRAIN:
                wrong.append(f"{path}:{line} imports {name} (reached as {reached[path]})")
            own = own_module(name)
            if own is not None and own not in reached and not is_generated(own):
                reached[own] = f"{reached[path]} -> {own}"
                todo.append(own)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["client", "router"])
def test_the_edge_starts_without_torch_ray_and_transformers(folder: str) -> None:
    names = modules_of(folder)
    assert names
    result = run_fresh(IMPORT_LIGHTLY, names)
    assert result.returncode == 0, result.stderr


def test_the_client_needs_only_grpcio_and_protobuf() -> None:
    result = run_fresh(IMPORT_ALONE, modules_of("client"))
    assert result.returncode == 0, result.stderr


def test_the_blocker_blocks_what_is_installed_but_not_declared() -> None:
    result = run_fresh(IMPORT_ALONE, ["pydantic"])
    assert result.returncode != 0
    assert "not a dependency of the client" in result.stderr
