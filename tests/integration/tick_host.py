"""A host of test_ticks: each line of its input is a moment at which its cron starts the job."""

from __future__ import annotations

import sys

import psycopg

from concurrency_safe import configure
from concurrency_safe.contrib.cron import cron_guard


def main(dsn: str, once_per: str) -> None:
    """Run the job, which takes 5 ms, or skip it; answer each line when that is over."""
    configure(dsn=dsn)
    work = psycopg.connect(dsn, autocommit=True)

    @cron_guard("job", once_per=once_per or None)
    def job() -> None:
        work.execute("INSERT INTO sim.runs VALUES (pg_backend_pid()); SELECT pg_sleep(0.005)")

    for _ in sys.stdin:
        job()
        sys.stdout.write("over\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
