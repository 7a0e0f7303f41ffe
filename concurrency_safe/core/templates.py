"""Key templates: the recipe that makes a key from a call's arguments, checked where it is declared."""

from __future__ import annotations

import string
from _string import formatter_field_name_split  # type: ignore[import-not-found]  # as string.Formatter does
from collections.abc import Callable, Mapping
from typing import Any

from .canonical import canonical, canonical_arguments, formatted
from .errors import ConfigurationError, KeyTemplateError
from .keys import Rendered
from .parameters import Finder, Parameters, is_async, refuse_unfit

_FORMS = (
    'a key is a template ("stock:{sku}"), a tuple of parts ("stock", "{sku}"), a callable that gets the call\'s '
    "arguments, or True for the name and all arguments"
)

_FORMATTER = string.Formatter()


class KeyTemplate:
    """The key of every call of one function."""

    def __init__(self, spec: Any, fn: Callable[..., Any], *, name: str | None = None) -> None:
        """Check `spec` against the signature of `fn`.

        `name`: what stands for the function in the key of `spec=True`; default: its module and qualified name.

        Raises: KeyTemplateError: the template is malformed, or names what `fn` doesn't take. ConfigurationError: `spec`
            is nothing that a key can be made of.
        """
        self._spec = spec
        self._parameters = Parameters(fn)
        self._name = name or f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__name__)}"
        self._parts: tuple[_Part, ...] = ()
        if isinstance(spec, str):
            self._parts = (self._part(spec),)
        elif isinstance(spec, tuple) and spec:
            self._parts = tuple(self._part(part) if isinstance(part, str) else _Part.constant(part) for part in spec)
        elif spec is not True:
            if isinstance(spec, type) or not callable(spec):
                raise ConfigurationError(f"key={spec!r}: {_FORMS}")
            if is_async(spec):
                raise ConfigurationError(f"key={spec!r} is `async def`; a key is made before anything is awaited")
            refuse_unfit(f"key={spec!r}", spec, fn)
        self._names = frozenset(name for part in self._parts for name in part.names)

    def __repr__(self) -> str:
        """Show the recipe."""
        return f"KeyTemplate({self._spec!r})"

    def render(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | tuple[object, ...]:
        """Make the key of one call.

        Raises: KeyTemplateError: a field is None, empty, missing, or has no canonical text. TypeError: the arguments
            don't fit the function; it is the function's own.
        """
        if self._parts:
            if self._names:
                args = self._certain(args, kwargs)
            if isinstance(self._spec, str):
                return self._parts[0].render(args, kwargs)
            return tuple(part.render(args, kwargs) for part in self._parts)
        if self._spec is True:
            if not self._parameters.fit(args, kwargs):
                self._parameters.refuse(args, kwargs)
            return Rendered(f"{self._name}{canonical_arguments(self._parameters.bind(args, kwargs))}")
        return self._checked(self._spec(*args, **kwargs))

    def _certain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Give the positional arguments whose names are certain: all, or none where the call doesn't fit.

        It may be right all the same: a decorator below may add arguments of its own, and `functools.wraps` shows the
        inner signature. What is given by name is what is meant; what is wrong, the function itself will say.
        """
        if self._parameters.fit(args, kwargs):
            return args
        if not self._names <= kwargs.keys() - self._parameters.nameless:
            self._parameters.refuse(args, kwargs)
        return ()

    def _checked(self, key: object) -> str | tuple[object, ...]:
        if isinstance(key, str) and key:
            return Rendered(key)
        if isinstance(key, tuple) and key:
            return tuple(Rendered(canonical(part)) for part in key)
        raise KeyTemplateError(
            f"the key function of {self._name} returned {key!r}; it must give a text or a tuple of parts"
        )

    def _part(self, template: str) -> _Part:
        part = _Part.parse(template, self._parameters)
        known = self._parameters.names
        unknown = [name for name in part.names if name not in known]
        if unknown and not self._parameters.takes_any_keyword:
            raise KeyTemplateError(
                f"key template {template!r} of {self._name} names {', '.join(map(repr, unknown))}, "
                f"but it takes {', '.join(map(repr, known)) or 'nothing'}",
                template,
            )
        return part


class _Part:
    """One text template, parsed."""

    __slots__ = ("_pieces", "names", "template")

    def __init__(self, template: str, pieces: list[tuple[str, _Field | None]]) -> None:
        self.template = template
        self._pieces = pieces
        self.names = [field.name for _, field in pieces if field is not None]

    @classmethod
    def constant(cls, value: object) -> _Part:
        return cls(repr(value), [(canonical(value), None)])

    @classmethod
    def parse(cls, template: str, parameters: Parameters) -> _Part:
        if not template:
            raise KeyTemplateError("a key template must not be empty")
        try:
            parsed = list(_FORMATTER.parse(template))
        except ValueError as error:
            raise KeyTemplateError(f"key template {template!r}: {error}", template) from None
        pieces: list[tuple[str, _Field | None]] = []
        for literal, path, spec, conversion in parsed:
            field = None
            if path is not None:
                field = _Field(template, path, spec or "", conversion)
                field.find = parameters.finder(field.name)
            pieces.append((literal, field))
        return cls(template, pieces)

    def render(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rendered:
        texts = []
        for literal, field in self._pieces:
            texts.append(literal)
            if field is not None:
                texts.append(field.render(args, kwargs))
        return Rendered("".join(texts))


class _Field:
    """One {field} of a template."""

    __slots__ = ("_conversion", "_path", "_spec", "_steps", "_template", "find", "name")

    #: How a call's argument is found.
    find: Finder

    def __init__(self, template: str, path: str, spec: str, conversion: str | None) -> None:
        self._template = template
        self._path = path
        self._spec = spec
        self._conversion = conversion
        first, steps = formatter_field_name_split(path)
        self.name = str(first)
        self._steps: list[tuple[bool, str | int]] = list(steps)
        if first == "" or isinstance(first, int):
            raise KeyTemplateError(
                f"key template {template!r} has a field by position; name the argument: {{user_id}}",
                template,
            )
        if not self.name.isidentifier() or "{" in spec:
            raise KeyTemplateError(
                f"key template {template!r}: {{{path}:{spec}}} is not the field of an argument",
                template,
            )
        if conversion not in (None, "r", "s", "a"):
            raise KeyTemplateError(f"key template {template!r}: there is no conversion '!{conversion}'", template)
        if any(is_attribute and str(step).startswith("__") for is_attribute, step in self._steps):
            raise KeyTemplateError(
                f"key template {template!r}: {{{path}}} reaches into Python's own attributes",
                template,
            )

    def render(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        try:
            value = self.find(args, kwargs)
            for is_attribute, step in self._steps:
                # A model of pydantic's is a dict still where the key of its task is rendered.
                by_item = not is_attribute or isinstance(value, Mapping)
                value = value[step] if by_item else getattr(value, str(step))
            if self._conversion and value is not None:
                value = _FORMATTER.convert_field(value, self._conversion)
            return formatted(value, self._spec)
        except KeyTemplateError as error:
            raise self._error(str(error)) from None
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise self._error(f"{type(error).__name__}: {error}") from error

    def _error(self, reason: str) -> KeyTemplateError:
        return KeyTemplateError(f"key template {self._template!r}, field {{{self._path}}}: {reason}", self._template)
