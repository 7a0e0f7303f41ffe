"""Which known name somebody meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """Give " (did you mean 'x'?)" for the known name nearest to `name`, in either case, or "" when none is near."""
    names = {each.lower(): each for each in known}
    matches = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f" (did you mean {names[matches[0]]!r}?)" if matches else ""
