"""Key templates: the recipe that makes a key from a call's arguments, checked where it is declared."""

from __future__ import annotations

import functools
import inspect
import string
from _string import formatter_field_name_split  # type: ignore[import-not-found]  # as string.Formatter does
from collections.abc import Callable, Mapping
from typing import Any

from .canonical import canonical, canonical_arguments
from .errors import ConfigurationError, KeyTemplateError
from .keys import Rendered, check_text

Arguments = Mapping[str, Any]

_FORMS = (
    'a key is a template ("stock:{sku}"), a tuple of parts ("stock", "{sku}"), a callable that gets the call\'s '
    "arguments, or True for the name and all arguments"
)

_MISSING: Any = object()
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
        self._fn = fn
        # A partial of a bound method, as Django's method_decorator makes it, says by __wrapped__ that it takes self.
        self._signature = inspect.signature(fn, follow_wrapped=not isinstance(fn, functools.partial))
        self._name = name or f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__name__)}"
        self._parts: tuple[_Part, ...] = ()
        if isinstance(spec, str):
            self._parts = (self._part(spec),)
        elif isinstance(spec, tuple) and spec:
            self._parts = tuple(self._part(part) if isinstance(part, str) else _Part.constant(part) for part in spec)
        elif spec is not True and (isinstance(spec, type) or not callable(spec)):
            raise ConfigurationError(f"key={spec!r}: {_FORMS}")

    def __repr__(self) -> str:
        """Show the recipe."""
        return f"KeyTemplate({self._spec!r})"

    def render(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | tuple[object, ...]:
        """Make the key of one call.

        Raises: KeyTemplateError: a field is None, empty, missing, or has no canonical text. TypeError: the arguments
            don't fit the function; it is the function's own.
        """
        if self._parts:
            fields = _Fields(self._signature, args, kwargs)
            if isinstance(self._spec, str):
                return self._parts[0].render(fields)
            return tuple(part.render(fields) for part in self._parts)
        if self._spec is True:
            return Rendered(f"{self._name}{canonical_arguments(bind(self._signature, args, kwargs))}")
        return self._checked(self._spec(*args, **kwargs))

    def _checked(self, key: object) -> str | tuple[object, ...]:
        if isinstance(key, str) and key:
            return Rendered(key)
        if isinstance(key, tuple) and key:
            return tuple(Rendered(canonical(part)) for part in key)
        raise KeyTemplateError(
            f"the key function of {self._name} returned {key!r}; it must give a text or a tuple of parts"
        )

    def _part(self, template: str) -> _Part:
        part = _Part.parse(template)
        parameters = self._signature.parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            unknown = [field for field in part.names if field not in parameters]
            if unknown:
                raise KeyTemplateError(
                    f"key template {template!r} of {self._name} names {', '.join(map(repr, unknown))}, "
                    f"but it takes {', '.join(map(repr, parameters)) or 'nothing'}",
                    template,
                )
        return part


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give every argument of a call by its name, with defaults applied and extra keywords among the others.

    Raises: TypeError: the arguments don't fit.
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name)
    return arguments


class _Fields:
    """The arguments of one call, found by name; the whole signature is bound only when that is needed."""

    __slots__ = ("_args", "_bound", "_kwargs", "_signature")

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._signature = signature
        self._args = args
        self._kwargs = kwargs
        self._bound: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        value = self._kwargs.get(name, _MISSING)
        if value is not _MISSING:
            return value
        if self._bound is None:
            self._bound = bind(self._signature, self._args, self._kwargs)
        return self._bound[name]


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
    def parse(cls, template: str) -> _Part:
        if not template:
            raise KeyTemplateError("a key template must not be empty")
        try:
            parsed = list(_FORMATTER.parse(template))
        except ValueError as error:
            raise KeyTemplateError(f"key template {template!r}: {error}", template) from None
        pieces: list[tuple[str, _Field | None]] = []
        for literal, path, spec, conversion in parsed:
            pieces.append((literal, None if path is None else _Field(template, path, spec or "", conversion)))
        return cls(template, pieces)

    def render(self, fields: _Fields) -> Rendered:
        texts = []
        for literal, field in self._pieces:
            texts.append(literal)
            if field is not None:
                texts.append(field.render(fields))
        return Rendered(check_text(Rendered("".join(texts))))


class _Field:
    """One {field} of a template."""

    __slots__ = ("_conversion", "_path", "_spec", "_steps", "_template", "name")

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
        if any(is_attribute and str(step).startswith("__") for is_attribute, step in self._steps):
            raise KeyTemplateError(
                f"key template {template!r}: {{{path}}} reaches into Python's own attributes",
                template,
            )

    def render(self, fields: _Fields) -> str:
        try:
            value = self._value(fields)
            if self._conversion:
                value = _FORMATTER.convert_field(value, self._conversion)
            text = canonical(value)
            return format(value if not isinstance(value, str) else text, self._spec) if self._spec else text
        except KeyTemplateError as error:
            raise self._error(str(error)) from None
        except (LookupError, AttributeError, ValueError) as error:
            raise self._error(f"{type(error).__name__}: {error}") from error

    def _value(self, fields: _Fields) -> Any:
        value = fields[self.name]
        for is_attribute, step in self._steps:
            if not is_attribute:
                value = value[step]
            elif isinstance(value, Mapping):
                # A model of pydantic's is a dict still where the key of its task is rendered.
                value = value[step]
            else:
                value = getattr(value, str(step))
        return value

    def _error(self, reason: str) -> KeyTemplateError:
        return KeyTemplateError(f"key template {self._template!r}, field {{{self._path}}}: {reason}", self._template)
