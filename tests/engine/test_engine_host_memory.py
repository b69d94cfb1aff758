"""A process that keeps what it frees does not fault for it again."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, threading
import torch
from pdserve.engine.host_memory import keep_freed_memory

if {keep}:
    assert keep_freed_memory()

def faults() -> None:
    found = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        sum(torch.ones(size << 18).sum() for size in (1, 8, 48))  # 1, 8 and 48 MiB, one after the other
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # The first steps make the heap, and something small that another thread keeps may split it once more.
    print(min(found[2:]))

thread = threading.Thread(target=faults)  # as the engine: in a thread of its own
thread.start()
thread.join()
"""


def faults_of_a_step(keep: bool) -> int:
    program = PROGRAM.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    return int(done.stdout)


def test_memory_that_is_freed_is_used_again_without_page_faults() -> None:
    assert faults_of_a_step(keep=False) > 48 * 256  # at least the largest one, in pages of 4 KiB
    assert faults_of_a_step(keep=True) < 256
