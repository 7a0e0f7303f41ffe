"""What happens to guarded actors when something dies: a worker, the broker, the lock store, or the actor's time."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from dramatiq.errors import BrokerError
from dramatiq.results import ResultFailure, ResultMissing
from redis.exceptions import RedisError

from concurrency_safe.contrib.dramatiq import requeue
from concurrency_safe.testing import PostgresServer, ValkeyServer
from tests.contrib import dramatiq_actors as actors
from tests.contrib.conftest import new_database
from tests.contrib.dramatiq_fleet import Workers, a_group, a_pipeline, amqp_url
from tests.integration.conftest import wait_for
from tests.servers.rabbitmq import RabbitMQServer, needs_rabbitmq

pytestmark = pytest.mark.timeout(180)

BROKERS = ["redis", pytest.param("rabbitmq", marks=needs_rabbitmq)]


@contextlib.contextmanager
def crew_of_its_own(log_dir: Path, url: str | None = None, **environment: str) -> Iterator[Workers]:
    """Give workers yet to be started, in a database that nobody else uses."""
    with new_database() as dsn:
        own = Workers(dsn, log_dir, url)
        own.environment |= environment
        try:
            yield own
        finally:
            for process in own.started:  # how it ends is no question here
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            own.stop()


@contextlib.contextmanager
def killed_at(place: str, log_dir: Path, url: str | None = None, variable: str = "KILL_AT") -> Iterator[Workers]:
    """Give a worker of two threads that kills itself once, there."""
    environment = {variable: place, "KILL_MARK": str(log_dir / "mark"), "HEARTBEAT_TIMEOUT": "2000"}
    with crew_of_its_own(log_dir, url, **environment) as own:
        own.start(1, 2)
        yield own


def start_again(crew: Workers) -> None:
    """Wait until the worker has killed itself, and start another one."""
    wait_for((crew.log_dir / "mark").exists)
    crew.started[-1].wait(20)
    crew.start(1, 2)


@pytest.fixture
def own_crew(tmp_path: Path) -> Iterator[Workers]:
    with crew_of_its_own(tmp_path, LIMIT_INTERVAL="5") as own:
        yield own


@pytest.fixture(params=BROKERS)
def redelivering_crew(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    """Give workers whose broker delivers a message again when its worker has been silent for some seconds."""
    url = f"{amqp_url()}?heartbeat=2" if request.param == "rabbitmq" else None
    with crew_of_its_own(tmp_path, url, HEARTBEAT_TIMEOUT="2000") as own:
        yield own


def holder(crew: Workers, actor: str) -> int:
    """Wait until `actor` runs; give the pid of its process."""
    wait_for(lambda: crew.runs(f"{actor} began") == 1)
    return int(crew.keys(f"{actor} began")[0].split()[1])


def test_a_killed_process_frees_its_locks_and_each_message_completes_once(redelivering_crew: Workers) -> None:
    crew = redelivering_crew
    crew.start(1, 3)
    names = ("sleeps", "sleeps_or_skips", "sleeps_or_raises")
    sent = {name: crew.send(getattr(actors, name), name, 1) for name in names}
    pids = {holder(crew, name) for name in names}
    assert not crew.rival.is_free("slow:sleeps")

    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(crew.rival.is_free(f"slow:{name}") for name in names), 1.0)
    crew.start(1, 3)

    for name, one in sent.items():
        assert crew.result(one) == name
        assert crew.runs(name) == 1
        assert crew.runs(f"{name} began") == 2
    wait_for(lambda: crew.queued() == 0)


def test_a_message_that_meets_itself_is_never_skipped(redelivering_crew: Workers) -> None:
    """The holder is silent for so long that the broker gives its message to another worker; then it dies."""
    crew = redelivering_crew
    crew.start(1, 2)
    names = ("sleeps_or_skips", "sleeps_or_raises")
    sent = {name: crew.send(getattr(actors, name), name, 1) for name in names}
    pids = {holder(crew, name) for name in names}
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    crew.start(1, 2)
    for one in sent.values():
        wait_for(lambda one=one: f"message {one.message_id} of" in crew.logs(), 40)  # type: ignore[misc]
        assert f"{one.message_id} of actor" in crew.logs()
    assert crew.logs().count("it runs already, or did just now") >= len(names)
    other = crew.send(actors.sleeps_or_skips, "sleeps_or_skips", 1)
    assert crew.result(other) is None

    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for name, one in sent.items():
        assert crew.result(one) == name
        assert crew.runs(name) == 1
    wait_for(lambda: crew.queued() == 0)


def test_a_copy_whose_message_has_succeeded_meanwhile_does_not_run_again(tmp_path: Path) -> None:
    with crew_of_its_own(tmp_path, HEARTBEAT_TIMEOUT="2000") as crew:
        crew.start(1, 2)
        sent = crew.send(actors.sleeps, "a", 2)
        pid = holder(crew, "sleeps")
        os.kill(pid, signal.SIGSTOP)
        crew.start(1, 2)
        wait_for(lambda: "it runs already" in crew.logs(), 30)
        os.kill(pid, signal.SIGCONT)

        assert crew.result(sent) == "a"
        wait_for(lambda: f"message {sent.message_id} has run already; this copy of it ends" in crew.logs(), 30)
        assert crew.runs("sleeps") == 1
        assert crew.result(sent) == "a"
        wait_for(lambda: crew.queued() == 0)


@needs_rabbitmq
@pytest.mark.parametrize("what", ["pipeline", "group", "on_success"])
def test_a_copy_of_a_message_that_died_with_its_result_stored_tells_those_that_go_on(what: str, tmp_path: Path) -> None:
    with killed_at("after_process_message:patient", tmp_path, amqp_url()) as crew:
        sent = crew.message(actors.patient, "a")
        if what == "pipeline":
            a_pipeline([sent, crew.message(actors.guarded, 1)], broker=crew.broker).run()
        elif what == "group":
            members = a_group([sent, crew.message(actors.guarded, "z", 1)], broker=crew.broker)
            members.add_completion_callback(crew.message(actors.group_done, "a"))
            members.run()
        else:
            crew.broker.enqueue(sent)
        start_again(crew)

        wait_for(lambda: crew.keys("succeeded") == [f"{sent.message_id} a"])
        if what != "on_success":
            wait_for(lambda: crew.runs("job" if what == "pipeline" else "group_done") == 1)
        wait_for(lambda: crew.queued() == 0)
        assert crew.logs().count(f"message {sent.message_id} has run already; its result goes on") == 1
        assert crew.runs("succeeded") == 1


@pytest.mark.parametrize("kind", BROKERS)
def test_a_worker_that_dies_with_its_message_put_back_makes_no_second_run(kind: str, tmp_path: Path) -> None:
    """The copy is enqueued, and the original was not acknowledged; whichever comes first is the one that runs."""
    with killed_at("after_skip_message:comes_later", tmp_path, amqp_url() if kind == "rabbitmq" else None) as crew:
        crew.rival.hold("one:a")
        sent = crew.send(actors.comes_later, "a")
        wait_for((tmp_path / "mark").exists)
        crew.rival.let_go()
        start_again(crew)

        wait_for(lambda: f"message {sent.message_id} has run already; this copy of it ends" in crew.logs(), 40)
        wait_for(lambda: crew.queued() == 0)
        assert crew.result(sent) == "a"
        assert crew.runs("comes_later") == crew.runs("succeeded") == 1


@pytest.mark.parametrize("kind", BROKERS)
def test_a_worker_that_dies_before_the_result_is_stored_loses_no_result(kind: str, tmp_path: Path) -> None:
    url = amqp_url() if kind == "rabbitmq" else None
    with killed_at("after_process_message:sleeps", tmp_path, url, "KILL_EARLY_AT") as crew:
        sent = crew.send(actors.sleeps, "a", 0.1)
        start_again(crew)

        assert crew.result(sent, 40_000) == "a"
        assert crew.runs("sleeps") == 1


def test_a_copy_whose_results_are_on_a_broker_that_was_away_runs(tmp_path: Path) -> None:
    """It went back once, so it may have a twin; most have none, and it holds its lock."""
    lasting = {"appendonly": "yes", "appendfsync": "always"}
    with ValkeyServer(lasting) as server, crew_of_its_own(tmp_path, server.url, TESTS_RESULT_URL=server.url) as crew:
        crew.start(1, 2)
        crew.rival.hold("one:a")
        sent = crew.message(actors.stubborn, "a")
        crew.broker.enqueue(sent.copy(options={requeue.CONFLICTS: 1, requeue.SINCE: 0.0, requeue.ATTEMPT: 0}))
        wait_for(lambda: crew.store.waiting() == 1)
        server.kill()
        crew.rival.let_go()
        wait_for(lambda: crew.runs("stubborn") == 1)
        server.start()

        wait_for(lambda: crew.queued() == 0, 40)
        assert (crew.runs("stubborn"), crew.dead()) == (1, 0)


def test_an_original_that_comes_after_its_copy_has_run_ends(tmp_path: Path) -> None:
    """On Redis an original is delivered again as if for the first time, and long after the copy by default."""
    with crew_of_its_own(tmp_path) as crew:
        crew.start(1, 2)
        sent = crew.send(actors.comes_later, "a")
        assert crew.result(sent) == "a"
        crew.broker.enqueue(sent)

        wait_for(lambda: f"message {sent.message_id} has run already; this copy of it ends" in crew.logs())
        assert crew.runs("comes_later") == 1


@needs_rabbitmq
def test_a_body_that_skips_its_message_has_not_run(tmp_path: Path) -> None:
    with killed_at("before_ack:skips_itself", tmp_path, amqp_url()) as crew:
        steps = [crew.message(actors.skips_itself, "a"), crew.message(actors.guarded, 1)]
        a_pipeline(steps, broker=crew.broker).run()
        start_again(crew)

        wait_for(lambda: crew.runs("skips_itself") == 2)
        wait_for(lambda: crew.queued() == 0)
        assert crew.runs("job") == 0


@needs_rabbitmq
def test_a_copy_waits_for_results_that_are_away(tmp_path: Path) -> None:
    """They alone know whether it has run; what is no copy runs meanwhile, as Dramatiq lets it."""
    lasting = {"appendonly": "yes", "appendfsync": "always"}
    with ValkeyServer(lasting) as results, crew_of_its_own(tmp_path, amqp_url(), TESTS_RESULT_URL=results.url) as crew:
        worker = crew.start(1, 1)
        with crew.closed_gate():
            crew.send(actors.patient_at_gate, "a")
            wait_for(lambda: crew.runs("at_gate") == 1)
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            results.kill()
        crew.start(1, 1)
        wait_for(lambda: "whether it has run already, the results don't say" in crew.logs(), 30)
        crew.send(actors.guarded, "other", 1)
        wait_for(lambda: crew.runs("job") == 1)
        assert (crew.runs("at_gate"), crew.dead()) == (1, 0)
        results.start()

        wait_for(lambda: crew.runs("at_gate") == 2, 40)
        wait_for(lambda: crew.queued() == 0)


@needs_rabbitmq
@pytest.mark.parametrize("how", ["told", "quiet"])
def test_a_broker_that_restarts_while_a_step_runs_loses_no_step(how: str, tmp_path: Path) -> None:
    """Dramatiq could not send the next step, and says so to its log alone, if that; the message comes again."""
    quiet = {"QUIET": "1"} if how == "quiet" else {}
    with RabbitMQServer() as server, crew_of_its_own(tmp_path, server.url.removesuffix("//") + "/%2F", **quiet) as crew:
        crew.start(1, 1)
        with crew.closed_gate():
            sent = crew.message(actors.patient_at_gate, "a")
            a_pipeline([sent, crew.message(actors.guarded, 1)], broker=crew.broker).run()
            wait_for(lambda: crew.runs("at_gate") == 1)
            server.kill()
        failed = "Failed to post_process_message" if quiet else "Unexpected failure in after_process_message"
        wait_for(lambda: failed in crew.logs())
        server.start()

        wait_for(lambda: crew.runs("job") == 1, 60)
        assert crew.runs("at_gate") == 1


@pytest.mark.parametrize("name", ["skipping", "raising", "calling", "limited"])
def test_a_copy_of_a_message_that_has_run_ends_also_when_another_holds_the_key(name: str, own_crew: Workers) -> None:
    crew = own_crew
    crew.start(1, 2)
    sent = crew.send(getattr(actors, name), "a")
    assert crew.result(sent) == "a"

    crew.rival.hold("one:a")
    crew.broker.enqueue(sent.copy(options={**sent.options, requeue.DUPLICATES: 1}))
    wait_for(lambda: f"message {sent.message_id} has run already; this copy of it ends" in crew.logs())
    wait_for(lambda: crew.queued() == 0)
    assert crew.result(sent) == "a"
    assert crew.dead() == crew.runs("failed") == crew.runs("exhausted") == 0


def test_copies_that_wait_for_the_lock_wait_for_the_result_too(own_crew: Workers) -> None:
    """Dramatiq stores the result after the lock's release, and a copy has the lock at once then."""
    crew = own_crew
    crew.start(1, 8)
    with crew.closed_gate():
        sent = crew.send(actors.patient_at_gate, "a")
        wait_for(lambda: crew.runs("at_gate") == 1)
        for _ in range(4):
            crew.broker.enqueue(sent.copy(options={**sent.options, requeue.DUPLICATES: 1}))
        wait_for(lambda: crew.broker.client.llen(f"dramatiq:{crew.queue}") == 0)  # all are fetched
    ended = f"message {sent.message_id} has run already; this copy of it ends"
    wait_for(lambda: crew.logs().count(ended) == 4)
    assert crew.result(sent) == "a"
    assert crew.runs("at_gate") == 1


def test_two_copies_of_a_message_are_not_two_holders_of_a_slot(own_crew: Workers) -> None:
    crew = own_crew
    crew.start(1, 4)
    with crew.closed_gate():
        sent = crew.send(actors.two_at_gate, 1)
        wait_for(lambda: crew.runs("at_gate") == 1)
        crew.broker.enqueue(sent)
        wait_for(lambda: "it runs already" in crew.logs())

    assert crew.result(sent) == 1
    wait_for(lambda: f"message {sent.message_id} has run already" in crew.logs(), 30)
    assert crew.runs("at_gate") == 1


@pytest.mark.parametrize("kind", [*BROKERS, pytest.param("rabbitmq, for long", marks=needs_rabbitmq)])
def test_a_broker_that_is_gone_when_a_message_goes_back_loses_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    server = ValkeyServer({"appendonly": "yes", "appendfsync": "always"}) if kind == "redis" else RabbitMQServer()
    with server:
        url = server.url if kind == "redis" else server.url.removesuffix("//") + "/%2F"
        with crew_of_its_own(tmp_path, url) as crew:
            crew.start(1, 2)
            crew.rival.hold("one:a")
            sent = crew.send(actors.stubborn, "a")
            wait_for(lambda: crew.store.waiting() == 1)
            server.kill()
            if kind == "rabbitmq":  # its start takes about as long as all tries together
                server.start()
                wait_for(lambda: f"message {sent.message_id} could not be put back" in crew.logs())
            else:
                wait_for(lambda: crew.logs().count(f"message {sent.message_id} could not be put back") == 3)
                server.start()
            assert crew.runs("stubborn") == 0
            wait_for(lambda: _settled(crew), 40)
            if kind != "redis":
                with pytest.raises(ResultMissing):  # whoever waits for it goes on waiting
                    sent.get_result(backend=actors.RESULTS)
            crew.rival.let_go()

            wait_for(lambda: crew.runs("stubborn") >= 1 or crew.dead() == 1, 40)
            wait_for(lambda: crew.queued() == 0, 40)
            assert crew.runs("stubborn") + crew.dead() == 1


def _settled(crew: Workers) -> bool:
    try:
        return crew.dead() + crew.queued() > 0 or crew.store.waiting() > 0
    except (BrokerError, RedisError):
        return False


def test_a_store_that_is_away_never_lets_a_body_run_and_loses_no_message(tmp_path: Path) -> None:
    with PostgresServer({"synchronous_commit": "on"}) as server:  # its table outlives the crash
        crew = Workers(server.dsn, tmp_path)
        try:
            crew.start(1, 4)
            assert crew.result(crew.send(actors.guarded, "before", 0)) == 0
            crew.store.connection.close()
            crew.rival.connection.close()
            server.kill()

            sent = [crew.send(kind, "a", number) for number in range(3) for kind in (actors.guarded, actors.aguarded)]
            failing = crew.send(actors.raising, "a")
            wait_for(lambda: all(f"message {one.message_id} of actor" in crew.logs() for one in sent))
            with pytest.raises(ResultFailure, match="LockUnavailable"):
                crew.result(failing)
            assert crew.dead() == 1

            server.start()
            assert [crew.result(one) for one in sent] == [0, 0, 1, 1, 2, 2]
            with psycopg.connect(server.dsn, autocommit=True) as connection:
                rows = connection.execute(
                    "SELECT task, count(*) FROM intervals WHERE key = 'a' GROUP BY task"
                ).fetchall()
            assert rows == [("job", 6)]
        finally:
            crew.stop()


def test_1000_messages_take_a_session_a_thread_and_leave_none(own_crew: Workers) -> None:
    crew = own_crew
    worker = crew.start(2, 4)
    sent = [crew.send(actors.tiny, number) for number in range(1000)]
    most = 0

    def all_done() -> bool:
        nonlocal most
        most = max(most, crew.store.sessions())
        return crew.queued() == 0

    wait_for(all_done, 60)
    assert crew.result(sent[-1]) == 999
    assert 0 < most <= 2 * (4 + 1)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    wait_for(lambda: crew.store.sessions() == 0, 2.0)


@pytest.mark.parametrize("how", ["binary", "python", "gevent"])
def test_interrupts_at_random_moments_leave_nothing(how: str, own_crew: Workers) -> None:
    """Two keys for eight threads: a limit strikes those who ask, wait, work, or are about to go back to the queue."""
    crew = own_crew
    crew.stay_unmeasured()
    crew.environment |= {"PSYCOPG_IMPL": "binary" if how == "gevent" else how, "dramatiq_queue_prefetch": "4"}
    crew.start(2, 4, program="tests.contrib.gevent_worker" if how == "gevent" else "dramatiq")
    struck = [crew.send(actors.brief, str(number % 2), 1, time_limit=random.uniform(5, 60)) for number in range(170)]
    spared = [crew.send(actors.brief, str(number % 2), 0.001 * (number % 4)) for number in range(50)]
    limits = [random.uniform(10, 120) for _ in range(80)]
    hurried = [crew.send(actors.hurried, str(round(limit) % 2), 0.02, time_limit=limit) for limit in limits]
    assert {_end(crew, one) for one in spared} == {"done"}
    ended = [_end(crew, one) for one in struck]
    in_time = [_end(crew, one) for one in hurried]

    # Python itself ignores, and says so, what is raised in a finalizer (psycopg has some where it is not compiled) and
    # in a thread at its birth, which is taken for the thread that starts it.
    said = re.findall("Exception ignored (?!.*function .*concurrency_safe).*", crew.logs())
    assert set(ended + in_time) <= {"TimeLimitExceeded", "done"}
    assert ended.count("done") <= len(said), crew.logs()
    wait_for(lambda: crew.store.rows() == 0, 2.0)
    wait_for(lambda: (crew.queued(), crew.dead()) == (0, (ended + in_time).count("TimeLimitExceeded")))
    # On gevent Dramatiq's time limits strike threads that wait for a message, also those of workers without us.
    died = crew.logs().count("Exception in thread Thread-")
    assert died <= (crew.logs().count("item = self.work_queue.get(timeout=self.timeout)") if how == "gevent" else 0)
    with crew.closed_gate():
        gated = [crew.send(actors.at_gate, number) for number in range(8)]
        wait_for(lambda: crew.runs("at_gate") == 8 - died)  # every other thread is alive
    assert [crew.result(one) for one in gated] == list(range(8))


def _end(crew: Workers, message: Any) -> str:
    try:
        crew.result(message)
    except ResultFailure as failure:
        return "TimeLimitExceeded" if failure.orig_exc_type == "TimeLimitExceeded" else str(failure)
    return "done"
