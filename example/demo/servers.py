"""Where PostgreSQL and the broker come from: the environment, or this run's own servers."""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psycopg
from kombu.exceptions import OperationalError
from psycopg import sql

from concurrency_safe.testing import PostgresServer, ValkeyServer
from example.demo.processes import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

#: Marks what this run puts on a server that others use as well.
RUN = f"concurrency_safe_demo_{secrets.token_hex(4)}"


@contextmanager
def database() -> Iterator[tuple[str, str]]:
    """Yield the address of an empty database for this run, and a word on where it is."""
    given = os.environ.get("DATABASE_URL")
    if given:
        with _database_of_our_own(given) as url:
            yield url, f"database {RUN} on the server in DATABASE_URL"
    else:
        with PostgresServer() as server:
            yield server.dsn, "a server of its own"


@contextmanager
def broker() -> Iterator[tuple[str, str]]:
    """Yield the address of a broker, and a word on where it is."""
    given = os.environ.get("CELERY_BROKER_URL")
    if given:
        yield given, f"queue {RUN} on the broker in CELERY_BROKER_URL"
    else:
        with ValkeyServer() as server:
            yield server.url, "a server of its own"


@contextmanager
def actor_broker(celery_url: str) -> Iterator[str]:
    """Yield the address of a Redis for the actors: the given one, Celery's, or one of our own."""
    given = os.environ.get("DRAMATIQ_BROKER_URL", celery_url)
    if given.startswith("redis"):
        yield given
    else:
        with ValkeyServer() as server:
            yield server.url


@contextmanager
def actor_queue() -> Iterator[None]:
    """Delete this run's queue of actors in the end."""
    from example.actors import broker as dramatiq_broker  # noqa: PLC0415 - it needs the addresses

    try:
        yield
    finally:
        dramatiq_broker.flush_all()
        for key in dramatiq_broker.client.scan_iter(f"dramatiq:*{RUN}*"):
            dramatiq_broker.client.delete(key)
        dramatiq_broker.client.close()


@contextmanager
def queue(app: Celery) -> Iterator[None]:
    """Delete this run's queue in the end: the broker may be someone else's."""
    _check_broker(app)
    try:
        yield
    finally:
        with app.connection_for_write() as connection:
            # Without a limit, a broker that is gone by now would be waited for.
            connection.ensure_connection(max_retries=1)
            ours = app.amqp.queues[RUN](connection.default_channel)
            # Redis forgets a queue's binding only on a connection that knows the queue.
            ours.declare()
            ours.delete()
            ours.exchange.delete()


def _check_broker(app: Celery) -> None:
    with app.connection_for_write() as connection:
        try:
            connection.ensure_connection(max_retries=1)
        except OperationalError as error:
            raise DemoError(f"the broker in CELERY_BROKER_URL can't be reached: {error}") from error


@contextmanager
def _database_of_our_own(server: str) -> Iterator[str]:
    name = sql.Identifier(RUN)
    with _connect(server) as connection:
        try:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
            yield urlsplit(server)._replace(path=f"/{RUN}").geturl()
        finally:
            # FORCE: a session that was killed a moment ago may still be on its way out.
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


def _connect(server: str) -> psycopg.Connection:
    try:
        return psycopg.connect(server, autocommit=True)
    except psycopg.Error as error:
        raise DemoError(f"the server in DATABASE_URL can't be reached: {error}") from error
