"""Key templates: checked where they are declared, and the same key for the same call."""
# ruff: noqa: ARG005 - what lambdas take is the matter of these tests

from __future__ import annotations

import datetime as dt
import functools
import uuid
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from typing import Any

import pytest
from django.utils.functional import SimpleLazyObject
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrency_safe import ConfigurationError, KeyTemplateError
from concurrency_safe.core.parameters import Parameters
from concurrency_safe.core.templates import KeyTemplate


def buy(sku: str, amount: int = 1, *, user: Any = None) -> None: ...


def anything(*args: Any, **kwargs: Any) -> None: ...


#: Five hours before UTC's midnight.
EAST = dt.timezone(dt.timedelta(hours=5))

#: A lazy object formats by no format spec at all.
NaiveLazy = SimpleLazyObject(lambda: dt.date(2026, 11, 23))


class Color(Enum):
    RED = "red"


class User:
    _meta = object()
    pk = 7
    name = "Ada"


class Shop:
    _meta = object()
    pk = 3

    def sell(self, sku: str) -> None: ...


def render(spec: Any, *args: Any, of: Any = buy, **kwargs: Any) -> Any:
    return KeyTemplate(spec, of).render(args, kwargs)


@pytest.mark.parametrize(
    ("spec", "args", "kwargs", "key"),
    [
        ("nightly", ("A",), {}, "nightly"),
        ("stock:{sku}", ("A",), {}, "stock:A"),
        ("stock:{sku}", (), {"sku": "A"}, "stock:A"),
        ("{sku}-{amount}", ("A",), {}, "A-1"),
        ("{sku}-{amount:03}", ("A", 7), {}, "A-007"),
        ("{sku!r}", ("A",), {}, "'A'"),
        ("{sku:>3}", ("A",), {}, "  A"),
        ("{user}", ("A",), {"user": User()}, "7"),
        ("{user.name}", ("A",), {"user": User()}, "Ada"),
        ("{user.name}", ("A",), {"user": {"name": "Ada"}}, "Ada"),
        ("{user[name]}", ("A",), {"user": {"name": "Ada"}}, "Ada"),
        ("{user[0]}", ("A",), {"user": ["x"]}, "x"),
        ("{user!s}", ("A",), {"user": b"x"}, "b'x'"),
        ("{user:%Y}", ("A",), {"user": dt.date(2026, 11, 23)}, "2026"),
        ("{user:%H}", ("A",), {"user": dt.datetime(2026, 11, 23, 1, tzinfo=EAST)}, "20"),
        ("{user:.8}", ("A",), {"user": uuid.UUID(int=1)}, "00000000"),
        ("{user:.2f}", ("A",), {"user": Decimal("1.5")}, "1.50"),
        ("{user:03}", ("A",), {"user": User()}, "007"),
        ("{user:>5}", ("A",), {"user": Color.RED}, "  red"),
        ("{user}", ("A",), {"user": Color.RED}, "red"),
        ("{{{sku}}}", ("A",), {}, "{A}"),
        (("stock", "{sku}"), ("A",), {}, ("stock", "A")),
        (("stock", 7, "{sku}"), ("A",), {}, ("stock", "7", "A")),
        (lambda sku, **_: f"k:{sku}", ("A",), {"user": 1}, "k:A"),
        (lambda sku: ("k", sku), ("A",), {}, ("k", "A")),
        (lambda *_: ("k", Color.RED), ("A",), {}, ("k", "red")),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_call_has_its_key(spec: Any, args: Any, kwargs: Any, key: object) -> None:
    assert KeyTemplate(spec, buy).render(args, kwargs) == key


def test_true_is_the_name_and_all_arguments() -> None:
    name = f"{__name__}.buy"

    assert render(True, "A") == f'{name}{{"amount":1,"sku":"A","user":null}}'
    assert render(True, sku="A", amount=1) == render(True, "A")
    assert KeyTemplate(True, buy, name="buy").render(("A",), {}) == 'buy{"amount":1,"sku":"A","user":null}'
    assert render(True, 1, of=anything, x=2).endswith('{"args":[1],"x":2}')
    with pytest.raises(KeyTemplateError, match="object"):
        render(True, object())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("stock:{skew}", r"'stock:\{skew\}'.*'skew'.*'sku', 'amount', 'user'"),
        (("stock", "{skew}"), "'skew'"),
        ("{}", "by position"),
        ("{0}", "by position"),
        ("{sku.__class__}", "Python's own"),
        ("{sku:{amount}}", "not the field"),
        ("{sku-x}", "not the field"),
        ("{sku", "expected"),
        ("", "empty"),
        (("stock", None), "strangers"),
    ],
    ids=repr,
)
def test_a_bad_template_fails_where_it_is_declared(spec: Any, says: str) -> None:
    with pytest.raises(KeyTemplateError, match=says):
        KeyTemplate(spec, buy)


@pytest.mark.parametrize("spec", [None, False, 7, (), [], str])
def test_what_is_no_recipe_is_refused_with_the_forms(spec: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"stock:\{sku\}"):
        KeyTemplate(spec, buy)


@pytest.mark.parametrize(
    ("spec", "args", "kwargs", "says"),
    [
        ("stock:{sku}", (None,), {}, r"'stock:\{sku\}', field \{sku\}.*strangers"),
        ("stock:{sku}", ("",), {}, "strangers"),
        ("{user}", ("A",), {"user": object()}, "object in a key"),
        ("{user.pk}", ("A",), {"user": None}, "AttributeError"),
        ("{user[x]}", ("A",), {"user": {}}, "KeyError"),
        ("{user.x}", ("A",), {"user": {}}, "KeyError"),
        ("{amount:%Q}", ("A",), {}, "ValueError"),
        (lambda *_: None, ("A",), {}, "returned None"),
        (lambda *_: "", ("A",), {}, "returned ''"),
        (lambda *_: (), ("A",), {}, "returned"),
        (lambda *_: 7, ("A",), {}, "returned 7"),
        ("{sku:.0}", ("A",), {}, "strangers"),
        ("{user!s}", ("A",), {}, "strangers"),
        ("{user!r:>9}", ("A",), {}, "strangers"),
        ("{user[x]}", ("A",), {}, "TypeError"),
        ("{sku:%Y}", ("A",), {}, "ValueError"),
        ("{user:>3}", ("A",), {"user": NaiveLazy}, "TypeError"),
    ],
    ids=lambda value: repr(value)[:25],
)
def test_a_value_that_makes_no_key_is_an_error_of_the_call(spec: Any, args: Any, kwargs: Any, says: str) -> None:
    with pytest.raises(KeyTemplateError, match=says):
        KeyTemplate(spec, buy).render(args, kwargs)


def test_names_of_extra_keywords_are_known_only_at_the_call() -> None:
    assert render("k:{x}", of=anything, x=1) == "k:1"
    with pytest.raises(KeyTemplateError, match="'x'"):
        render("k:{x}", of=anything)


def test_extra_keywords_are_found_in_their_dict_too() -> None:
    assert render("k:{kwargs[x]}:{args[0]}", 5, of=anything, x=1) == "k:1:5"


@pytest.mark.parametrize("spec", ["{sku}", "{amount}", ("k", "{sku}"), True])
@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, r"buy\(\) missing .*'sku'"),
        ((1, 2, 3), {}, r"buy\(\) too many"),
        ((1,), {"skew": 1}, r"buy\(\) .*'skew'"),
    ],
)
def test_wrong_arguments_are_the_functions_own_error(spec: Any, args: Any, kwargs: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        KeyTemplate(spec, buy).render(args, kwargs)


def test_a_decorator_below_may_add_arguments() -> None:
    """functools.wraps shows the inner signature; what is given by name is certain all the same."""

    @functools.wraps(buy)
    def with_sku(*args: Any, **kwargs: Any) -> None: ...

    assert render("{user}", of=with_sku, user="Ada") == "Ada"
    assert render("{amount}:{user}", "X", 7, 8, of=with_sku, user="Ada", amount=2) == "2:Ada"
    with pytest.raises(TypeError, match="sku"):
        render("{sku}", of=with_sku, user="Ada")


def positional_only(sku: str, /, **more: Any) -> None: ...


def test_a_positional_argument_is_not_swapped_for_a_keyword_of_its_name() -> None:
    assert render("{sku}", "A", of=positional_only, sku="B") == "A"
    assert render("{more[sku]}", "A", of=positional_only, sku="B") == "B"
    with pytest.raises(TypeError, match="sku"):
        render("{sku}", of=positional_only, sku="B")

    keys = {render(True, one, of=positional_only, sku=other) for one in "AB" for other in "AB"}
    assert len(keys) == 4


def kinds(a: Any, /, b: Any = 20, *rest: Any, c: Any, d: Any = 40, **more: Any) -> dict[str, Any]:
    return locals()


def few(a: Any, b: Any = 20) -> dict[str, Any]:
    return locals()


def closed(a: Any = 10, /, *, b: Any = 20) -> dict[str, Any]:
    return locals()


@settings(max_examples=150)
@given(
    st.sampled_from([kinds, few, closed]),
    st.lists(st.integers(0, 9), max_size=4),
    st.dictionaries(st.sampled_from("abcdx"), st.integers(0, 9), max_size=4),
)
def test_arguments_are_found_as_python_binds_them(
    fn: Callable[..., dict[str, Any]], args: list[int], kwargs: dict[str, int]
) -> None:
    parameters = Parameters(fn)
    try:
        bound = fn(*args, **kwargs)
    except TypeError:
        assert not parameters.fit(tuple(args), kwargs)
        with pytest.raises(TypeError, match=fn.__name__):
            parameters.refuse(tuple(args), kwargs)
        return

    assert parameters.fit(tuple(args), kwargs)
    assert {name: parameters.finder(name)(tuple(args), kwargs) for name in parameters.names} == bound


def test_a_function_without_a_signature_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"type tells no signature"):
        KeyTemplate("k", type)


@pytest.mark.parametrize(
    ("helper", "fn"),
    [
        (lambda a, b: a, lambda sku, amount: 0),
        (lambda sku: sku, lambda sku, amount=0: 0),
        (lambda sku, amount: sku, lambda sku, amount=0: 0),
        (lambda *args: args, lambda sku, amount: 0),
        (lambda **kwargs: kwargs, lambda sku, amount: 0),
        (lambda sku, *, amount: sku, lambda sku, amount: 0),
        (lambda a, *, amount: a, lambda sku, /, amount: 0),
        (lambda a, b, c: a, lambda *args: 0),
        (lambda a, b, c: a, lambda sku, **more: 0),
        (lambda sku, *, amount: sku, lambda sku, *, amount=0: 0),
        (lambda sku: sku, lambda sku, *, amount=0: 0),
        (max, lambda sku: 0),
    ],
)
def test_a_key_function_that_can_take_some_call_is_taken(helper: Any, fn: Any) -> None:
    KeyTemplate(helper, fn)


@pytest.mark.parametrize(
    ("helper", "fn", "says"),
    [
        (lambda: "k", lambda sku: 0, "takes nothing, but it gets the arguments of <lambda>: sku"),
        (lambda sku: "k", lambda: 0, "takes sku, but it gets the arguments of <lambda>: none"),
        (lambda sku: "k", lambda sku, amount: 0, "takes sku, .*: sku, amount"),
        (lambda **more: "k", lambda sku, /: 0, "takes more, .*: sku"),
        (lambda sku: "k", lambda sku, *, amount: 0, "takes sku, .*: sku, amount"),
    ],
)
def test_a_key_function_that_can_take_no_call_is_refused(helper: Any, fn: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        KeyTemplate(helper, fn)


def test_a_decorator_below_may_add_arguments_that_a_key_function_never_gets() -> None:
    def shown(request: object, user: object) -> None: ...

    @functools.wraps(shown)
    def view(request: object) -> None: ...

    KeyTemplate(lambda request: "k", view)


def test_an_async_key_function_is_refused() -> None:
    async def key(sku: str) -> str:
        return sku

    with pytest.raises(ConfigurationError, match=r"is `async def`; a key is made before"):
        KeyTemplate(key, lambda sku: 0)


def test_methods_know_themselves() -> None:
    assert render("{self}:{sku}", Shop(), "A", of=Shop.sell) == "3:A"


def test_a_partial_of_a_bound_method_takes_no_self() -> None:
    """As Django's method_decorator makes it: its __wrapped__ does."""
    partial = functools.wraps(Shop.sell)(functools.partial(Shop.sell.__get__(Shop())))

    assert render("{sku}", "A", of=partial) == "A"


def test_hostile_values_stay_values() -> None:
    assert render("{sku}:{amount}", "{amount}", 2) == "{amount}:2"
    assert render("{sku}", "{0.__class__}") == "{0.__class__}"


@settings(max_examples=50)
@given(st.text(min_size=1, alphabet="abc{}:"), st.integers())
def test_arguments_are_never_swapped(sku: str, amount: int) -> None:
    template = KeyTemplate("{amount}|{sku}", buy)

    assert template.render((sku, amount), {}) == f"{amount}|{sku}"
    assert template.render((), {"amount": amount, "sku": sku}) == f"{amount}|{sku}"


def test_it_shows_its_recipe() -> None:
    assert repr(KeyTemplate("{sku}", buy)) == "KeyTemplate('{sku}')"
