"""Compile the simulator and the production code that it runs: `python tools/compile.py FOLDER`, or `make compile`.

    the packages --copied--> FOLDER/pdserve --mypyc--> the modules below, three to four times as fast

The result is used by whoever has FOLDER in front: `PYTHONPATH=FOLDER pdserve tune ...`. It is a copy of the moment: the
repository's own modules stay as they are, so that no test and no edit ever meets a stale binary. Needs a C compiler.
Same code, same decisions, same latencies; `tests/test_compile.py` compares them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from native_classes import written_out

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "client",
    "cluster",
    "decode_worker",
    "deploy",
    "engine",
    "kv_transfer",
    "prefill_worker",
    "proto",
    "router",
)

MODULES = (
    "proto.types",
    "engine.prefix",
    "engine.sequence",
    "engine.plan",
    "engine.block_pool",
    "engine.claims",
    "engine.scheduler",
    "engine.turn",
    "kv_transfer.effects",
    "kv_transfer.lease",
    "kv_transfer.lease_step",
    "kv_transfer.leases",
    "kv_transfer.reservation",
    "kv_transfer.reservation_step",
    "kv_transfer.reservations",
    "router.view",
    "router.ranking",
    "router.candidates",
    "router.policy",
    "router.unseen",
    "router.admission",
    "cluster.worker_load",
    "cluster.arrivals",
    "cluster.planner.clock",
    "cluster.planner.prompts",
    "cluster.planner.step_shape",
    "cluster.planner.step_model",
    "cluster.planner.counting_pool",
    "cluster.planner.counting_sequence",
    "cluster.planner.standing",
    "cluster.planner.virtual_engine",
    "cluster.planner.virtual_decode",
    "cluster.planner.virtual_prefill",
    "cluster.planner.virtual_worker",
    "cluster.planner.virtual_links",
    "cluster.planner.virtual_machines",
    "cluster.planner.virtual_fleet",
    "cluster.planner.virtual_router",
    "cluster.planner.source",
    "cluster.planner.course",
)


NAMED_TUPLES = {
    "engine.block_pool": ("PoolCounts",),
    "engine.plan": ("ScheduledSequence", "StepPlan", "SequenceStep", "Committed", "StepResult"),
    "engine.turn": ("Turn",),
    "kv_transfer.lease": ("Lease",),
    "kv_transfer.reservation": ("Reservation",),
}
"""Those that are made or changed all the time and never used as tuples: see `native_classes`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made anew")
    folder = parser.parse_args().folder.resolve()
    if folder.exists() and not (folder / "pdserve").exists() and any(folder.iterdir()):
        parser.error(f"{folder} holds something else; give a new folder")
    compile_into(folder)
    print(f"compiled {len(MODULES)} modules; use them with PYTHONPATH={folder}")


def compile_into(folder: Path) -> None:
    """A copy of the packages with compiled modules in it. Replaces what is there only when all has worked."""
    with tempfile.TemporaryDirectory(prefix="pdserve-compile-") as name:
        tree = Path(name)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, tree / "pdserve" / package, ignore=shutil.ignore_patterns("__pycache__"))
        (tree / "pdserve" / "__init__.py").touch()
        sources = [f"pdserve/{module.replace('.', '/')}.py" for module in MODULES]
        for module, source in zip(MODULES, sources, strict=True):
            text = written_out((tree / source).read_text(), NAMED_TUPLES.get(module, ()))
            (tree / source).write_text(text)
        command = [sys.executable, "-m", "mypyc", "--explicit-package-bases", "--follow-imports=silent", *sources]
        done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            problems = [line for line in done.stdout.splitlines() if re.search(r"\berror:", line)]
            raise SystemExit("\n".join(problems or done.stdout.splitlines()[-20:]))
        shutil.rmtree(tree / "build")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tree, folder, ignore=shutil.ignore_patterns(".mypy_cache"))


if __name__ == "__main__":
    main()
