"""Every pool of Celery: exclusion, one library session for each busy child, and nothing left after the end."""

from __future__ import annotations

import pytest

from tests.contrib import celery_tasks as tasks
from tests.contrib.conftest import Workers
from tests.integration.conftest import wait_for

#: Runs of one key, in each pool.
TASKS = 6

pytestmark = pytest.mark.timeout(120)


#: Options of each pool, and how many bodies its two workers run at once. A gevent worker has no event loop: it sees
#: room for more messages every two seconds only, so it may fetch them all.
POOLS = {
    "prefork": (["-c", "2"], 4),
    "threads": (["-c", "2"], 4),
    "gevent": (["-c", "4", "--prefetch-multiplier", "0"], 4),
    "solo": ([], 2),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_excludes_and_leaves_nothing(pool: str, own_fleet: Workers) -> None:
    fleet = own_fleet
    options, at_once = POOLS[pool]
    for _ in range(2):
        fleet.start(1, "--pool", pool, *options)
    assert fleet.store.sessions() == 0  # none before the first use

    with fleet.closed_gate():
        waiting = [tasks.at_gate.delay(str(number)) for number in range(at_once)]
        wait_for(lambda: fleet.runs("at_gate") == at_once)
        assert fleet.store.sessions() == fleet.store.rows() == at_once
    for one in waiting:
        one.get(timeout=30)

    rounds = 0

    def do_a_round() -> bool:
        """Run some tasks; on a busy machine they may happen to run one after the other, whoever guards them."""
        nonlocal rounds
        rounds += 1
        sent = [tasks.waits_a_little.delay("one", number) for number in range(TASKS)]
        others = [tasks.waits_a_little.delay("other", number) for number in range(TASKS // 2)]
        control = [tasks.unguarded.delay("one") for _ in range(TASKS)]
        assert [one.get(timeout=60) for one in sent] == list(range(TASKS))
        assert [one.get(timeout=60) for one in others] == list(range(TASKS // 2))
        for one in control:
            one.get(timeout=60)
        others_overlap = fleet.overlaps(tasks.waits_a_little.name, same_key=False) > 0
        return others_overlap and fleet.overlaps("unguarded", same_key=True) > 0 and "Retry in" in fleet.logs()

    wait_for(do_a_round, 60)
    assert fleet.runs(tasks.waits_a_little.name) == rounds * (TASKS + TASKS // 2)
    assert fleet.overlaps(tasks.waits_a_little.name, same_key=True) == 0

    assert fleet.end() == [0, 0]
    wait_for(lambda: fleet.store.rows() == fleet.store.sessions() == 0)
