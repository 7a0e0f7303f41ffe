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

#: Read by their str(); they know no format spec that a text doesn't.
_TEXTUAL = (uuid.UUID, dt.timedelta)


def canonical(value: object) -> str:
    """Give the text of `value` as a part of a key.

    str, int, bool, float, Decimal, UUID, date, time, timedelta as they read (an aware datetime in UTC, so that one
    instant has one text); an Enum as its value; a model instance as its primary key; a lazy object as what it wraps.

    Raises: KeyTemplateError: None, "", a float that is no number, or a type without a canonical text.
    """
    # Nearly every part of a key is one of these two; the way around them all takes longer than the rest of a template.
    if type(value) is int or (type(value) is str and value):
        return str(value)
    plain = _plain(value)
    if plain is None or plain == "":
        raise _stranger(value)
    if isinstance(plain, str):
        return plain
    if isinstance(plain, float):
        _refuse_no_number(plain)
    if isinstance(plain, (int, float)):
        return str(plain)
    raise _no_text(value)


def formatted(value: object, spec: str) -> str:
    """Give the text of `value` by a format spec ("03", "%Y-%m"), as canonical as `canonical` is; "" is no spec.

    Raises: KeyTemplateError: as `canonical`, or nothing is left. ValueError, TypeError: the spec is not for this value.
    """
    text = canonical(value)
    if not spec:
        return text
    bare = _bare(value)
    text = format(text if isinstance(bare, _TEXTUAL) else bare, spec)
    if not text:
        raise _stranger(text)
    return text


def canonical_arguments(arguments: object) -> str:
    """Give the text of a call's arguments: nested lists and dicts, tagged, so that 1, "1", True and None differ.

    It is JSON with sorted keys. What JSON can't carry becomes the text that it becomes in a message (a UUID, a date); a
    tuple is a list.

    Raises: KeyTemplateError: a type without a canonical form.
    """
    try:
        tree = _tree(arguments)
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise KeyTemplateError("a list or dict in a key holds itself, or is nested too deeply") from None


def _bare(value: object) -> object:
    """Take off what `value` is wrapped in: an enum, a model, a subclass, a proxy, a time zone.

    Django's lazy objects, and other proxies, say by `__class__` that they are what they wrap, so `isinstance` believes
    them; but only an explicit call of a method reaches through.
    """
    if isinstance(value, Enum):
        return _bare(value.value)
    if isinstance(value, (str, int, float)):
        return _exact(value)
    if isinstance(value, dt.datetime):
        return _in_utc(value)
    if hasattr(value, "_meta") and hasattr(value, "pk"):
        if value.pk is None:
            raise KeyTemplateError(f"{type(value).__name__} in a key is not saved yet: it has no primary key")
        return _bare(value.pk)
    return None if value.__class__ is type(None) else value


def _exact(value: str | float) -> str | float:
    """Make an instance of a subclass, which may show itself otherwise, one of the type that a message carries."""
    if isinstance(value, str):
        return str.__str__(value) if issubclass(type(value), str) else str(value)
    if isinstance(value, bool):
        return bool(value)
    return value.__index__() if isinstance(value, int) else value.__float__() + 0.0  # -0.0 equals 0.0


def _plain(value: object) -> object:
    """Reduce `value` to a str, int, bool, float or None; what can't be is returned bare."""
    bare = _bare(value)
    if isinstance(bare, (dt.date, dt.time)):
        return bare.isoformat()
    return str(bare) if isinstance(bare, (*_TEXTUAL, Decimal)) else bare


def _in_utc(value: dt.datetime) -> dt.datetime:
    if value.tzinfo is None:
        return value
    try:
        return value.astimezone(dt.timezone.utc)
    except OverflowError:
        raise KeyTemplateError(f"{value.isoformat()} in a key is no time in UTC: it is out of range there") from None


def _tree(value: object) -> object:
    plain = _plain(value)
    if isinstance(plain, Mapping):
        names = [_plain(name) for name in plain]
        if not all(isinstance(name, str) for name in names):
            raise KeyTemplateError(f"a dict in a key needs texts for keys, not {sorted(map(repr, plain))}")
        return {str(name): _tree(inner) for name, inner in zip(names, plain.values(), strict=True)}
    if isinstance(plain, (list, tuple)):
        return [_tree(inner) for inner in plain]
    if isinstance(plain, float):
        _refuse_no_number(plain)
    if plain is None or isinstance(plain, (str, int, float)):
        return plain
    raise _no_text(value)


def _refuse_no_number(value: float) -> None:
    if math.isnan(value) or math.isinf(value):
        raise KeyTemplateError(f"{value!r} in a key is no number")


def _stranger(value: object) -> KeyTemplateError:
    return KeyTemplateError(
        f"{value!r} in a key would make strangers share a lock; give a value, or leave the call unguarded"
    )


def _no_text(value: object) -> KeyTemplateError:
    name = type(value).__name__
    return KeyTemplateError(
        f"{name} in a key has no text that is the same in every process; name what identifies it ({{field.id}}), "
        "or say that its str() does ({field!s})"
    )
