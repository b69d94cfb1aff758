"""`make demo`: a real model, split into prefill and decode, end to end in under a minute.

Starts one prefill and one decode worker on this machine, streams three completions with the time each spent in every
phase, runs a 10-second load, shuts everything down. `KEEP=1` leaves the cluster up. It only calls what a user can call:
the `pdserve` command and the Python client.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from pdserve.client import Client, Completion
from pdserve.cluster import state

NAME = "demo"
PDSERVE = (sys.executable, "-m", "pdserve.cluster.cli")
PROMPTS = ("import os\n\ndef ", "with open(path) as f:", "def read_json(path):\n    ")


def main() -> int:
    keep = os.environ.get("KEEP") == "1"
    running = state.read(NAME)
    if running is None:
        print("Starting one prefill and one decode worker (Ray, two torch processes, a router) ...", flush=True)
        started_s = time.monotonic()
        subprocess.run([*PDSERVE, "up", "--set", f"name={NAME}", "--detach"], check=True, stdout=subprocess.DEVNULL)
        print(f"Up in {time.monotonic() - started_s:.1f} s.\n")
    else:
        print(f"Using the cluster that is already up at {running.endpoint}.\n")
    try:
        endpoint = state.require(NAME).endpoint
        with Client(endpoint) as client:
            for prompt in PROMPTS:
                show(client, prompt)
        print("A load for 10 seconds: random arrivals, latency counted from the moment each was due.", flush=True)
        load = ["bench", "--endpoint", endpoint, "--workload", "short", "--request-rate", "4", "--num-prompts", "40"]
        subprocess.run([*PDSERVE, *load], check=True)
    finally:
        if not keep and running is None:
            subprocess.run([*PDSERVE, "down", "--name", NAME], check=True)
    if keep:
        print(
            f"\nThe cluster stays up at {endpoint}. Talk to it:\n"
            f'  .venv/bin/pdserve generate --name {NAME} "def quicksort(items):"\n'
            f"  .venv/bin/pdserve status --name {NAME} --watch\n"
            f"  .venv/bin/pdserve down --name {NAME}"
        )
    return 0


def show(client: Client, prompt: str) -> None:
    """Stream one completion and say where its time went."""
    print(prompt, end="", flush=True)
    with client.stream(prompt, max_tokens=48, temperature=0.0, repetition_penalty=1.2) as stream:
        for delta in stream:
            print(delta.text, end="", flush=True)
        print(f"\n    {phases(stream.completion)}\n", flush=True)


def phases(completion: Completion) -> str:
    times = completion.timings
    return (
        f"[{completion.prefill_worker} -> {completion.decode_worker}: "
        f"queue {times.prefill_queue_ms:.1f} ms, prefill {times.prefill_ms:.1f} ms, "
        f"transfer {times.transfer_wait_ms + times.transfer_ms:.1f} ms, "
        f"decode {times.decode_queue_ms + times.decode_ms:.1f} ms for {completion.usage.completion_tokens} tokens; "
        f"first token after {times.ttft_ms:.1f} ms]"
    )


if __name__ == "__main__":
    sys.exit(main())
