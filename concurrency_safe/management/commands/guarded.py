"""`manage.py guarded COMMAND`: run a command of Django's, or of any app, once at a time on all hosts."""

from __future__ import annotations

import math
from argparse import REMAINDER, ArgumentTypeError
from typing import TYPE_CHECKING, Any

from django.core.management import CommandError, ManagementUtility, call_command

from concurrency_safe.contrib.cron import GuardedCommand
from concurrency_safe.core.errors import ConfigurationError
from concurrency_safe.core.ticks import tick_rule
from concurrency_safe.guards import Guard

if TYPE_CHECKING:
    from argparse import ArgumentParser

#: Our options that take a value, and those that take none.
_VALUED, _FLAG = ("--lock-key", "--once-per"), "--retry-failed-tick"

#: The exit status of a command line that is wrong, as argparse has it.
USAGE = 2


class Command(GuardedCommand):
    """Run another command under a lock; its output and its exit status are its own."""

    help = (
        "Run COMMAND unless it runs already, on whatever host. Exit status: the command's own; 75 when it runs "
        "already, 69 without the lock store, 76 when the lock was lost meanwhile."
    )
    requires_system_checks = ()  # the command runs its own

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the options of the guard, and everything behind the command's name as the command's."""
        parser.add_argument("--lock-key", metavar="KEY", help="the lock (default: the command's name)")
        parser.add_argument(
            "--wait",
            metavar="SECONDS",
            type=_seconds,
            default=0.0,
            help="wait until it is free; with =SECONDS at most so long (default: try once)",
        )
        parser.add_argument(
            "--once-per",
            metavar="PERIOD",
            help="minute, hour, day or a number of seconds (90s): once in each such period of UTC (needs migrate)",
        )
        parser.add_argument(_FLAG, action="store_true", help="run again in a period whose run failed, or died")
        # One list: argparse would let the name take a `--` that stands behind it.
        parser.add_argument(
            "command_line", metavar="COMMAND [ARGS]", nargs=REMAINDER, help="a -- ends our options among the ARGS"
        )

    def run_from_argv(self, argv: list[str]) -> None:
        """Take our options before the command's name or behind it."""
        super().run_from_argv([*argv[:2], *_ours_first(argv[2:])])

    def execute(self, *args: Any, **options: Any) -> None:
        """Run the command guarded.

        Raises: CommandError, SystemExit: the command's own exit.
        """
        if not options["command_line"]:
            raise CommandError("name the command to run: manage.py guarded clearsessions", returncode=USAGE)
        key = options["command_line"][0] if options["lock_key"] is None else options["lock_key"]
        if not key:
            raise CommandError("--lock-key is empty; leave it out for the command's name", returncode=USAGE)
        wait = math.inf if options["wait"] is None else options["wait"]
        guard = Guard(lambda *_args, **_options: key, timeout=None if math.isinf(wait) else wait)
        try:
            rule = tick_rule(options["once_per"], retry_failed=options["retry_failed_tick"])
        except ConfigurationError as error:
            raise CommandError(str(error), returncode=USAGE) from None
        self.run_guarded(guard, rule, self._run, *args, **options)

    def _run(self, *_args: Any, command_line: list[str], **options: Any) -> None:
        if getattr(self, "_called_from_command_line", False):  # BaseCommand sets it
            utility = ManagementUtility(["manage.py", *command_line])
            utility.fetch_command(command_line[0]).run_from_argv(utility.argv)
        else:
            call_command(*command_line, stdout=options.get("stdout"), stderr=options.get("stderr"))


def _ours_first(arguments: list[str]) -> list[str]:
    """Put our options before the command's name, and give a bare `--wait` its value; what follows `--` stays."""
    ours: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            break
        if word == "--wait":
            ours.append("--wait=inf")
        elif word in _VALUED:
            ours += [word, *(value for value in [next(words, None)] if value is not None)]
        elif word == _FLAG or word.startswith(("--wait=", *(f"{option}=" for option in _VALUED))):
            ours.append(word)
        else:
            rest.append(word)
    return [*ours, *rest, *words]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds >= 0")
    return seconds
