"""`concurrency-safe run KEY -- command`: any program, once at a time on all hosts; `who KEY` says on which."""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

try:
    import click
except ImportError as error:
    raise ImportError('click is not installed; run: pip install "django-concurrency-safe[cli]"') from error

from concurrency_safe.conf import django_is_configured, get_settings
from concurrency_safe.core.errors import (
    ConcurrencySafeError,
    ConfigurationError,
    KeyTemplateError,
    LockAcquireTimeout,
    LockLost,
)
from concurrency_safe.core.keys import Rendered, lock_key
from concurrency_safe.core.options import MOST_SLOTS
from concurrency_safe.core.ticks import TickRule, tick_rule
from concurrency_safe.locks import HeldLock, lock
from concurrency_safe.ownership import Footing
from concurrency_safe.postgres.backend import PostgresBackend
from concurrency_safe.postgres.doctor import examine
from concurrency_safe.postgres.look import look
from concurrency_safe.postgres.waiting import drive
from concurrency_safe.processes import Process, running, with_descendants
from concurrency_safe.spaces import ask, close_idle_sessions, django_connection, space_for
from concurrency_safe.ticks import Tick, create_tables

if TYPE_CHECKING:
    from typing_extensions import Self

#: Exit statuses: those of sysexits.h (EX_TEMPFAIL, EX_UNAVAILABLE, and EX_PROTOCOL for a lock that was lost), and those
#: by which shells say that a command can't be run.
BUSY, NO_STORE, LOST = 75, 69, 76
NOT_FOUND, NOT_EXECUTABLE = 127, 126
BY_SIGNAL = 128

#: What is passed on to the command.
FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
    signal.SIGWINCH,
)

#: What a terminal gives to the whole foreground group, hence to the command without us.
BY_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGCONT, signal.SIGWINCH)

#: What ends a wait for the lock.
ENDING = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})

#: What asks the command to end. A hangup may ask it for something else; it counts when the command dies of it.
STOPPING = ENDING - {signal.SIGHUP}

#: What Python ignores, and programs expect to die of.
IGNORED_BY_PYTHON = tuple(getattr(signal, name) for name in ("SIGPIPE", "SIGXFSZ") if hasattr(signal, name))

#: Seconds between two looks at the lock, should nobody have told of its loss; and at a group that is being stopped.
LOOK, LOOK_AT_GROUP = 1.0, 0.02

#: The lowest file descriptor for the lock's connection in the command, where no shell script has one of its own.
HIGH_FD = 100


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Named locks on PostgreSQL for programs.

    The database is named by the environment: CONCURRENCY_SAFE_DSN (a URL, or service=NAME of a libpq service file),
    DJANGO_SETTINGS_MODULE, or DATABASE_URL; never by the command line, which everybody on the host can read.
    """


class _Run(click.Command):
    """A command line in two parts: ours, and behind `--` somebody else's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split at the first `--`, and give a bare `--wait` its value: KEY may stand behind it."""
        if "--" in args:
            end = args.index("--")
            args, ctx.obj = args[:end], args[end + 1 :]
        return super().parse_args(ctx, ["--wait=inf" if word == "--wait" else word for word in args])


@main.command(cls=_Run, options_metavar="[OPTIONS]")
@click.argument("key")
@click.option(
    "--wait",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Wait until the lock is free; with =SECONDS at most so long. Default: try once.",
)
@click.option(
    "-E", "busy", metavar="N", type=click.IntRange(0, 255), default=BUSY, help="The exit status of a conflict."
)
@click.option("--quiet", is_flag=True, help="Say nothing on a conflict.")
@click.option("--shared", is_flag=True, help="Together with others who say so.")
@click.option(
    "--slots", metavar="N", type=click.IntRange(1, MOST_SLOTS), default=1, help="Most runs at once. Default: 1."
)
@click.option(
    "--min-hold",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Keep the lock so long at least, for hosts whose clocks are late.",
)
@click.option(
    "--once-per",
    metavar="PERIOD",
    help="Once in each minute, hour, day, or <n>s of UTC, by the database's clock. A further run does nothing, exit 0.",
)
@click.option(
    "--tick",
    metavar="TIME",
    help="The scheduled time, for schedulers that know it: once for each. ISO 8601 with offset, or seconds since 1970.",
)
@click.option(
    "--retry-failed-tick", is_flag=True, help="Run again a tick whose run failed, or whose process died meanwhile."
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=5.0,
    help="When the lock is lost: from SIGTERM to SIGKILL for the command. Default: 5.",
)
@click.pass_context
def run(  # noqa: PLR0913, PLR0917 - one parameter an option
    ctx: click.Context,
    /,
    key: str,
    wait: float,
    busy: int,
    min_hold: float,
    grace: float,
    once_per: str | None,
    tick: str | None,
    *,
    retry_failed_tick: bool,
    quiet: bool,
    **how: Any,  # noqa: ANN401 - the options of lock(), passed on
) -> None:
    """Run COMMAND while this host holds the lock KEY: `run [OPTIONS] KEY -- COMMAND [ARGS]...`.

    Exit status: the command's own, 128+N when signal N ended it; 127 or 126 when it isn't found, or can't be executed;
    75 when the lock is taken (-E changes it), 69 when there is no lock store, 76 when the lock was lost and the command
    was stopped. Signals are passed on to the command. When this program is killed by SIGKILL, the lock lives until the
    command ends.
    """
    command: list[str] = ctx.obj or []
    if not command:
        raise click.UsageError("give the command behind --:  concurrency-safe run KEY -- command args...")
    _refuse_what_is_no_time({"--wait": wait, "--min-hold": min_hold, "--grace": grace})
    rule = _rule(once_per, tick, retry_failed=retry_failed_tick, alone=not how["shared"] and how["slots"] == 1)
    if how["shared"] and how["slots"] > 1:
        raise click.UsageError("--shared and --slots exclude each other: readers have no number, slots have one")
    with _the_store("not run"):
        job = _Job(command, min_hold, grace, rule)
        try:
            status = _run_locked(job, key, timeout=None if math.isinf(wait) else wait, **how)
        except LockAcquireTimeout as conflict:
            _leave(busy, "" if quiet else f"not run: {conflict}")
        except LockLost as error:
            _leave(LOST, str(error))
    sys.exit(status)


def _refuse_what_is_no_time(given: dict[str, float]) -> None:
    for option, seconds in given.items():
        if math.isnan(seconds):
            raise click.UsageError(f"{option}=nan is no number of seconds")


def _rule(once_per: str | None, tick: str | None, *, retry_failed: bool, alone: bool) -> TickRule | None:
    try:
        rule = tick_rule(once_per, tick, retry_failed=retry_failed)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    if rule is not None and not alone:
        raise click.UsageError("--once-per and --tick are for one run at a time; leave --shared and --slots out")
    return rule


@main.command()
@click.argument("key")
def who(key: str) -> None:
    """Say who holds the lock KEY and who waits for it, a line each; or that it is free."""
    with _the_store("can't tell"):
        settings = get_settings()
        space = drive(space_for(django_connection(None, settings), settings))
        # By a setting's DSN or a Django alias it is PostgreSQL's.
        backend = cast("PostgresBackend", space.backend)
        holders, waiting = drive(look(backend.pool, Footing(None), lock_key(Rendered(key), settings.namespace)))
    for holder in holders:
        click.echo(f"held by {holder}")
    for waiter in waiting:
        click.echo(f"awaited by {waiter}")
    if not holders:
        click.echo("free")


@contextmanager
def _the_store(failure: str) -> Iterator[None]:
    """Use the lock store; what keeps it from being used ends the program, with `failure` before the reason."""
    logging.getLogger("concurrency_safe").addHandler(logging.NullHandler())  # what it says, we say
    if django_is_configured():
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - where manage.py would find the settings
        try:
            get_settings()
        except Exception as error:  # noqa: BLE001 - whatever somebody's settings raise
            _leave(NO_STORE, f"{failure}: Django's settings can't be read: {type(error).__name__}: {error}")
    try:
        yield
    except KeyTemplateError as error:
        raise click.UsageError(str(error)) from error
    except (ConcurrencySafeError, ImportError) as error:
        _leave(NO_STORE, f"{failure}: {error}")
    finally:
        close_idle_sessions()  # says goodbye: a daemon that a command left behind has a copy of the socket


def _leave(status: int, message: str) -> NoReturn:
    if message:
        _say(message)
    sys.exit(status)


def _say(message: str) -> None:
    with suppress(OSError):  # nobody reads it, which must not change the exit status
        click.echo(f"concurrency-safe: {message}", err=True)


@main.command()
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
@click.option("--json", "json_", is_flag=True, help="Print a list of objects; with --watch one list a line.")
def locks(keys: tuple[str, ...], *, watch: bool, json_: bool) -> None:
    """Show who holds a lock and who waits for one, in the order of the queues.

    The holders' processes tell the texts of their keys. One that can't shows a number, unless its KEY is named.
    """
    from concurrency_safe import tables  # noqa: PLC0415 - `run` is quick without rich

    with _the_store("can't tell"):
        if watch:
            tables.watch(keys, as_lines=json_)
        elif json_:
            click.echo(tables.as_json(tables.census(keys)))
        else:
            tables.show(keys)


@main.command()
def doctor() -> None:
    """Look at the lock store, and say what to do: exit 0, 1 when something keeps locks from working, 69 without one."""
    with _the_store("the lock store can't be used"):
        fencing = get_settings().fencing
        findings = ask(lambda backend, footing: examine(backend, footing, fencing=fencing))
    for finding in findings:
        mark = "problem" if finding.grave else "advice" if finding.remedy else "ok"
        click.echo(f"{mark:8}{finding.fact}")
        if finding.remedy:
            click.echo(f"        -> {finding.remedy}")
    sys.exit(int(any(finding.grave for finding in findings)))


@main.command()
def init() -> None:
    """Create the table that --once-per and --tick need, and the sequence behind fencing tokens.

    Twice is the same as once. In a Django project `manage.py migrate concurrency_safe` does the same.
    """
    with _the_store("nothing was created"):
        create_tables()


class _Job(NamedTuple):
    """What is run.

    `min_hold`: seconds that the lock is kept at least; `grace`: from SIGTERM to SIGKILL at its loss; `rule`: once per
    tick, None: always.
    """

    command: list[str]
    min_hold: float
    grace: float
    rule: TickRule | None


def _run_locked(job: _Job, key: str, **how: Any) -> int:  # noqa: ANN401 - the options of lock()
    """Run the command under the lock; give its exit status.

    Raises: LockAcquireTimeout, LockUnavailable: it did not run. LockLost: it was stopped. SystemExit: a signal came
        before it was started.
    """
    with _Signals() as signals, _Wakeup() as wakeup, lock(Rendered(key), **how) as held:
        held.on_lost(lambda _: wakeup.ring())
        if job.rule is None:
            return _supervise(job, held, signals, wakeup)
        tick = Tick(job.rule, held)
        if not tick.claim():
            return 0
        status = _supervise(job, held, signals, wakeup)
        error = tick.succeed() if status == 0 else None
        if error is not None:
            _say(f"the command succeeded, which was not recorded: {error}")
        return status


def _supervise(job: _Job, held: HeldLock, signals: _Signals, wakeup: _Wakeup) -> int:
    """Run the command; give its exit status.

    Raises: LockLost: it was stopped.
    """
    signals.collected = []
    until = time.monotonic() + job.min_hold
    on_terminal = os.isatty(0) or _has_the_foreground()
    asked: set[int] = set()
    try:
        child = _Child(job.command, held, own_group=not on_terminal)
    except OSError as error:
        _say(f"{job.command[0]}: {error.strerror}")
        return NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
    try:
        while child.is_running() and not held.is_lost:
            for number in signals.taken():
                asked.add(number)
                child.send(number, passed_on=not (on_terminal and number in BY_TERMINAL))
            wakeup.wait(LOOK)
    finally:
        stopped = bool(asked & STOPPING) or child.status == -signal.SIGHUP
        if child.is_running():  # without the lock, or after an error of ours
            child.stop(job.grace, wakeup)
        elif stopped:  # what it has left at work
            child.stop(job.grace, wakeup, daemons=False)
    if stopped:
        until = 0.0
    while (left := until - time.monotonic()) > 0 and not held.is_lost and ENDING.isdisjoint(signals.taken()):
        wakeup.wait(min(left, LOOK))
    held.check()
    return child.status if child.status >= 0 else BY_SIGNAL - child.status


def _has_the_foreground() -> bool:
    """Say whether a terminal is ours to read from, although standard input is another: behind a pipe."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


class _Signals:
    """What is to be passed on to the command: it ends us until there is somebody to get it."""

    def __init__(self) -> None:
        #: What came, in order; None: nobody is there to get it.
        self.collected: list[int] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, say
                self._before[number] = signal.signal(number, self._come)
        # The end of the command interrupts a sleep only when its signal is handled.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def taken(self) -> list[int]:
        """Give what has come since the last call."""
        # The very list: a signal between the two halves of this line is not lost.
        taken, self.collected = self.collected, []
        return taken or []

    def _come(self, number: int, _: FrameType | None) -> None:
        if self.collected is not None:
            self.collected.append(number)
        elif number in ENDING:
            sys.exit(BY_SIGNAL + number)


class _Wakeup:
    """Ends a sleep when a signal comes, or when another thread rings."""

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._reader)
        writer, self._writer = self._writer, -1
        os.close(writer)

    def ring(self) -> None:
        """End the sleep, from any thread."""
        with suppress(OSError):  # it is full, which rings as well, or closed: nobody sleeps any more
            os.write(self._writer, b"!")

    def wait(self, seconds: float) -> None:
        """Sleep until a signal or a ring, at most `seconds`."""
        poll = select.poll()  # not select(), which knows no more than 1024 files
        poll.register(self._reader, select.POLLIN)
        if poll.poll(seconds * 1000):
            with suppress(BlockingIOError):
                os.read(self._reader, 4096)


class _Child:
    """The command, which has a copy of the lock's connection: should we be killed, the lock ends with the command."""

    def __init__(self, command: list[str], held: HeldLock, *, own_group: bool) -> None:
        """Start `command`.

        Not by subprocess: that closes what others gave us to pass on, and can't set a process group before Python 3.11.

        Raises: OSError: it can't be started.
        """
        self._own_group = own_group
        #: The exit status; -n: signal n. Before the end it means nothing.
        self.status = 0
        self._ended = False
        self._daemons = True
        copies = [_copy_high(socket) for socket in held.sockets()]
        try:
            self._pid = self._spawn(command)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            # A script that names no interpreter is the shell's, as execvp() has it.
            self._pid = self._spawn(["/bin/sh", shutil.which(command[0]) or command[0], *command[1:]])
        finally:
            for copy in copies:
                os.close(copy)
        #: It and what it has started, as far as was looked.
        self._tree: set[Process] = set()

    def _spawn(self, command: list[str]) -> int:
        if not command[0]:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        options: dict[str, Any] = {"setpgroup": 0} if self._own_group else {}
        return os.posix_spawnp(command[0], command, os.environ, setsigdef=IGNORED_BY_PYTHON, **options)

    def _look(self) -> None:
        now = running()
        itself = set() if self._ended or self._pid not in now else {now[self._pid]}
        self._tree = with_descendants(self._tree | itself, now)
        if not self._daemons:
            self._tree = {each for each in self._tree if each.session == os.getsid(0)}

    def is_running(self) -> bool:
        """Look whether it has ended."""
        if not self._ended:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._ended = True
                self.status = os.waitstatus_to_exitcode(status)
        return not self._ended

    def send(self, number: int, *, passed_on: bool) -> None:
        """Send a signal to the command itself, unless it has it already; what it started then is not forgotten."""
        if number in ENDING:
            self._look()
        if passed_on:
            os.kill(self._pid, number)

    def stop(self, grace: float, wakeup: _Wakeup, *, daemons: bool = True) -> None:
        """End the command and what it has started: SIGTERM, `grace` seconds, SIGKILL.

        That is its process group, where it has one of its own, and its descendants in others. `daemons`: also those in
        a session of their own. Whose parent has ended before is no descendant any more.
        """
        self._daemons = daemons
        self._send_all(signal.SIGTERM)
        self._send_all(signal.SIGCONT)  # a stopped one hears nothing
        until = time.monotonic() + grace
        while self._any_running() and time.monotonic() < until:
            wakeup.wait(LOOK_AT_GROUP)
        self._send_all(signal.SIGKILL)
        while self.is_running():
            wakeup.wait(LOOK_AT_GROUP)

    def _any_running(self) -> bool:
        return self.is_running() or self._send_all(0)

    def _send_all(self, number: int) -> bool:
        """Signal the group, and each descendant that is not in it; False: nobody is left."""
        self._look()
        apart = [each.pid for each in self._tree if not (self._own_group and each.group == self._pid)]
        if not self._own_group and not self._tree and self.is_running():  # where the system doesn't tell
            apart = [self._pid]
        reached = [_reach(os.kill, pid, number) for pid in apart]
        if self._own_group:
            reached.append(_reach(os.killpg, self._pid, number))
        return any(reached)


def _reach(kill: Callable[[int, int], None], whom: int, number: int) -> bool:
    try:
        kill(whom, number)
    except (ProcessLookupError, PermissionError):  # macOS refuses zombies
        return False
    return True


def _copy_high(socket: int) -> int:
    try:
        return fcntl.fcntl(socket, fcntl.F_DUPFD, HIGH_FD)
    except OSError:  # so many files are not allowed
        return fcntl.fcntl(socket, fcntl.F_DUPFD, 3)


if __name__ == "__main__":
    main()
