"""A private Ray for a whole test session: prints its address, ends when its stdin closes.

Clusters under test join it (`ray.address`), which saves each of them Ray's own start. It dies with the tests.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import ray

with tempfile.TemporaryDirectory(prefix="pdserve-") as folder:
    context: Any = ray.init(
        num_cpus=16,  # tests share the real cores; Ray must not queue them
        include_dashboard=False,
        object_store_memory=80_000_000,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
    )
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
