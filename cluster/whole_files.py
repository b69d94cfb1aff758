"""Files that are written whole or not at all, and only where a file belongs.

For what took minutes to find out: whether it can be written is asked before the work. Knows nothing of what is in them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pdserve.proto.errors import ConfigError


def require_writable(option: str, path: Path) -> None:
    """
    Raises:
        ConfigError: a file could not be written there, or what is there is no file.
    """
    place = path.resolve()
    if place.exists() and not place.is_file():
        raise ConfigError(f"{option}: {path}: cannot be written: is no regular file")
    if not os.access(place.parent, os.W_OK):
        raise ConfigError(f"{option}: {path}: cannot be written; name a file in a folder that exists and is yours")


def write_whole(option: str, path: Path, text: str) -> None:
    """Into a file beside it first: nobody sees half of it, and a full disk leaves the old one. Follows links.

    Raises:
        ConfigError: it cannot be written.
    """
    require_writable(option, path)
    place = path.resolve()
    try:
        handle, beside = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(beside, 0o666 & ~_umask())
            os.replace(beside, place)
        except OSError:
            os.unlink(beside)
            raise
    except OSError as error:
        raise ConfigError(f"{option}: {path}: cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    """Reading it means setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
