"""Options of a guarded actor: a mistake stops the import, with the right name in its message."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import os
import subprocess
import sys
import types
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import dramatiq
import pytest
from dramatiq.broker import MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO, CurrentMessage, Middleware, Pipelines, Retries, TimeLimitExceeded
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from concurrency_safe import (
    Call,
    ConfigurationError,
    KeyTemplateError,
    LockAcquireTimeout,
    Retry,
    assert_locked,
    current_lock,
    instrumentation,
    lock,
)
from concurrency_safe.contrib.dramatiq import ConcurrencySafeMiddleware, middleware, requeue
from concurrency_safe.contrib.dramatiq.outcomes import Neighbours
from concurrency_safe.locks import current_work
from tests.integration.conftest import Rival, wait_for

#: Ends the sessions that hold a lock in this database (others are another lane's), and counts them.
CUT_HOLDERS = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_locks JOIN pg_database d ON database = d.oid "
    "WHERE locktype = 'advisory' AND granted AND datname = current_database()"
)

actor_of: Any = dramatiq.actor  # its overloads don't know fn and options together


def held_key() -> str:
    assert_locked()
    held = current_lock()
    assert held is not None
    return held.keys[0]


def declare(kind: str, broker: dramatiq.Broker | None = None, **options: Any) -> Any:
    """Declare an actor `pay(user_id, amount=0)` of the given kind, on a broker of its own."""
    mine = broker or a_broker()
    if kind == "function":

        def pay(user_id: int, amount: int = 0) -> str:
            return held_key()

        return actor_of(pay, broker=mine, **options)
    if kind == "async":

        async def apay(user_id: int, amount: int = 0) -> str:
            return held_key()

        return actor_of(apay, broker=mine, actor_name="pay", **options)

    class Pay(dramatiq.GenericActor):
        class Meta:
            abstract = True

        def perform(self, user_id: int, amount: int = 0) -> str:  # noqa: ARG002 - what keys are made of
            return held_key()

    meta = type("Meta", (), {"broker": mine, "actor_name": "pay", **options})
    return types.new_class("PayNow", (Pay,), exec_body=lambda names: names.update(Meta=meta))


def a_broker(*middleware: Middleware) -> StubBroker:
    return StubBroker(middleware=[*middleware, ConcurrencySafeMiddleware()])


KINDS = ["function", "async", "class"]


async def async_key(user_id: int, amount: int = 0) -> str:
    return f"{user_id}{amount}"


MISTAKES = [
    ({"lock_key": "pay:{uid}"}, r"actor pay: .*'pay:\{uid\}'.*'uid'.*'user_id', 'amount'"),
    ({"lock_key": "pay:{}"}, "actor pay: .*by position"),
    ({"lock_key": ""}, "actor pay: "),
    ({"lock_key": "pay:{user_id!z}"}, "actor pay: .*no conversion '!z'"),
    ({"lock_key": 7}, "actor pay: key=7"),
    ({"key": "pay:{user_id}"}, "actor pay: the option 'key' does nothing; use lock_key"),
    ({"once": True}, "'once' does nothing; use lock_key"),
    ({"unique_on": ["user_id"]}, "'unique_on' does nothing; use lock_key"),
    ({"timeout": 3}, "'timeout' does nothing; use lock_timeout"),
    ({"slots": 2}, "'slots' does nothing; use lock_slots"),
    ({"shared": True}, "'shared' does nothing; use lock_shared"),
    ({"scope": "session"}, "'scope' does nothing"),
    ({"lock_timeout": 1}, "lock_timeout without lock_key guards nothing"),
    ({"on_conflict": "skip"}, "on_conflict without lock_key guards nothing"),
    ({"lock_key": "pay:{user_id}", "lock_timeout": -1}, "actor pay: .*timeout=-1"),
    ({"lock_key": "pay:{user_id}", "lock_slots": 0}, "actor pay: .*slots=0"),
    ({"lock_key": "pay:{user_id}", "on_conflict": "retri"}, "did you mean 'retry'"),
    ({"lock_key": "pay:{user_id}", "on_conflict": dramatiq.errors.Retry}, "not the Retry of concurrency_safe"),
    ({"lock_key": lambda: "pay"}, "actor pay: key=.* takes nothing, but it gets the arguments of .*: user_id, amount"),
    ({"lock_key": async_key}, "actor pay: key=.* is `async def`"),
    ({"lock_key": True, "on_conflict": lambda: 0}, "actor pay: on_conflict=.* takes nothing"),
    (
        {"lock_key": True, "on_conflict": Call(lambda key: key, pass_conflict=True)},
        "takes key, but .*: the conflict",
    ),
]


def first(value: object) -> str:
    return ",".join(value) if isinstance(value, dict) else ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "says"), MISTAKES, ids=first)
def test_a_mistake_ends_the_declaration(kind: str, options: dict[str, Any], says: str) -> None:
    broker = a_broker()
    with pytest.raises((ConfigurationError, KeyTemplateError), match=says):
        declare(kind, broker, **options)

    assert broker.actors == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_is_found_by_a_middleware_that_is_added_late(kind: str) -> None:
    class Others(Middleware):
        @property
        def actor_options(self) -> set[str]:
            return {"lock_key"}

    broker = StubBroker(middleware=[Others()])
    declare(kind, broker, lock_key="pay:{uid}")
    with pytest.raises(KeyTemplateError, match=r"actor pay: .*'uid'"):
        broker.add_middleware(ConcurrencySafeMiddleware())


@pytest.mark.parametrize("kind", ["function", "class"])
def test_nobody_would_await_an_async_answer_to_a_conflict_of_a_plain_function(kind: str) -> None:
    with pytest.raises(ConfigurationError, match=r"actor pay: on_conflict=.* is `async def`"):
        declare(kind, lock_key=True, on_conflict=async_key)


def test_an_async_perform_is_refused_since_nobody_would_await_it() -> None:
    async def perform(self: Any, user_id: int) -> None: ...

    meta = type("Meta", (), {"broker": a_broker(), "lock_key": True})
    with pytest.raises(ConfigurationError, match="never awaits"):
        types.new_class(
            "Pay", (dramatiq.GenericActor,), exec_body=lambda names: names.update(Meta=meta, perform=perform)
        )


class Awaited:
    """Dramatiq does not know that its call gives a coroutine."""

    __name__ = "pay"

    async def __call__(self, user_id: int) -> None:
        """Do nothing."""


def test_an_object_whose_call_nobody_would_await_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"actor pay: Dramatiq never awaits .*`async def __call__`"):
        actor_of(Awaited(), broker=a_broker(), actor_name="pay", lock_key="pay:{user_id}")


class Wraps(Middleware):
    """Puts a function of its own around an actor's."""

    def __init__(self, *, visibly: bool) -> None:
        self._visibly = visibly

    def before_declare_actor(self, _: Any, actor: Any) -> None:
        inner = actor.fn

        def outer(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        actor.fn = functools.wraps(inner)(outer) if self._visibly else outer


def test_an_async_function_that_another_middleware_has_wrapped_is_refused() -> None:
    """Its coroutine could outlive the call, and so the lock."""
    with pytest.raises(ConfigurationError, match=r"actor pay: .* put ConcurrencySafeMiddleware before"):
        declare("async", a_broker(Wraps(visibly=True)), lock_key="pay:{user_id}")


@pytest.mark.parametrize("visibly", [True, False])
@pytest.mark.parametrize("kind", ["function", "async"])
def test_a_middleware_that_wraps_what_is_guarded_does_not_guard_it_twice(
    kind: str, visibly: Any, rival: Rival, loop: None
) -> None:
    broker = StubBroker(middleware=[ConcurrencySafeMiddleware(), Wraps(visibly=visibly)])
    actor = declare(kind, broker, lock_key="pay:{user_id}")
    assert actor(7) == "pay:7"


def test_an_async_function_may_be_declared_again_with_the_same_key(rival: Rival, loop: None) -> None:
    broker = a_broker()
    first_actor = declare("async", broker, lock_key="pay:{user_id}")
    again = actor_of(first_actor.fn, broker=broker, actor_name="later", lock_key="pay:{user_id}")
    plain = actor_of(first_actor.fn, broker=broker, actor_name="plain")

    assert again(7) == plain(7) == "pay:7"
    rival.hold("pay:7")
    for actor in (again, plain):
        with pytest.raises(LockAcquireTimeout):
            actor(7)


def test_a_decorator_around_the_function_of_an_async_actor_is_not_passed_by(rival: Rival) -> None:
    broker = a_broker()
    first_actor = declare("async", broker, lock_key="pay:{user_id}")

    @functools.wraps(first_actor.fn)
    def audited(user_id: int) -> Any:
        return first_actor.fn(user_id)

    with pytest.raises(ConfigurationError, match="decorate the `async def` itself"):
        actor_of(audited, broker=broker, actor_name="later", lock_key="later:{user_id}")


def test_an_option_of_another_middleware_is_its_own() -> None:
    class Others(Middleware):
        @property
        def actor_options(self) -> set[str]:
            return {"timeout", "lock_colour"}

    actor = declare("function", a_broker(Others()), lock_key="pay:{user_id}", timeout=3, lock_colour="red")
    assert actor.options["timeout"] == 3


@pytest.fixture
def loop() -> Any:
    """Run the event loop that Dramatiq starts in a worker."""
    asyncio_middleware: Any = AsyncIO()
    asyncio_middleware.before_worker_boot(None, None)
    yield
    asyncio_middleware.after_worker_shutdown(None, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("pay:{user_id}", "pay:7"),
        (("pay", "{user_id}"), "(pay/7)"),
        (lambda user_id, amount=0: f"{user_id}-{amount}", "7-0"),
        (True, 'pay{"amount":0,"user_id":7}'),
    ],
    ids=["template", "tuple", "callable", "True"],
)
def test_direct_calls_take_the_lock(kind: str, key: Any, text: str, rival: Rival, loop: None) -> None:
    actor = declare(kind, lock_key=key)
    assert actor(7) == text

    rival.hold(("pay", "7") if isinstance(key, tuple) else text)
    with pytest.raises(LockAcquireTimeout, match="is held by"):
        actor(7)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_key_nothing_is_held(kind: str, loop: None) -> None:
    with pytest.raises(Exception, match="no lock is held here"):
        declare(kind)(7)


@pytest.mark.parametrize("kind", ["function", "async"])
def test_the_function_is_dressed_as_it_was(kind: str) -> None:
    actor = declare(kind, lock_key=True)
    assert actor.fn.__name__ in {"pay", "apay"}
    assert actor.fn.__wrapped__ is not None


def test_a_key_error_is_the_calls_own(rival: Rival) -> None:
    actor = declare("function", lock_key="pay:{user_id}")
    with pytest.raises(KeyTemplateError, match="None"):
        actor(None)
    with pytest.raises(TypeError, match="user_id"):
        actor()


def test_an_async_body_enters_its_own_lock_again(rival: Rival, loop: None) -> None:
    async def pay(user_id: int) -> bool:
        async with lock(f"pay:{user_id}", timeout=0) as held:
            return held.is_active

    assert actor_of(pay, broker=a_broker(), lock_key="pay:{user_id}")(7)


def with_another_function(fn: Any) -> Any:
    @functools.wraps(fn)
    def another(user_id: int) -> tuple[str, ...]:
        assert_locked("refund:7")
        return (held_key(),)

    return another


@pytest.mark.parametrize("dress", [lambda fn: fn, with_another_function], ids=["as it is", "wrapped"])
def test_the_function_of_a_guarded_actor_is_guarded_anew_in_another(dress: Callable[[Any], Any], rival: Rival) -> None:
    broker = a_broker()
    pay = declare("function", broker, lock_key="pay:{user_id}")
    refund = actor_of(dress(pay.fn), broker=broker, actor_name="refund", lock_key="refund:{user_id}")
    assert refund(7) in {"pay:7", ("refund:7",)}

    rival.hold("refund:7")
    with pytest.raises(LockAcquireTimeout, match="'refund:7' is held by"):
        refund(7)


@pytest.mark.parametrize("options", [{}, {"lock_key": "pay:{user_id}"}], ids=first)
@pytest.mark.parametrize("middleware", [[], [AsyncIO()]], ids=["", "AsyncIO"])
def test_a_decorator_that_runs_a_coroutine_itself_is_not_passed_by(
    options: dict[str, Any], middleware: list[Middleware], rival: Rival
) -> None:
    seen: list[Any] = []

    def run(fn: Any) -> Any:
        @functools.wraps(fn)
        def runs(user_id: int) -> None:
            held = current_lock()
            seen.append(held and held.keys[0])
            asyncio.run(fn(user_id))

        return runs

    async def pay(user_id: int) -> None:
        seen.append(user_id)

    broker = a_broker(*middleware)
    assert process(broker, actor_of(run(pay), broker=broker, **options).message(7)) == []
    assert seen == ["pay:7" if options else None, 7]


# Messages, processed by worker threads of this process.


def process(broker: StubBroker, message: Any) -> list[dramatiq.Message[Any]]:
    """Let a worker process what is in the queues; give the dead letters."""
    worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=50)
    worker.start()
    try:
        broker.enqueue(message)
        broker.join("default", fail_fast=False, timeout=20_000)
        worker.join()
    finally:
        worker.stop()
    return [dramatiq.Message.decode(one.encode()) for one in broker.dead_letters]


def noting(seen: list[Any]) -> Callable[..., None]:
    def note(user_id: int) -> None:
        held = current_lock()
        seen.append(held and held.keys[0])

    return note


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, ["pay:7"]),
        ({"lock_key": "refund:{user_id}"}, ["refund:7"]),
        ({"lock_key": ["refund", "{user_id}"]}, ["(refund/7)"]),
        ({"lock_key": True}, ['note{"user_id":7}']),
        ({"lock_shared": True}, ["pay:7"]),
    ],
    ids=first,
)
def test_a_message_may_have_options_of_its_own(options: dict[str, Any], keys: list[str], rival: Rival) -> None:
    broker, seen = a_broker(), list[Any]()
    actor = actor_of(noting(seen), broker=broker, lock_key="pay:{user_id}")

    assert process(broker, actor.message_with_options(args=(7,), **options)) == []
    assert seen == keys


def test_a_message_may_have_options_of_others(rival: Rival) -> None:
    class Others(Middleware):
        @property
        def actor_options(self) -> set[str]:
            return {"timeout"}

    broker, seen = a_broker(Others()), list[Any]()
    actor = actor_of(noting(seen), broker=broker, lock_key="pay:{user_id}")
    assert process(broker, actor.message_with_options(args=(7,), timeout=3, colour="red")) == []
    assert seen == ["pay:7"]


def test_a_middleware_that_takes_the_place_of_an_equal_one_is_another() -> None:
    class Equal(Middleware):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        __hash__ = None  # type: ignore[assignment]

    broker = a_broker(Equal())
    neighbours = Neighbours(broker)
    assert neighbours.are_current()
    broker.middleware[0] = Equal()
    assert not neighbours.are_current()


def with_results() -> StubBroker:
    results: Any = Results(backend=StubBackend(), store_results=True)  # type: ignore[no-untyped-call]
    return StubBroker(middleware=[CurrentMessage(), results, ConcurrencySafeMiddleware()])


def test_a_message_that_is_sent_twice_runs_twice(rival: Rival) -> None:
    """A broker's second delivery has the id, too; but it was not sent."""
    broker, seen = with_results(), list[Any]()
    actor = actor_of(noting(seen), broker=broker, lock_key="pay:{user_id}")
    message = actor.message(7)

    broker.enqueue(message)
    assert process(broker, message) == []
    assert seen == ["pay:7", "pay:7"]
    assert requeue.ENTRY not in message.options


def test_a_body_may_send_its_own_message_again(rival: Rival) -> None:
    broker, seen = with_results(), list[Any]()

    def polls(user_id: int) -> None:
        message: Any = CurrentMessage.get_current_message()
        seen.append(message)
        if len(seen) < 3:
            broker.enqueue(message.copy())

    actor = actor_of(polls, broker=broker, lock_key="pay:{user_id}")
    came_back = actor.message_with_options(args=(7,), cs_conflicts=1, cs_since=0.0, cs_attempt=0)
    assert process(broker, came_back) == []
    assert len(seen) == 3


def test_a_copy_of_a_message_that_was_sent_is_the_same_message(rival: Rival) -> None:
    broker, seen = with_results(), list[Any]()
    actor = actor_of(noting(seen), broker=broker, lock_key="pay:{user_id}")
    message = actor.message_with_options(args=(7,), **{requeue.ENTRY: "one"})

    broker.enqueue(message)
    assert process(broker, message.copy(options={requeue.CONFLICTS: 1})) == []
    assert seen == ["pay:7"]


def test_an_actor_may_run_in_a_context_of_its_own(rival: Rival) -> None:
    """What has become of a delivery is known past the end of that context."""

    class Isolated(dramatiq.Actor[..., Any]):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return contextvars.copy_context().run(super().__call__, *args, **kwargs)

    results: Any = Results(backend=StubBackend(), store_results=True)  # type: ignore[no-untyped-call]
    broker, seen = StubBroker(middleware=[Pipelines(), results, ConcurrencySafeMiddleware()]), list[Any]()
    actor = actor_of(noting(seen), broker=broker, lock_key="pay:{user_id}", actor_class=Isolated)
    after = actor_of(lambda _result: seen.append("went on"), broker=broker, actor_name="after")
    target = after.message().asdict()
    message = actor.message_with_options(args=(7,), pipe_target=target, **{requeue.ENTRY: "one"})

    for _ in ("sent", "delivered again"):
        assert process(broker, message.copy()) == []
    assert seen == ["pay:7", "went on"]


def test_an_interrupted_message_keeps_what_tells_it_from_others(rival: Rival) -> None:
    broker = a_broker(Retries(max_retries=0))

    actor = actor_of(lambda _user_id: sys.setprofile(interrupt_at("__exit__")), broker=broker, lock_key="pay")
    message = actor.message_with_options(args=(7,), **{requeue.ENTRY: "one"})

    (dead,) = process(broker, message)
    assert dead.options[requeue.ENTRY] == "one"
    assert rival.is_free("pay")


@pytest.mark.parametrize("kind", ["function", "async"])
def test_a_body_does_not_begin_when_its_lock_is_lost_while_the_results_are_asked(
    kind: str, rival: Rival, caplog: pytest.LogCaptureFixture
) -> None:
    cuts: list[object] = []

    class Slow(StubBackend):
        def get_result(self, message: Any, **options: Any) -> Any:
            if not cuts:
                cuts.append(rival.connection.execute(CUT_HOLDERS).fetchone())
                wait_for(lambda: "was lost while it was held" in caplog.text)
            return super().get_result(message, **options)

    results: Any = Results(backend=Slow(), store_results=True)  # type: ignore[no-untyped-call]
    broker = StubBroker(middleware=[AsyncIO(), results, ConcurrencySafeMiddleware()])
    actor = declare(kind, broker, lock_key="pay:{user_id}")
    message = actor.message(7)

    assert process(broker, message) == []
    assert cuts == [(1,)]
    assert message.get_result(backend=results.backend) == "pay:7"


def interrupt_at(name: str) -> Callable[[FrameType, str, object], None]:
    """Give a profile function that interrupts the middleware's function `name` when it begins."""

    def interrupt(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and (frame.f_globals["__name__"], frame.f_code.co_name) == (middleware.__name__, name):
            raise TimeLimitExceeded

    return interrupt


@pytest.mark.parametrize("where", ["_attempt", "_calm"])
def test_an_interrupted_message_leaves_nothing_to_its_thread(where: str, rival: Rival) -> None:
    broker = a_broker()
    actor = actor_of(noting([]), broker=broker, lock_key="pay:{user_id}")

    def process_interrupted() -> None:
        broker.emit_before("process_message", MessageProxy(actor.message(7)))
        sys.setprofile(interrupt_at(where))
        with pytest.raises(TimeLimitExceeded):
            actor.fn(7)
        assert current_work.get() is None
        assert instrumentation.conflicts.get() is None

    contextvars.copy_context().run(process_interrupted)
    assert rival.is_free("pay:7")


def test_a_message_may_be_processed_inside_another_one(rival: Rival) -> None:
    """As brokers do that process what is sent at once."""
    broker, seen = a_broker(), list[Any]()
    inner = actor_of(noting(seen), broker=broker, actor_name="inner", lock_key="pay:{user_id}")

    def outside(user_id: int) -> None:
        outer_work = current_work.get()
        message = MessageProxy(inner.message(user_id))
        broker.emit_before("process_message", message)
        inner.fn(user_id)
        broker.emit_after("process_message", message)
        seen.append(outer_work is not None and current_work.get() == outer_work)

    actor = actor_of(outside, broker=broker, lock_key="outer")
    assert process(broker, actor.message(7)) == []
    assert seen == ["pay:7", True]


def test_a_message_is_freed_when_it_is_done(rival: Rival) -> None:
    """Without the collector, which may come late in a big process."""
    alive: list[weakref.ref[Any]] = []

    class Look(Middleware):
        def after_process_message(self, broker: Any, message: Any, **_: Any) -> None:  # noqa: ARG002 - Dramatiq's
            alive.append(weakref.ref(message))

    broker = a_broker(Look())
    actor = actor_of(noting([]), broker=broker, lock_key="pay:{user_id}")
    gc.disable()
    try:
        for number in range(20):
            actor.send(number)
        process(broker, actor.message(20))
        assert len(alive) == 21
        assert sum(one() is not None for one in alive) <= 2  # the last one of each thread
    finally:
        gc.enable()


def test_a_message_may_guard_an_actor_that_is_not(rival: Rival) -> None:
    broker, seen = a_broker(), list[Any]()
    actor = actor_of(noting(seen), broker=broker)

    process(broker, actor.message_with_options(args=(7,), lock_key="pay:{user_id}"))
    process(broker, actor.message(7))
    assert seen == ["pay:7", None]


@pytest.mark.parametrize(
    "options",
    [
        {"lock_key": "pay:{uid}"},
        {"lock_key": None},
        {"lock_kee": "pay:{user_id}"},
        {"onConflict": "skip"},
        {"on_conflct": "skip"},
        {"lock_timeout": "soon"},
        {"on_conflict": "retri"},
        {"key": "pay:{user_id}"},
        {"timeout": 3},
        {"once": True},
        {"Timeout": 3},
        {"lock_slots": 2},
    ],
    ids=first,
)
@pytest.mark.parametrize("guarded", [True, False])
def test_a_mistake_in_a_message_never_runs_the_body(options: dict[str, Any], guarded: object, rival: Rival) -> None:
    broker, seen = StubBroker(middleware=[dramatiq.middleware.Retries()]), list[Any]()
    broker.add_middleware(ConcurrencySafeMiddleware())
    actor = actor_of(noting(seen), broker=broker, max_retries=0, **({"lock_key": "pay:{user_id}"} if guarded else {}))

    (dead,) = process(broker, actor.message_with_options(args=(7,), **options))
    assert dead.args == (7,)
    assert seen == []


def _pieces(user_id: int) -> Iterator[int]:
    yield user_id


async def _pieces_later(user_id: int) -> AsyncIterator[int]:
    yield user_id


@pytest.mark.parametrize("body", [_pieces, _pieces_later])
def test_a_body_that_a_call_does_not_run_is_refused(body: Any) -> None:
    broker = a_broker()
    with pytest.raises(ConfigurationError, match="is a generator function"):
        actor_of(body, broker=broker, lock_key="pay:{user_id}")
    assert broker.actors == {}


def test_a_conflict_of_a_lock_inside_the_body_is_the_bodys_own_error(rival: Rival) -> None:
    broker = StubBroker(middleware=[dramatiq.middleware.Retries()])
    broker.add_middleware(ConcurrencySafeMiddleware())
    ran = []

    def pay(user_id: int) -> None:
        ran.append(user_id)
        with lock("inner", timeout=0):
            raise AssertionError

    actor = actor_of(pay, broker=broker, max_retries=0, lock_key=True, on_conflict=Retry(delay=0, max_delay=0))
    rival.hold("inner")
    (dead,) = process(broker, actor.message(7))
    assert dead.args == (7,)
    assert ran == [7]


MODULE = """
import dramatiq
from dramatiq.broker import MessageProxy
from dramatiq.brokers.stub import StubBroker
from concurrency_safe.contrib.dramatiq import ConcurrencySafeMiddleware, requeue
broker = StubBroker()
broker.add_middleware(ConcurrencySafeMiddleware())
dramatiq.set_broker(broker)

@dramatiq.actor(lock_key="pay:{uid}")
def pay(user_id): ...
"""


def test_a_worker_with_a_mistake_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "bad_actors.py").write_text(MODULE)
    command = [sys.executable, "-m", "dramatiq", "bad_actors", "--path", str(tmp_path), "--processes", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=50)

    assert ran.returncode != 0
    assert "actor pay: key template 'pay:{uid}'" in ran.stderr
    assert "ready for action" not in ran.stderr
