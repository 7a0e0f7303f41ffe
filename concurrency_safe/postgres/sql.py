"""Every statement that the library sends, and the SQLSTATEs it understands. Nothing else here.

Source: https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADVISORY-LOCKS
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from concurrency_safe.core.ticks import TickRule


class Statement(NamedTuple):
    """A prepared statement: its name on the session, and its text."""

    name: bytes
    text: bytes


#: The sequence behind fencing tokens. CACHE 1, or a session would hand out numbers that it drew before another's.
FENCE = "concurrency_safe_fence"
CREATE_FENCE = f"CREATE SEQUENCE IF NOT EXISTS {FENCE} AS bigint CACHE 1"
DROP_FENCE = f"DROP SEQUENCE IF EXISTS {FENCE}"

#: The table of ticks: a row for each scheduled run that was begun. `key` is the number of the job's lock, `tick` the
#: scheduled time; `succeeded` is null while it runs, and for ever when it failed or its process died; `asked` is the
#: scheduled time of the last run that was left out for it.
TICK = "concurrency_safe_tick"
CREATE_TICK = f"""CREATE TABLE IF NOT EXISTS {TICK} (
  key bigint NOT NULL, tick timestamptz NOT NULL, name text NOT NULL, host text NOT NULL, pid integer NOT NULL,
  started timestamptz NOT NULL, succeeded timestamptz, asked timestamptz, PRIMARY KEY (key, tick))"""
DROP_TICK = f"DROP TABLE IF EXISTS {TICK}"

#: Seconds; by the last of them the clocks of two hosts may differ.
DAY, HOUR, SKEW = 86400, 3600, 60

#: How long a tick is remembered past its time, and past its run.
TICK_KEPT = "30 days"

#: What is tried: one key; all keys or none; a free slot, if nobody queues; a free slot, at the head of the queue.
Kind = Literal["one", "all", "slot", "head"]

#: All keys or none, in one statement: the recursion stops at the first that is taken, and then the others are undone.
_ALL = """(WITH RECURSIVE taken(i, ok) AS (
  SELECT 0, true UNION ALL
  SELECT i + 1, pg_try_advisory_lockMODE(($1::bigint[])[i + 1]) FROM taken WHERE ok AND i < cardinality($1::bigint[])
), done AS MATERIALIZED (SELECT bool_and(ok) AS ok, count(*) FILTER (WHERE ok) - 1 AS n FROM taken)
SELECT ok OR (SELECT count(pg_advisory_unlockMODE(($1::bigint[])[i])) FROM generate_series(1, n) i) < 0 FROM done)"""


@lru_cache
def try_statement(kind: Kind, *, shared: bool = False, fenced: bool = False, named: bool = False) -> Statement:
    """Give the statement that takes what is free, in one round trip, and never waits.

    It is refused also when somebody waits already, so it can't overtake a queue. Parameters: the number (kind "one") or
    the array of numbers, then with `named` the session's application_name, which tells a conflict who holds it.
    Columns: what was granted (t, or the slot's number), with `fenced` the token.
    """
    mode = "_shared" if shared else ""
    lock = {
        "one": f"pg_try_advisory_lock{mode}($1::bigint)",
        "all": _ALL.replace("MODE", mode),
        "slot": _slot("pg_try_advisory_lock(($1::bigint[])[1])", "mine"),
        "head": _slot("true", "i IS NOT NULL"),
    }[kind]
    if named:
        lock = f"CASE WHEN set_config('application_name', $2::text, false) IS NOT NULL THEN {lock} END"
    if fenced:
        got = "got" if kind in ("one", "all") else "got IS NOT NULL"
        # Lock first, then number: OFFSET 0 keeps the planner from merging the two.
        lock = f"got, CASE WHEN {got} THEN nextval('{FENCE}') END FROM (SELECT {lock} AS got OFFSET 0) locked"
    name = f"cs_try_{kind}{mode}{'_fenced' * fenced}{'_named' * named}"
    return Statement(name.encode(), f"SELECT {lock}".encode())


def _slot(gate: str, free: str) -> str:
    """Give the search for a slot: its number, or null.

    The array begins with the gate, which stands for the queue; the slots follow. `gate` says whether the queue is ours,
    `free` when the gate is released: each is an SQL condition.
    """
    return f"""(WITH RECURSIVE gate AS MATERIALIZED (SELECT {gate} AS mine), tried(i, ok) AS (
  SELECT 1, false FROM gate WHERE mine UNION ALL
  SELECT i + 1, pg_try_advisory_lock(($1::bigint[])[i + 1]) FROM tried WHERE NOT ok AND i < cardinality($1::bigint[])
), found AS MATERIALIZED (SELECT max(i) FILTER (WHERE ok) AS i, count(*) > 0 AS mine FROM tried),
freed AS MATERIALIZED (SELECT i, CASE WHEN {free} THEN pg_advisory_unlock(($1::bigint[])[1]) END AS free FROM found)
SELECT CASE WHEN free IS NULL OR free THEN ($1::bigint[])[i] END FROM freed)"""  # noqa: S608 - no input of anybody's


@lru_cache
def wait_statement(*, shared: bool = False, fenced: bool = False, named: bool = False) -> Statement:
    """Give the statement that blocks in the server, first come first served.

    Parameters: the number, the most milliseconds, with `named` the application_name. CASE fixes the order: the timeout
    is set first, and a token is drawn last. The session is ours alone, so the setting needs no reset. Column: the
    token, with `fenced`.
    """
    mode = "_shared" if shared else ""
    name = " AND set_config('application_name', $3::text, false) IS NOT NULL" * named
    lock = (
        f"CASE WHEN set_config('lock_timeout', $2::text, false) IS NOT NULL{name} "
        f"THEN pg_advisory_lock{mode}($1::bigint) END"
    )
    if fenced:
        lock = f"CASE WHEN ({lock})::text IS NOT NULL THEN nextval('{FENCE}') END"
    return Statement(f"cs_wait{mode}{'_fenced' * fenced}{'_named' * named}".encode(), f"SELECT {lock}".encode())


@lru_cache
def release_statement(*, shared: bool = False, many: bool = False) -> Statement:
    """Give the statement that releases one number, or an array of them; its column: whether all of them were held."""
    mode = "_shared" if shared else ""
    text = f"SELECT pg_advisory_unlock{mode}($1::bigint)"
    if many:
        text = f"SELECT bool_and(pg_advisory_unlock{mode}(n)) FROM unnest($1::bigint[]) n"  # noqa: S608 - no input of anybody's
    return Statement(f"cs_release{mode}{'_many' * many}".encode(), text.encode())


#: After a wait that failed: an answer 55P03 can reach us although the lock was granted (madelson/DistributedLock #147).
#: Not pg_advisory_unlock: that writes a WARNING into the server's log whenever there was nothing to repair.
RELEASE_ALL = Statement(b"cs_release_all", b"SELECT pg_advisory_unlock_all()")

_HOLDERS = """SELECT l.pid, coalesce(a.application_name, ''), coalesce(host(a.client_addr), '')
  FROM pg_locks l JOIN unnest(NUMBERS::bigint[]) n
    ON l.classid = ((n >> 32) & 4294967295)::oid AND l.objid = (n & 4294967295)::oid
  LEFT JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'advisory' AND l.GRANTED AND l.objsubid = 1
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
 ORDER BY l.pid"""

#: Who holds a key now, for people. classid and objid are the key's unsigned halves; objsubid 1 is the bigint space.
#: Source: https://www.postgresql.org/docs/current/view-pg-locks.html
HOLDERS = Statement(b"cs_holders", _HOLDERS.replace("NUMBERS", "$1").replace("GRANTED", "granted").encode())
HOLDERS_IN_TRANSACTION = _HOLDERS.replace("NUMBERS", "%(numbers)s").replace("GRANTED", "granted")

#: How many of %(numbers)s this very session holds.
HELD_IN_TRANSACTION = """SELECT count(DISTINCT (classid::int8 << 32) | objid::int8) FROM pg_locks
 WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND pid = pg_backend_pid()
   AND ((classid::int8 << 32) | objid::int8) = ANY(%(numbers)s)"""

#: The same rows for those who wait.
WAITERS = Statement(b"cs_waiters", HOLDERS.text.replace(b"l.granted", b"NOT l.granted"))
WAITERS_IN_TRANSACTION = HOLDERS_IN_TRANSACTION.replace("l.granted", "NOT l.granted")

#: Where `locks` asks what sessions hold, and where each lock session listens: the payload names the asker's channel.
QUESTION = "concurrency_safe"
LISTEN = f"LISTEN {QUESTION}".encode()

#: Every advisory lock of this database in the bigint space: number, granted, mode, backend pid, application_name,
#: client address, since when it is waited for, or the session's last statement (of a holder: when it was acquired, or
#: later). `waitstart` came with PostgreSQL 14.
CENSUS = """SELECT (l.classid::int8 << 32) | l.objid::int8, l.granted, l.mode = 'ShareLock', l.pid,
  coalesce(a.application_name, ''), coalesce(host(a.client_addr), ''),
  extract(epoch FROM coalesce(WAITSTART, CASE WHEN l.granted THEN a.state_change ELSE a.query_start END))
  FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'advisory' AND l.objsubid = 1
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
 ORDER BY NOT l.granted, 7, l.pid"""


def census(server_version: int) -> bytes:
    """Give the statement that lists all locks, those that are waited for in the order of the queues."""
    return CENSUS.replace("WAITSTART", "l.waitstart" if server_version >= 140000 else "NULL").encode()  # noqa: PLR2004


#: How full the server's lock table is: entries in use, and how many there is room for.
FULLNESS = b"""SELECT (SELECT count(*) FROM pg_locks WHERE NOT fastpath),
  current_setting('max_locks_per_transaction')::int8 *
  (current_setting('max_connections')::int8 + current_setting('max_prepared_transactions')::int8),
  extract(epoch FROM clock_timestamp())"""

#: What `doctor` asks: version, user, our tables, the lock table, connections. Of a table: what the user may not do with
#: it, '' when nothing lacks, null when there is none.
EXAMINE = f"""SELECT current_setting('server_version'), current_user,
  (SELECT coalesce(string_agg(what, ', ') FILTER (WHERE NOT has_table_privilege(ours, what)), '')
     FROM to_regclass('{TICK}') ours, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) what
    WHERE ours IS NOT NULL HAVING count(*) > 0),
  (SELECT CASE WHEN has_sequence_privilege(ours, 'USAGE') THEN '' ELSE 'USAGE' END
     FROM to_regclass('{FENCE}') ours WHERE ours IS NOT NULL),
  (SELECT count(*) FROM pg_locks WHERE NOT fastpath), current_setting('max_locks_per_transaction')::int8 *
  (current_setting('max_connections')::int8 + current_setting('max_prepared_transactions')::int8),
  (SELECT sum(numbackends) FROM pg_stat_database),
  current_setting('max_connections')::int8 - current_setting('superuser_reserved_connections')::int8,
  current_database()""".encode()  # noqa: S608 - no input of anybody's

#: What a fresh session must be told, by the first server version that knows it (0: all that we support).
#: The timeouts could kill a waiter or a holder; the keepalives and the check interval let the server notice a vanished
#: host or a killed client that is blocked in a wait (it would stay in the queue, and be granted the lock).
#: Source: https://www.postgresql.org/docs/current/runtime-config-client.html
SESSION_SETTINGS: tuple[tuple[int, str, str], ...] = (
    (0, "statement_timeout", "0"),
    (0, "lock_timeout", "0"),
    (0, "idle_in_transaction_session_timeout", "0"),
    (140000, "idle_session_timeout", "0"),
    (170000, "transaction_timeout", "0"),
    (0, "default_transaction_isolation", "read committed"),
    (0, "tcp_keepalives_idle", "10"),
    (0, "tcp_keepalives_interval", "5"),
    (0, "tcp_keepalives_count", "3"),
    (140000, "client_connection_check_interval", "2000"),
)


def session_settings(server_version: int) -> bytes:
    """Give the statement that lists which of `SESSION_SETTINGS` a session has not: name, value.

    Not those that the server's platform or the kind of socket may lack: what concerns the network.
    """
    wanted = ", ".join(
        f"('{name}', '{value}')"
        for since, name, value in SESSION_SETTINGS
        if server_version >= since and not name.startswith(("tcp_", "client_"))
    )
    return (
        f"SELECT s.name, s.setting FROM pg_settings s JOIN (VALUES {wanted}) w(name, value) USING (name) "  # noqa: S608 - constants
        "WHERE s.setting <> w.value ORDER BY s.name"
    ).encode()


def session_setup(server_version: int, pid: int | None, *, check_interval: bool = True) -> bytes:
    """Give the one statement that sets up a fresh session and asks what it is.

    `server_version` as libpq tells it (150018). `pid`: the settings are made only by the server process of that number;
    None: by any. `check_interval`: False for a server whose platform can't check its client's socket (it refuses the
    setting).
    Columns: backend pid, in recovery, version text, then the settings.
    """
    when, end = ("", "") if pid is None else (f"CASE WHEN pg_backend_pid() = {pid} THEN ", " END")
    settings = [
        f"{when}set_config('{name}', '{value}', false){end}"
        for since, name, value in SESSION_SETTINGS
        if server_version >= since and (check_interval or name != "client_connection_check_interval")
    ]
    return ", ".join(["SELECT pg_backend_pid()", "pg_is_in_recovery()", "version()", *settings]).encode()


# Ticks, in statements of the simple protocol. `name` and `host` are quoted already.
def claim_tick(rule: TickRule, number: int, waited: float, name: str, host: str, pid: int) -> str:
    """Give the statement that writes down the tick of now, unless it is there; its one row: the tick, in seconds.

    Two runs are of one tick when they were scheduled in the same period of UTC. But a job that is started once a day by
    local time can be started twice in one day of UTC, where the clocks go forward: so a run a day less one hour after
    the first one is a tick of its own, unless the job was started in between, too.
    """
    due = f"floor((extract(epoch FROM clock_timestamp()) - {waited:.6f}) / {rule.grain} + 0.5) * {rule.grain}"
    if rule.tick is not None:
        due = f"{rule.tick!r}"
    same = "t.tick = due.tick"
    if rule.period is not None:
        period = f"interval '{rule.period} seconds'"
        same = (
            f"t.tick > due.tick - {period} AND t.tick < due.tick + {period} "
            f"AND floor(extract(epoch FROM t.tick) / {rule.period}) "
            f"= floor(extract(epoch FROM due.tick) / {rule.period})"
        )
        if rule.period % DAY == 0:
            nearly = f"{period} - interval '{HOUR + SKEW} seconds'"
            same += f" AND (t.asked > t.tick + interval '{2 * HOUR} seconds' OR due.tick < t.tick + {nearly})"
    again = f"succeeded IS NULL AND {'true' if rule.retry_failed else 'false'}"
    return f"""WITH due AS MATERIALIZED (SELECT to_timestamp({due}) AS tick),
same AS MATERIALIZED (SELECT t.tick FROM {TICK} t, due WHERE t.key = {number} AND {same} ORDER BY t.tick DESC LIMIT 1),
again AS (UPDATE {TICK} t SET started = clock_timestamp(), host = {host}, pid = {pid}
  FROM same WHERE t.key = {number} AND t.tick = same.tick AND {again} RETURNING t.tick),
fresh AS (INSERT INTO {TICK} (key, tick, name, host, pid, started)
  SELECT {number}, due.tick, {name}, {host}, {pid}, clock_timestamp() FROM due
  WHERE NOT EXISTS (SELECT FROM same) RETURNING tick),
asked AS (UPDATE {TICK} t SET asked = due.tick
  FROM same, due WHERE t.key = {number} AND t.tick = same.tick AND NOT ({again}))
SELECT extract(epoch FROM tick) FROM (TABLE again UNION ALL TABLE fresh) claimed"""  # noqa: S608 - quoted, or numbers


def succeed_tick(number: int, tick: float) -> str:
    """Give the statement that writes down a success, and forgets what is old of that job."""
    old = f"clock_timestamp() - interval '{TICK_KEPT}'"
    return f"""WITH done AS (UPDATE {TICK} SET succeeded = clock_timestamp()
  WHERE key = {number} AND tick = to_timestamp({tick!r}))
DELETE FROM {TICK} WHERE key = {number} AND tick < {old} AND started < {old}
  AND tick <> to_timestamp({tick!r})"""  # noqa: S608 - numbers only


def last_success(number: int) -> str:
    """Give the statement whose one value is when a job succeeded last, in seconds, or null."""
    return f"SELECT extract(epoch FROM max(succeeded)) FROM {TICK} WHERE key = {number}"  # noqa: S608 - a number


# Transaction scope, on Django's connection (its driver's placeholders).
def try_in_transaction(*, shared: bool) -> str:
    """Give the statement that takes one number until the commit; its column: whether it was free."""
    return f"SELECT pg_try_advisory_xact_lock{'_shared' if shared else ''}(%s)"


def wait_in_transaction(*, shared: bool) -> str:
    """Give the statement that blocks for one number until `lock_timeout`."""
    return f"SELECT pg_advisory_xact_lock{'_shared' if shared else ''}(%s)"


TIMEOUTS_IN_TRANSACTION = "SELECT current_setting('lock_timeout'), current_setting('statement_timeout')"
SET_TIMEOUTS_IN_TRANSACTION = "SELECT set_config('lock_timeout', %s, true), set_config('statement_timeout', %s, true)"
TOKEN_IN_TRANSACTION = f"SELECT nextval('{FENCE}')"

LOCK_NOT_AVAILABLE = "55P03"
DEADLOCK_DETECTED = "40P01"
OUT_OF_MEMORY = "53200"
QUERY_CANCELED = "57014"
INVALID_PARAMETER = "22023"
UNDEFINED_TABLE = "42P01"


# Behind a pooler in transaction mode: a lock is an open transaction, in statements of the simple protocol (one of the
# extended protocol left its snapshot behind, which keeps VACUUM from removing anything).


def begin(name: str, server_version: int, timeout_ms: int) -> bytes:
    """Give the statements that open the transaction of a lock; nothing of them outlives it.

    READ COMMITTED keeps no snapshot between two statements. `timeout_ms`: the most that it may wait for the lock.
    """
    settings = [(one, value) for since, one, value in TRANSACTION_SETTINGS if server_version >= since]
    settings += [("lock_timeout", str(timeout_ms)), ("application_name", name.replace("'", "''"))]
    local = "; ".join(f"SET LOCAL {one} = '{value}'" for one, value in settings)
    return f"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {local}; ".encode()


#: What the transaction of a lock must not be ended by.
TRANSACTION_SETTINGS = tuple(
    (since, name, value)
    for since, name, value in SESSION_SETTINGS
    if name in ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")
)


def try_pooled(numbers: Sequence[int], *, shared: bool, fenced: bool) -> bytes:
    """Give the statement that takes all of `numbers`; columns: whether they were free, with `fenced` the token."""
    function = f"pg_try_advisory_xact_lock{'_shared' if shared else ''}"
    lock = " AND ".join(f"{function}({number})" for number in numbers)
    token = f", CASE WHEN got THEN nextval('{FENCE}') END" * fenced
    return f"SELECT got{token} FROM (SELECT {lock} AS got OFFSET 0) locked".encode()  # noqa: S608 - numbers only


def wait_pooled(number: int, *, shared: bool, fenced: bool) -> bytes:
    """Give the statement that blocks for `number`; its column: the token, with `fenced`."""
    lock = f"pg_advisory_xact_lock{'_shared' if shared else ''}({number})"
    token = f"nextval('{FENCE}')" if fenced else "NULL"
    return f"SELECT CASE WHEN ({lock})::text IS NOT NULL THEN {token} END".encode()


def inline(statement: Statement, numbers: Sequence[int]) -> bytes:
    """Give a statement about an array of numbers without a parameter."""
    return statement.text.replace(b"$1", b"'{%s}'" % b",".join(b"%d" % number for number in numbers))
