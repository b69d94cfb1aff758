"""Files that are written whole or not at all, and only where a file belongs.

For what took minutes to find out: whether it can be written is asked before the work. Knows nothing of what is in them.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from pdserve.proto.errors import ConfigError


def require_writable(option: str, path: Path) -> None:
    """
    Raises:
        ConfigError: a file could not be written there, or what is there is no file.
    """
    try:
        place = path.resolve()
        is_other = place.exists() and not place.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be entered, links in a circle
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option}: {path}: cannot be written: {why}") from error
    if is_other:
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
    # Named before it is made: an interrupt finds it at any moment. Short: a name may be as long as names can be.
    beside = place.with_name(f".pdserve-{secrets.token_hex(8)}")
    try:
        try:
            with beside.open("x", encoding="utf-8") as file:
                file.write(text)
            os.replace(beside, place)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{option}: {path}: cannot be written: {error.strerror or error}") from error
