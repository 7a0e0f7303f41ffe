"""The crowd: clients of one door, all at once, that report what they were told."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from celery.exceptions import TimeoutError as NoResult
from dramatiq.results import ResultError

from example.demo.processes import ROOT, DemoError

if TYPE_CHECKING:
    from celery import Task
    from celery.result import AsyncResult
    from dramatiq import Actor, Message

#: Seconds of waiting that count as a conflict: well over the cost of a free lock, well under the
#: work in the section.
WAITED = 0.010
#: Seconds until a client of the web server gives up on its request, new tries after a 409 included.
PATIENCE = 10.0
#: Seconds until the crowd of tasks, or of actors, gives up as a whole.
LIMIT = 30.0
#: Hosts whose cron starts the same job.
HOSTS = 2
#: Other doors' requests for one scheduled time: each takes two new processes and a third.
REQUESTS_A_TICK = 16
#: What their job is: `curl -X POST`, for machines that have no curl.
_CURL = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("POST", sys.argv[2])
print(connection.getresponse().read().decode())
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much is asked of each door."""

    requests: int
    stock: int
    clients: int
    scripts: int


@dataclass(frozen=True)
class Answer:
    """What became of one request: sold, sold out (False) or failed (None); and its conflicts."""

    sold: bool | None
    conflicts: int = 0
    trouble: str | None = None

    @classmethod
    def of(cls, told: dict[str, Any], conflicts: int = 0) -> Answer:
        """Read the answer of a view or a script."""
        return cls(told["sold"], conflicts + (told.get("waited", 0) > WAITED))


@dataclass(frozen=True)
class Told:
    """All answers of one crowd, and the seconds from the first request to the last answer."""

    answers: list[Answer]
    seconds: float


def over_http(port: int, path: str, load: Load) -> Told:
    """Send `load.requests` POST requests from `load.clients` threads; 409 means to try again."""
    began = time.monotonic()
    with ThreadPoolExecutor(load.clients) as pool:
        answers = list(pool.map(partial(_post, port), [path] * load.requests))
    return Told(answers, time.monotonic() - began)


def _post(port: int, path: str) -> Answer:
    conflicts = 0
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            status, body = _exchange(port, path)
        except (OSError, http.client.HTTPException) as error:
            return Answer(None, conflicts, f"{type(error).__name__}: {error}")
        if status == http.HTTPStatus.OK:
            return Answer.of(json.loads(body), conflicts)
        if status != http.HTTPStatus.CONFLICT:
            return Answer(None, conflicts, f"HTTP status {status}")
        conflicts += 1
        time.sleep(random.uniform(0.01, 0.05))  # noqa: S311  # spreads clients, hides nothing
    return Answer(None, conflicts, f"told 409 {conflicts} times in {PATIENCE:.0f} s")


def _exchange(port: int, path: str) -> tuple[int, bytes]:
    # Not urllib.request: that asks a proxy from the environment even for this machine's address.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def by_scripts(sku: str, load: Load) -> Told:
    """Run `load.scripts` processes of the script, started together once each of them is ready."""
    times = load.requests // load.scripts
    with ExitStack() as stack:
        scripts = [stack.enter_context(_script(sku, times)) for _ in range(load.scripts)]
        for script in scripts:
            # On the way out of an interrupted run; one that has ended is left alone.
            stack.callback(script.kill)
        for script in scripts:
            _wait_until_ready(script)
        began = time.monotonic()
        for script in scripts:
            if script.stdin:
                script.stdin.write("go\n")
                script.stdin.flush()
        outputs = [script.communicate()[0] for script in scripts]
        seconds = time.monotonic() - began
    return Told([answer for output in outputs for answer in _sales(output, times)], seconds)


def _script(sku: str, times: int) -> subprocess.Popen[str]:
    command = ["example.manage", "buy", sku, "--times", str(times), "--starting-line"]
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_until_ready(script: subprocess.Popen[str]) -> None:
    said = []
    for line in script.stdout or ():
        if line.strip() == "ready":
            return
        said.append(line)
    raise DemoError(f"the script ended before it was ready; it said:\n{''.join(said)}")


def _sales(output: str, times: int) -> list[Answer]:
    lines = output.splitlines()
    answers = [Answer.of(json.loads(line)) for line in lines if line.startswith("{")]
    missing = Answer(None, trouble=lines[-1] if lines else "the script printed nothing")
    return [*answers, *[missing] * (times - len(answers))]


def by_cron(port: int, sku: str, load: Load) -> Told:
    """Let the cron of `HOSTS` hosts start the same job at some scheduled times, one after the other.

    The job is a POST request. Each scheduled time is one request to the shop, which one host has to make; a host that
    leaves it to another one is a conflict.
    """
    first = datetime(2026, 1, 1, tzinfo=timezone.utc)
    began = time.monotonic()
    answers = [
        _at_tick(port, sku, first + timedelta(minutes=number)) for number in range(load.requests // REQUESTS_A_TICK)
    ]
    return Told(answers, time.monotonic() - began)


def _at_tick(port: int, sku: str, tick: datetime) -> Answer:
    guard = ["concurrency_safe.cli", "run", f"--tick={tick.isoformat()}", f"--wait={PATIENCE}", f"cron:{sku}"]
    job = [sys.executable, "-ISc", _CURL, str(port), f"/buy/guarded/{sku}/"]
    # The database is known by its URL: a wrapper that loads no Django starts sooner.
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    with ExitStack() as stack:
        hosts = [stack.enter_context(_host([*guard, "--", *job], environment)) for _ in range(HOSTS)]
        for host in hosts:
            stack.callback(host.terminate)  # which is passed on to the job
        outputs = [host.communicate()[0] for host in hosts]
    sales = [line for output in outputs for line in output.splitlines() if line.startswith("{")]
    if len(sales) != 1 or any(host.returncode for host in hosts):
        return Answer(None, trouble=f"{tick}: {len(sales)} hosts ran the job; they said: {''.join(outputs)!r}")
    return Answer.of(json.loads(sales[0]), conflicts=outputs.count(""))


def _host(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def by_tasks(task: Task[[str], bool], sku: str, load: Load) -> Told:
    """Send `load.requests` tasks to the workers and wait for their results."""
    began = time.monotonic()
    results = [task.delay(sku) for _ in range(load.requests)]
    answers = [_result(result, began + LIMIT) for result in results]
    return Told(answers, time.monotonic() - began)


def _result(result: AsyncResult[bool], deadline: float) -> Answer:
    try:
        told = result.get(timeout=max(0.1, deadline - time.monotonic()), propagate=False)
    except NoResult:
        return Answer(None, trouble=f"task in state {result.state} after {LIMIT:.0f} s")
    result.forget()
    # Not raised, so the error of a failed task comes as the value; its type does not say so.
    value = cast("bool | BaseException", told)
    if isinstance(value, BaseException):
        return Answer(None, trouble=f"{type(value).__name__}: {value}")
    return Answer(value)


def by_actors(actor: Actor[[str], bool], sku: str, load: Load) -> Told:
    """Send `load.requests` messages to the workers and wait for their results."""
    began = time.monotonic()
    sent = [actor.send(sku) for _ in range(load.requests)]
    answers = [_result_of_actor(message, began + LIMIT) for message in sent]
    return Told(answers, time.monotonic() - began)


def _result_of_actor(message: Message[bool], deadline: float) -> Answer:
    left = max(1.0, deadline - time.monotonic())
    try:
        return Answer(message.get_result(block=True, timeout=int(left * 1000)))
    except ResultError as error:
        return Answer(None, trouble=f"{type(error).__name__}: {error}")
