"""`make setup`: the project's virtual environment, built once, from the exact versions in constraints.txt.

torch comes first and by itself, because it has one build per kind of machine: on Linux without an NVIDIA GPU the CPU
build is asked for, and a build that would bring several GB of CUDA packages is refused before they are downloaded.
Everything else is installed as listed, without resolving. A stamp written last says what the folder holds: an
interrupted set-up has none and is redone, a finished one is recognised at once and needs no network.

Standard library only. Knows nothing of package indexes: pip's own configuration decides where packages come from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PYPROJECT = ROOT / "pyproject.toml"
TORCH_VERSION = "2.13.0"
CUDA_PACKAGE = re.compile(r"(nvidia|cuda)-", re.IGNORECASE)
# Byte code is written as modules are first used: compiling all of it takes as long as the rest of the installation.
PIP_OPTIONS = ("-qq", "--no-compile", "--disable-pip-version-check")

CUDA_REFUSED = """\
This machine has no NVIDIA GPU, and the only build of torch {version} that pip finds here needs CUDA packages of
several GB: {packages}, ... Either
  - give pip an index that has the CPU build (the "Get Started" page of PyTorch names it):
        make setup PIP_ARGS="--extra-index-url <address>"
  - or take the CUDA build all the same:
        make setup TORCH=torch=={version}"""


class SetupFailed(Exception):
    """The environment could not be built; the message is for the user."""


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


class Environment:
    """One virtual environment folder, and the stamp that says what is in it."""

    def __init__(self, folder: Path, torch: str, pip_args: list[str]) -> None:
        self.folder = folder
        self.torch = torch
        self.pip_args = pip_args
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.stamp = folder / "setup.json"

    def wanted(self) -> dict[str, str]:
        """What the stamp of an up-to-date environment says. A moved checkout must be set up anew."""
        versions = f"{sys.version_info[:2]} {self.folder}".encode()
        return {
            "closure": digest(CONSTRAINTS.read_bytes(), TORCH_VERSION.encode(), versions),
            "project": digest(PYPROJECT.read_bytes()),
            "torch": self.torch,
        }

    def found(self) -> dict[str, str]:
        """The stamp, or nothing for an environment that is absent or unfinished."""
        try:
            return dict(json.loads(self.stamp.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def update(self) -> None:
        """Bring the environment up to date: all of it, the project's own entry, or nothing."""
        wanted, found = self.wanted(), self.found()
        # No build named means: whichever is there.
        wanted["torch"] = self.torch or found.get("torch", "")
        if found == wanted:
            return
        self.stamp.unlink(missing_ok=True)
        if (found.get("closure"), found.get("torch")) != (wanted["closure"], wanted["torch"]):
            self.create()
            self.install_torch()
            self.say("the packages listed in constraints.txt (about two minutes)")
            self.pip("--no-deps", "--requirement", str(CONSTRAINTS))
        self.say("pdserve itself, editable")
        self.pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        unfinished = self.stamp.with_suffix(".new")
        unfinished.write_text(json.dumps(wanted), encoding="utf-8")
        unfinished.replace(self.stamp)
        print(f"setup: ready in {self.folder}", flush=True)

    def create(self) -> None:
        self.say(f"a new environment in {self.folder}")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        created = subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=False)
        if created.returncode:
            raise SetupFailed("Python cannot create environments here; some systems need their python3-venv package")

    def install_torch(self) -> None:
        """The build the user named, or the one that fits the machine."""
        plain = f"torch=={TORCH_VERSION}"
        if self.torch or sys.platform != "linux" or has_gpu():
            self.say(self.torch or plain)
            self.pip("--constraint", str(CONSTRAINTS), self.torch or plain)
            return
        self.say(f"{plain} for CPU")
        # The CPU build is known by its local version; an index may also hold one that is not labelled so.
        if self.try_pip("--no-deps", f"{plain}+cpu"):
            return
        self.pip("--no-deps", plain)
        refused = self.cuda_requirements()
        if refused:
            raise SetupFailed(CUDA_REFUSED.format(version=TORCH_VERSION, packages=", ".join(refused[:3])))

    def cuda_requirements(self) -> list[str]:
        """CUDA packages that the installed torch would need."""
        script = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('torch') or []))"
        listed = subprocess.run([str(self.python), "-c", script], check=True, capture_output=True, text=True)
        return [str(name) for name in json.loads(listed.stdout) if CUDA_PACKAGE.match(name)]

    def pip(self, *args: str) -> None:
        if subprocess.run(self.pip_command(*args), check=False).returncode:
            raise SetupFailed("pip failed; what it said stands above. Run `make setup` again to start over")

    def try_pip(self, *args: str) -> bool:
        """As `pip`, for something that may not exist: says nothing when it does not."""
        return subprocess.run(self.pip_command(*args), check=False, capture_output=True).returncode == 0

    def pip_command(self, *args: str) -> list[str]:
        return [str(self.python), "-m", "pip", "install", *PIP_OPTIONS, *self.pip_args, *args]

    @staticmethod
    def say(what: str) -> None:
        print(f"setup: {what}", flush=True)


def has_gpu() -> bool:
    """An NVIDIA device or its tool. A container may show only one of the two."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the project's virtual environment.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", default="", help="requirement to install instead of the build that fits the machine")
    parser.add_argument("pip_args", nargs="*", help="passed on to every `pip install`")
    args = parser.parse_args()
    # Run by whatever Python the machine has, before the requirement in pyproject.toml can speak.
    if sys.version_info < (3, 11):  # noqa: UP036
        print("setup: Python 3.11 or newer is needed: make setup PYTHON=python3.11", file=sys.stderr)
        return 2
    try:
        Environment(args.folder.resolve(), args.torch, args.pip_args).update()
    except SetupFailed as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
