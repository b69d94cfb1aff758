"""Runs the proofs one after the other, each in a process of its own and within its time; see `run.sh`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu.proof import FAILED, PROVED, SKIPPED, Skipped, need

TOTAL_S = 590.0
PROOFS_S = {"digest": 80.0, "cuda_ipc": 90.0, "kill": 90.0, "nccl": 120.0, "speed": 90.0, "engine": 110.0}
"""How long each may take."""
PYTEST = ("pytest",)  # the links' contract is written for it
NEEDS = {
    "cuda_ipc": PYTEST,
    "kill": PYTEST,
    "nccl": PYTEST,
    "speed": PYTEST,
    "engine": ("transformers", "pydantic", "safetensors"),
}
"""What a proof imports beyond torch, numpy and xxhash."""
WORDS = {PROVED: "PROVED", FAILED: "FAILED", SKIPPED: "SKIPPED"}


def main(names: list[str]) -> int:
    unknown = set(names) - set(PROOFS_S)
    if unknown:
        print(f"tests/gpu: no such proof: {', '.join(sorted(unknown))}; there are {', '.join(PROOFS_S)}")
        return FAILED
    try:
        need("numpy", "xxhash")
    except Skipped as reason:
        print(f"tests/gpu: SKIPPED: {reason}")
        return SKIPPED
    print(f"tests/gpu: {machine()}")
    until_s = time.monotonic() + TOTAL_S
    found: dict[str, tuple[int, str]] = {}
    for name in names or PROOFS_S:
        start_s = time.monotonic()
        found[name] = run(name, min(PROOFS_S[name], until_s - start_s))
        status, text = found[name]
        print(f"{WORDS[status]:<8} {name:<9} {time.monotonic() - start_s:5.1f} s  {text}")
    return summary(found)


def run(name: str, limit_s: float) -> tuple[int, str]:
    """Exit status and last line; what else it said is shown if it failed."""
    try:
        need(*NEEDS.get(name, ()))
    except Skipped as reason:
        return SKIPPED, str(reason)
    if limit_s <= 0:
        return FAILED, "no time left"
    command = [sys.executable, str(Path(__file__).with_name(f"proof_{name}.py"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as expired:
        show(expired.stdout, expired.stderr)
        return FAILED, f"not done after {limit_s:.0f} s"
    lines = done.stdout.splitlines() or ["it said nothing"]
    status = done.returncode if done.returncode in WORDS else FAILED
    if status == FAILED:
        show("\n".join(lines[:-1]), done.stderr)
        return FAILED, lines[-1] if done.returncode == FAILED else f"exit status {done.returncode}: {lines[-1]}"
    for line in lines[:-1]:
        if line.startswith("{"):  # a row of a measurement
            print(f"         {line}")
    return status, lines[-1]


def show(*outputs: str | bytes | None) -> None:
    for output in outputs:
        text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
        for line in text.splitlines()[-40:]:
            print(f"         {line}")


def summary(found: dict[str, tuple[int, str]]) -> int:
    for status, word in WORDS.items():
        names = [name for name, (its, _) in found.items() if its == status]
        reasons = "".join(f"\n    {name}: {found[name][1]}" for name in names if status != PROVED)
        print(f"tests/gpu: {word.lower()} {len(names)}: {', '.join(names) or '-'}{reasons}")
    outcomes = {status for status, _ in found.values()}
    if FAILED in outcomes:
        return FAILED
    return PROVED if PROVED in outcomes else SKIPPED


def machine() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    nccl = getattr(torch.cuda, "nccl", None)
    version = ".".join(map(str, nccl.version())) if nccl is not None and torch.distributed.is_nccl_available() else "no"
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{len(names)} x {names[0]}, Python {python}, torch {torch.__version__}, NCCL {version}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
