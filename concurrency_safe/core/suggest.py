"""Which known name somebody meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """Give " (did you mean 'x'?)" for the known name nearest to `name`, or "" when none is near."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
