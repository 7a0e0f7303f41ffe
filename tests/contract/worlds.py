"""The worlds in which every case must hold: each scope and store, by threads and by asyncio tasks."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Protocol

import psycopg
from django.conf import settings
from django.db import connection, transaction

from concurrency_safe import HeldLock, lock
from concurrency_safe.memory import MemoryBackend
from concurrency_safe.postgres.backend import PostgresBackend


def _close() -> None:
    if settings.configured:
        connection.close()  # the running thread's


class Interrupt(BaseException):
    """What is thrown into an actor that waits."""


class Actor(Protocol):
    """Somebody who acquires and releases: a thread or a task of its own, so an owner of its own."""

    started: bool

    async def acquire(self, *keys: Any, **options: Any) -> HeldLock: ...
    async def release(self, held: HeldLock) -> None: ...
    def interrupt(self) -> None:
        """Stop what it waits for; `acquire` raises Interrupt then."""

    async def leave(self) -> None: ...
    @property
    def busy(self) -> bool: ...


class ThreadActor:
    """A thread."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.executor = ThreadPoolExecutor(1)
        self.doing: asyncio.Future[Any] | None = None
        #: Whether it has begun to acquire: only then an interrupt is its own to handle.
        self.started = False
        self.thread = self.executor.submit(threading.current_thread).result()

    async def _do(self, work: Callable[[], Any]) -> Any:
        self.doing = asyncio.get_running_loop().run_in_executor(self.executor, work)
        result = await asyncio.shield(self.doing)
        self.doing = None  # or it would keep a lock that the test wants to forget
        return result

    @property
    def busy(self) -> bool:
        return self.doing is not None and not self.doing.done()

    async def acquire(self, *keys: Any, **options: Any) -> HeldLock:
        def work() -> HeldLock | Interrupt:
            try:
                self.started = True
                return lock(*keys, **self.world.options(options)).acquire()
            except Interrupt as interrupt:  # no thread of an executor survives it
                return interrupt

        held: HeldLock | Interrupt = await self._do(work)
        if isinstance(held, Interrupt):
            raise held
        return held

    async def release(self, held: HeldLock) -> None:
        await self._do(held.release)

    def interrupt(self) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(Interrupt))

    async def leave(self) -> None:
        await self._do(_close)
        self.executor.shutdown()


class TransactionActor(ThreadActor):
    """A thread inside a transaction, from its first lock to its last release."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.stack = ExitStack()
        self.count = 0

    async def acquire(self, *keys: Any, **options: Any) -> HeldLock:
        if self.count == 0:
            await self._do(lambda: self.stack.enter_context(transaction.atomic()))
        self.count += 1
        try:
            return await super().acquire(*keys, **options)
        except BaseException:
            await self._leave_one()
            raise

    async def release(self, held: HeldLock) -> None:
        await super().release(held)
        await self._leave_one()

    async def _leave_one(self) -> None:
        self.count -= 1
        if self.count == 0:
            await self._do(self.stack.close)


class TaskActor:
    """An asyncio task."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.work: asyncio.Queue[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any]] | None] = asyncio.Queue()
        self.doing: asyncio.Future[Any] | None = None
        #: Whether it has begun to acquire: only then an interrupt is its own to handle.
        self.started = False
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while (item := await self.work.get()) is not None:
            work, answer = item
            try:
                answer.set_result(await work())
            except asyncio.CancelledError:
                answer.set_exception(Interrupt())
            except Exception as error:  # noqa: BLE001 - the answer's
                answer.set_exception(error)
            del item, work, answer

    async def _do(self, work: Callable[[], Awaitable[Any]]) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.doing = answer
        await self.work.put((work, answer))
        result = await asyncio.shield(answer)
        self.doing = None  # or it would keep a lock that the test wants to forget
        return result

    @property
    def busy(self) -> bool:
        return self.doing is not None and not self.doing.done()

    async def acquire(self, *keys: Any, **options: Any) -> HeldLock:
        async def work() -> HeldLock:
            self.started = True
            return await lock(*keys, **self.world.options(options)).aacquire()

        held: HeldLock = await self._do(work)
        return held

    async def release(self, held: HeldLock) -> None:
        await self._do(held.arelease)

    def interrupt(self) -> None:
        self.task.get_loop().call_soon_threadsafe(self.task.cancel)  # also from another thread

    async def leave(self) -> None:
        await self.work.put(None)
        await self.task


class World:
    """A store, and how its locks are held."""

    def __init__(self, actor: Callable[[World], Actor], dsn: str, **fixed: Any) -> None:
        self._actor = actor
        self._fixed = fixed
        self.actors: list[Actor] = []
        self.dsn = dsn
        self.store = psycopg.connect(dsn, autocommit=True)
        #: Others, which hold locks as another host would.
        self.outside: list[psycopg.Connection[Any]] = []

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        return {**self._fixed, **given}

    @property
    def is_transaction(self) -> bool:
        """Whether Django's transactions hold the locks."""
        return self._actor is TransactionActor

    @property
    def has_slots(self) -> bool:
        """Whether a key can have several slots: they need sessions."""
        return not self.is_transaction and not isinstance(self._fixed.get("backend"), PostgresBackend)

    def cut(self) -> None:
        """Lose every lock that is held."""
        backend = self._fixed.get("backend")
        if isinstance(backend, MemoryBackend):
            backend.lose()
        self.store.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )

    @property
    def is_memory(self) -> bool:
        """Whether nobody outside this process can hold its locks."""
        return isinstance(self._fixed.get("backend"), MemoryBackend)

    def stranger(self) -> psycopg.Connection[Any]:
        """Give a session of another host's."""
        self.outside.append(psycopg.connect(self.dsn, autocommit=True))
        return self.outside[-1]

    def actor(self) -> Actor:
        actor = self._actor(self)
        self.actors.append(actor)
        return actor

    def rows(self, *, waiting: bool = False) -> int:
        """Count the locks that are held in the server, or awaited."""
        row = self.store.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND (NOT %s OR NOT granted)"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            [waiting],
        ).fetchone()
        assert row
        return int(row[0])

    async def close(self) -> None:
        for actor in self.actors:
            if actor.busy:  # the case has failed, and somebody waits still
                actor.interrupt()
            await actor.leave()
        for stranger in self.outside:
            stranger.close()
        backend = self._fixed.get("backend")
        if backend is not None:
            backend.close()
        self.store.close()
