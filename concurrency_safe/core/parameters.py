"""Which argument of a call a name means, just as Python binds it.

`inspect.Signature.bind` says the same, but takes longer than all the rest of a key. Here a function's parameters are
read once, and a call costs two comparisons of sets; `bind` is asked for the words of an error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from .errors import ConfigurationError

#: Gives one argument of the call with these arguments; the call has to fit (`Parameters.fit`).
Finder: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is left to the keywords of a call, when so many parameters have their argument by position.

    Attributes:
        needed: Must be among them; None: a positional-only parameter is left without an argument.
        allowed: May be among them, extra ones aside.
        taken: Must not be among them: they have their argument already.
    """

    needed: frozenset[str] | None
    allowed: frozenset[str]
    taken: frozenset[str]


class Parameters:
    """The parameters of one function.

    Attributes:
        names: In the order of the signature.
        nameless: Those that no keyword gives: positional-only ones, *args and **kwargs.
        takes_any_keyword: It has **kwargs, so that names can't be judged before the call.
    """

    __slots__ = (
        "_by_keyword",
        "_positional",
        "_rests",
        "_signature",
        "_takes_any_positional",
        "name",
        "nameless",
        "names",
        "takes_any_keyword",
    )

    def __init__(self, fn: Callable[..., Any]) -> None:
        """Read the signature of `fn`.

        Raises: ConfigurationError: it has none (some built-in functions).
        """
        self.name = getattr(fn, "__qualname__", type(fn).__name__)
        try:
            # Django's method_decorator makes a partial of a bound method, whose __wrapped__ says that it takes self.
            self._signature = inspect.signature(fn, follow_wrapped=not isinstance(fn, functools.partial))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{self.name} tells no signature; wrap it in a lambda or a function") from error
        parameters = self._signature.parameters.values()
        kinds = {each.kind for each in parameters}
        self.names = tuple(self._signature.parameters)
        self.takes_any_keyword = inspect.Parameter.VAR_KEYWORD in kinds
        self._takes_any_positional = inspect.Parameter.VAR_POSITIONAL in kinds
        self._positional = tuple(
            each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        )
        self._by_keyword = frozenset(
            each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        )
        self.nameless = frozenset(self.names) - self._by_keyword
        self._rests = tuple(self._rest_after(count) for count in range(len(self._positional) + 1))

    def fit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Say whether Python would call the function with these arguments."""
        count, most = len(args), len(self._positional)
        if count > most:
            if not self._takes_any_positional:
                return False
            count = most
        rest = self._rests[count]
        if rest.needed is None:
            return False
        if not kwargs:
            return not rest.needed
        given = kwargs.keys()
        if not rest.needed <= given:
            return False
        return rest.taken.isdisjoint(given) if self.takes_any_keyword else given <= rest.allowed

    def could_pass_to(self, other: Parameters, before: int = 0) -> bool:
        """Say whether any call of this function fits `other`, too, with `before` more arguments in front."""
        if self._takes_any_positional or self.takes_any_keyword:
            return True
        positional = [each.name for each in self._positional]
        needed = sum(each.default is each.empty for each in self._positional)
        keyword_only = self._by_keyword.difference(positional)
        return any(
            other.fit((None,) * (before + split), dict.fromkeys([*positional[split:count], *names]))
            for count in range(needed, len(positional) + 1)
            for split in range(count + 1)
            if self.nameless.isdisjoint(positional[split:count])
            for names in (keyword_only, keyword_only & (self._rests[-1].needed or frozenset()))
        )

    def refuse(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NoReturn:
        """Refuse a call that doesn't fit.

        Raises: TypeError: with the function's name and the reason, as its own would be.
        """
        reason = "does not take these arguments"
        try:
            # Python 3.13.0 binds a keyword to a positional-only parameter beside **kwargs; the function would not.
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            reason = str(error)
        raise TypeError(f"{self.name}() {reason}")

    def finder(self, name: str) -> Finder:
        """Give what finds the argument `name` in a call that fits; of extra keywords, a KeyError where it is absent."""
        parameter = self._signature.parameters.get(name)
        if parameter is None:
            return lambda _args, kwargs: kwargs[name]
        default = parameter.default
        positional = self._positional
        index = positional.index(parameter) if parameter in positional else len(positional)
        match parameter.kind:
            case inspect.Parameter.POSITIONAL_ONLY:
                return lambda args, _kwargs: args[index] if index < len(args) else default
            case inspect.Parameter.POSITIONAL_OR_KEYWORD:
                return lambda args, kwargs: args[index] if index < len(args) else kwargs.get(name, default)
            case inspect.Parameter.KEYWORD_ONLY:
                return lambda _args, kwargs: kwargs.get(name, default)
            case inspect.Parameter.VAR_POSITIONAL:
                return lambda args, _kwargs: args[index:]
            case _:
                return lambda _args, kwargs: {key: kwargs[key] for key in kwargs if key not in self._by_keyword}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Give every argument of a call that fits by its name, defaults applied and extra keywords among the others.

        An extra keyword that bears a parameter's name (`def f(a, /, **more)`) keeps all of them in a dict of their own.
        """
        found = {name: self.finder(name)(args, kwargs) for name in self.names}
        if self.takes_any_keyword:
            extra = found.pop(self.names[-1])
            found |= {self.names[-1]: extra} if extra.keys() & found.keys() else extra
        return found

    def _rest_after(self, count: int) -> _Rest:
        given, left = self._positional[:count], self._positional[count:]
        needed = {each.name for each in self._signature.parameters.values() if each.default is each.empty}
        needed &= self._by_keyword - {each.name for each in given}
        stuck = any(each.kind is each.POSITIONAL_ONLY and each.default is each.empty for each in left)
        taken = self._by_keyword & {each.name for each in given}
        return _Rest(None if stuck else frozenset(needed), self._by_keyword - taken, frozenset(taken))


def is_async(fn: object) -> bool:
    """Say whether calling `fn` gives a coroutine: an `async def`, or an object with such a `__call__`."""
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)


def refuse_unfit(what: str, helper: Callable[..., Any], fn: Callable[..., Any], before: int = 0) -> None:
    """Refuse a `helper` that gets the arguments of `fn`, with `before` more in front, and can take none of its calls.

    A decorator below may add arguments of its own, and `functools.wraps` shows the inner signature: then, and where a
    built-in function tells no signature, the call will say.

    Raises: ConfigurationError.
    """
    if hasattr(fn, "__wrapped__"):
        return
    try:
        takes = Parameters(helper)
    except ConfigurationError:
        return
    body = Parameters(fn)
    if not body.could_pass_to(takes, before):
        given = ", ".join((*("the conflict",) * before, *body.names))
        raise ConfigurationError(
            f"{what} takes {', '.join(takes.names) or 'nothing'}, but it gets the arguments of {body.name}: "
            f"{given or 'none'}"
        )
