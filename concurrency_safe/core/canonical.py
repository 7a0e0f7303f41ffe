"""One text for one value: in every process, and after a trip through a JSON message.

A value that has no such text is refused, never shown by its `repr`: an address in memory would make every call's key
its own.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import uuid
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum

from .errors import KeyTemplateError

_TEXTUAL = (uuid.UUID, Decimal, dt.timedelta)


def canonical(value: object) -> str:
    """Give the text of `value` as a part of a key.

    str, int, bool, float, Decimal, UUID, date, time, timedelta as they read (an aware datetime in UTC, so that one
    instant has one text); an Enum as its value; a model instance as its primary key.

    Raises: KeyTemplateError: None, "", a float that is no number, or a type without a canonical text.
    """
    plain = _plain(value)
    if plain is None or plain == "":
        raise KeyTemplateError(
            f"{value!r} in a key would make strangers share a lock; give a value, or leave the call unguarded"
        )
    if isinstance(plain, float):
        _refuse_no_number(plain)
        return repr(plain)
    if isinstance(plain, (str, int)):
        return str(plain)
    raise _no_text(value)


def canonical_arguments(arguments: object) -> str:
    """Give the text of a call's arguments: nested lists and dicts, tagged, so that 1, "1", True and None differ.

    It is JSON with sorted keys. What JSON can't carry becomes the text that it becomes in a message (a UUID, a date); a
    tuple is a list.

    Raises: KeyTemplateError: a type without a canonical form.
    """
    return json.dumps(_tree(arguments), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    """Reduce `value` to a str, int, bool, float or None; what can't be is returned as it is."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, str):
        # Not a subclass' own __str__; but Django's lazy objects say that they are a str where they wrap one.
        return str.__str__(value) if issubclass(type(value), str) else str(value)
    if hasattr(value, "_meta") and hasattr(value, "pk"):
        if value.pk is None:
            raise KeyTemplateError(f"{type(value).__name__} in a key is not saved yet: it has no primary key")
        return _plain(value.pk)
    if isinstance(value, (dt.date, dt.time)):
        return _iso(value)
    return str(value) if isinstance(value, _TEXTUAL) else value


def _iso(value: dt.date | dt.time) -> str:
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        value = value.astimezone(dt.timezone.utc)
    return value.isoformat()


def _tree(value: object) -> object:
    if isinstance(value, Mapping):
        names = [_plain(name) for name in value]
        if not all(isinstance(name, str) for name in names):
            raise KeyTemplateError(f"a dict in a key needs texts for keys, not {sorted(map(repr, value))}")
        return {str(name): _tree(inner) for name, inner in zip(names, value.values(), strict=True)}
    if isinstance(value, (list, tuple)):
        return [_tree(inner) for inner in value]
    plain = _plain(value)
    if isinstance(plain, float):
        _refuse_no_number(plain)
    if plain is None or isinstance(plain, (str, bool, int, float)):
        return plain
    raise _no_text(value)


def _refuse_no_number(value: float) -> None:
    if math.isnan(value) or math.isinf(value):
        raise KeyTemplateError(f"{value!r} in a key is no number")


def _no_text(value: object) -> KeyTemplateError:
    name = type(value).__name__
    return KeyTemplateError(
        f"{name} in a key has no text that is the same in every process; name what identifies it ({{field.id}}), "
        "or say that its str() does ({field!s})"
    )
