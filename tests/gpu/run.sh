#!/bin/sh
# What only a GPU can prove: docs/gpu.md says what that is. One line per proof, at the end what was proved, what was
# skipped, and why. At most ten minutes, no network, from a plain checkout: nothing needs to be installed but torch
# with CUDA, numpy and xxhash (and, for the engine, transformers and pydantic).
#
#   PYTHON   the interpreter to use instead of the first one found that sees a GPU
#   ARGS     names of proofs to run instead of all, e.g. ARGS="digest speed"
#
# Exit status: 0 all that ran was proved, 1 something failed, 77 skipped (no GPU, or no torch that can use it).

root=$(cd "$(dirname "$0")/../.." && pwd) || exit 1
sees_gpu='import sys, torch; sys.exit(sys.version_info < (3, 11) or not torch.cuda.is_available())'

chosen=
tried=
for candidate in ${PYTHON:-"$root/.venv/bin/python" python3 python /opt/*/.venv/bin/python3 /opt/*/bin/python3}; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    tried="$tried $candidate"
    if "$candidate" -c "$sees_gpu" >/dev/null 2>&1; then
        chosen=$candidate
        break
    fi
done
if [ -z "$chosen" ]; then
    echo "tests/gpu: SKIPPED: no Python 3.11 here has a torch that sees a GPU (tried:${tried:- nothing})"
    exit 77
fi

# The folders at the root are the package pdserve; a link gives them that name, installed or not.
home=$(mktemp -d) || exit 1
trap 'rm -rf "$home"' EXIT INT TERM
ln -s "$root" "$home/pdserve" || exit 1
PYTHONPATH="$home:$root/tests" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 \
    "$chosen" "$root/tests/gpu/run.py" $ARGS
