"""What a key is: a text for people, and the int64 that PostgreSQL locks.

The number is frozen for ever: hosts on different releases must exclude each other (docs/decisions/0004-key-hash.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from .canonical import canonical
from .errors import KeyTemplateError

#: Written into every hash. A change of it is a new lock space.
VERSION = b"concurrency_safe:1"

#: What a forgotten f leaves behind: f"stock:{sku}" without its f.
_LEFTOVER = re.compile(r"\{[A-Za-z_][\w.\[\]]*(![rsa])?(:[^{}]*)?\}")


class Rendered(str):
    """The text of a rendered template: what looks like a {field} in it is a caller's data."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class LockKey:
    """A key as people read it, and as PostgreSQL locks it (a signed int64)."""

    text: str
    number: int


def lock_key(key: str | tuple[object, ...] | LockKey, namespace: str = "") -> LockKey:
    """Give the key for a text, or for a tuple of parts; a tuple never equals a text.

    `namespace`: the setting NAMESPACE; the same key in two namespaces is two locks.

    Raises: KeyTemplateError: an empty key, one that still holds a {field}, or a part without a canonical text.
    """
    if type(key) is str:
        return _plain(key, namespace)
    if type(key) is Rendered:
        return _rendered(key, namespace)
    if isinstance(key, LockKey):
        return key
    if isinstance(key, str):
        # A lazy object, as Django's, is a str by its __class__ alone.
        text = check_text(key if issubclass(type(key), str) else str(key))
        return LockKey(text, _number(namespace, b"text", text))
    if isinstance(key, tuple):
        if not key:
            raise KeyTemplateError('a key of no parts: give at least one, ("stock", sku)')
        parts = [check_text(part if isinstance(part, Rendered) else canonical(part)) for part in key]
        # Readable, and one text for one tuple: a part's own separators are escaped.
        text = "/".join(part.replace("\\", r"\\").replace("/", r"\/") for part in parts)
        return LockKey(f"({text})", _number(namespace, b"parts", *parts))
    raise KeyTemplateError(f"a key is a text or a tuple of parts, not {type(key).__name__}: {key!r}")


@lru_cache(maxsize=512)
def _plain(text: str, namespace: str) -> LockKey:
    """Give the key of an ordinary text; an error is not remembered."""
    return LockKey(check_text(text), _number(namespace, b"text", text))


@lru_cache(maxsize=512)
def _rendered(text: Rendered, namespace: str) -> LockKey:
    """Give the key of a rendered template; not among those of ordinary texts, which must not look like a template."""
    return LockKey(check_text(text), _number(namespace, b"text", text))


@lru_cache(maxsize=64)
def slot_numbers(key: LockKey, slots: int) -> tuple[int, ...]:
    """Give what PostgreSQL locks for a key with several slots: the gate, at which waiters queue, then each slot.

    Derived from the key's number, so namespace and text are in it; frozen like it.
    """
    texts = [str(key.number), *(f"{key.number}:{slot}" for slot in range(slots))]
    return tuple(_number("", b"slot", text) for text in texts)


def check_text(text: str) -> str:
    """Refuse a text that can't be a key, or a part of one.

    Raises: KeyTemplateError.
    """
    if not text:
        raise KeyTemplateError("a key must not be empty")
    leftover = None if isinstance(text, Rendered) else _LEFTOVER.search(text)
    if leftover:
        raise KeyTemplateError(
            f"the key {text!r} still holds {leftover.group()}: a forgotten f before the string? "
            "(templates are for @concurrency_safe and lock_key)",
            text,
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise KeyTemplateError(
            f"the key {text!r} holds half a character (a lone surrogate); it has no bytes in UTF-8"
        ) from None
    return str.__str__(text)


def _number(namespace: str, kind: bytes, *texts: str) -> int:
    """Hash version, namespace, kind and texts, each with its length before it, so that no two inputs meet."""
    digest = _begun(namespace, kind).copy()
    for text in texts:
        piece = text.encode()
        digest.update(len(piece).to_bytes(8, "big") + piece)
    return int.from_bytes(digest.digest(), "big", signed=True)


@lru_cache(maxsize=16)
def _begun(namespace: str, kind: bytes) -> blake2b:
    digest = blake2b(digest_size=8)
    for piece in (VERSION, namespace.encode(), kind):
        digest.update(len(piece).to_bytes(8, "big") + piece)
    return digest
