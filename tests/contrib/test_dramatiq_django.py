"""With django_dramatiq: nothing that closes Django's connections touches the lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dramatiq
import pytest

from tests.contrib.conftest import new_database
from tests.contrib.dramatiq_fleet import Workers
from tests.integration.conftest import wait_for


@pytest.mark.timeout(120)
def test_the_lock_outlives_every_connection_of_django(tmp_path: Path) -> None:
    with new_database() as dsn:
        crew = Workers(dsn, tmp_path)
        try:
            command = [sys.executable, "-m", "tests.contrib.dramatiq_django"]
            subprocess.run(command, check=True, env=crew.environment)
            crew.start(2, 4, module="tests.contrib.dramatiq_django")
            crew.rival.hold("django:0")
            sent = [dramatiq.Message[list[bool]](crew.queue, "closes", (number,), {}, {}) for number in (0, 1, 1, 1, 2)]
            for one in sent:
                crew.broker.enqueue(one)
            for one in sent[1:]:
                assert crew.result(one) == [True, True]
            wait_for(lambda: f"message {sent[0].message_id} of actor closes goes back" in crew.logs())
            crew.rival.let_go()
            assert crew.result(sent[0]) == [True, True]
            query = "SELECT count(*) FROM django_dramatiq_task WHERE status = 'done'"
            wait_for(lambda: crew.count(query) == len(sent))
        finally:
            crew.stop()
