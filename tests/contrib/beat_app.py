"""What `celery -A tests.contrib.beat_app beat` runs: a beat that writes each of its ticks into a table."""

from __future__ import annotations

import os
from typing import Any

import psycopg
from celery import Celery
from celery.beat import Scheduler

app = Celery("beat", set_as_current=False, broker="memory://")
app.conf.beat_schedule = {"tick": {"task": "tick", "schedule": 0.05}}
app.conf.beat_max_loop_interval = 0.05


class Recorder(Scheduler):
    """Sends nothing to a broker: a tick is a row, in a database other than the locks'."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._ticks = psycopg.connect(os.environ["TICKS_DSN"], autocommit=True)
        super().__init__(*args, **kwargs)

    def apply_async(self, entry: Any, *_args: Any, **_kwargs: Any) -> None:
        """Write down that this process ticked."""
        self._ticks.execute("INSERT INTO beats VALUES (%s, clock_timestamp())", [os.getpid()])
        self.reserve(entry)


app.conf.beat_scheduler = Recorder
