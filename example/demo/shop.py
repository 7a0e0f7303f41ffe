"""The shop: PostgreSQL, a broker, a migrated database, a web server, and workers of Celery and Dramatiq."""

from __future__ import annotations

import http.client
import os
import platform
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import django
from django.core.management import call_command
from django.db import connection

from example.celery import app
from example.demo.processes import Fleet
from example.demo.report import step
from example.demo.servers import RUN, actor_broker, actor_queue, broker, database, queue

if TYPE_CHECKING:
    from contextlib import ExitStack

WORKERS = ("first", "second")
CHILDREN = 4
#: Of Dramatiq: worker processes, and threads in each.
PROCESSES, THREADS = 2, 4
#: The doors that are views, by their addresses.
VIEWS = ("unguarded", "row-lock", "guarded", "or-busy")


@dataclass(frozen=True)
class Shop:
    """Where the shop is."""

    port: int

    def directions(self) -> str:
        """Return what a person can type to buy something by hand."""
        address = f"http://127.0.0.1:{self.port}"
        names = ("DATABASE_URL", "CELERY_BROKER_URL", "CELERY_QUEUE", "DRAMATIQ_BROKER_URL", "DRAMATIQ_QUEUE")
        return "\n".join(
            [
                "",
                f"The shop is open at {address}/ until Ctrl-C. In another terminal:",
                f"  curl {address}/",
                *(f"  curl -X POST {address}/buy/{door}/play/" for door in VIEWS),
                "or, for scripts and tasks, from the folder of the project:",
                *(f"  export {name}={os.environ[name]}" for name in names),
                "  python -m example.manage buy play --times 3",
                "  celery -A example call example.stock.tasks.buy_guarded --args '[\"play\"]'",
            ]
        )


def open_shop(stack: ExitStack) -> Shop:
    """Start everything and return once it answers; `stack` stops it."""
    database_url, where = stack.enter_context(database())
    step(f"PostgreSQL is ready: {where}")
    broker_url, where = stack.enter_context(broker())
    actor_url = stack.enter_context(actor_broker(broker_url))
    _set_up_django(database_url, broker_url, actor_url)
    stack.callback(connection.close)
    stack.enter_context(actor_queue())
    stack.enter_context(queue(app))
    step(f"the broker is ready: {where}")
    call_command("migrate", verbosity=0)
    step("the tables are migrated")
    fleet = stack.enter_context(Fleet())
    port = _start_web_server(fleet)
    for name in WORKERS:
        _start_worker(fleet, name)
    _start_actors(fleet)
    fleet.wait_until(lambda: _web_server_answers(port), "the web server")
    step(f"the web server answers at http://127.0.0.1:{port}/")
    fleet.wait_until(_workers_answer, "a Celery worker")
    step(f"{len(WORKERS)} Celery workers answer, with {CHILDREN} processes each")
    fleet.wait_until(_actors_answer, "the Dramatiq workers")
    step(f"the Dramatiq workers answer: {PROCESSES} processes with {THREADS} threads each")
    return Shop(port)


def _set_up_django(database_url: str, broker_url: str, actor_url: str) -> None:
    """Tell Django, here and in every process started from here, where the servers are."""
    os.environ.update(
        DATABASE_URL=database_url,
        CELERY_BROKER_URL=broker_url,
        CELERY_QUEUE=RUN,
        DRAMATIQ_BROKER_URL=actor_url,
        DRAMATIQ_QUEUE=RUN,
        DJANGO_SETTINGS_MODULE="example.settings",
    )
    # The locks belong into the same database as the rows.
    os.environ.pop("CONCURRENCY_SAFE_DSN", None)
    django.setup()


def _start_web_server(fleet: Fleet) -> int:
    # Listening before the server starts: nobody can take the port in between.
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        bind = f"fd://{listener.fileno()}"
        config = "python:example.gunicorn_config"
        fleet.start(
            "the web server",
            *("gunicorn", "-c", config, "-b", bind, "example.wsgi"),
            pass_fds=[listener.fileno()],
        )
        port: int = listener.getsockname()[1]
        return port


def _web_server_answers(port: int) -> bool:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        client.request("GET", "/")
        return client.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        client.close()


def _start_worker(fleet: Fleet, name: str) -> None:
    quick = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    worker = ("-n", _node(name), "-c", str(CHILDREN), "-P", "prefork", "-l", "warning")
    fleet.start(f"worker {name}", "celery", "-A", "example", "worker", *worker, *quick)


def _workers_answer() -> bool:
    nodes = [_node(name) for name in WORKERS]
    answers = app.control.ping(destination=nodes, timeout=0.5) or []
    return {node for answer in answers for node in answer} == set(nodes)


def _start_actors(fleet: Fleet) -> None:
    size = ("--processes", str(PROCESSES), "--threads", str(THREADS))
    fleet.start("the Dramatiq workers", "dramatiq", "example.actors", *size, "--queues", RUN)


def _actors_answer() -> bool:
    from dramatiq.results import ResultError  # noqa: PLC0415 - with the actors

    from example.stock.actors import answer  # noqa: PLC0415 - they need the addresses

    try:
        return answer.send().get_result(block=True, timeout=1000)
    except ResultError:
        return False


def _node(name: str) -> str:
    return f"{RUN}_{name}@{platform.node()}"
