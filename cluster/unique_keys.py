"""JSON whose objects have each key once: of two values for one key the standard library silently takes the last.

    json.loads(text, object_pairs_hook=unique_keys)

For files that people write. Knows nothing of what is in them; YAML is read by `config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs.

    Raises:
        ValueError: a key is given twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(repeated(next(key for key in keys if keys.count(key) > 1)))
    return found


def repeated(key: str) -> str:
    """What is wrong and what to do, in words."""
    return f"the key {key!r} is given twice; keep one of them"
