"""Every statement that the library sends, and the SQLSTATEs it understands. Nothing else here.

Source: https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADVISORY-LOCKS
"""

from __future__ import annotations

from typing import NamedTuple


class Statement(NamedTuple):
    """A prepared statement: its name on the session, and its text."""

    name: bytes
    text: bytes


#: One round trip, never waits. Refused also when somebody waits already, so it can't overtake a queue.
TRY = Statement(b"cs_try", b"SELECT pg_try_advisory_lock($1::bigint)")

#: The same, and the session says whose work it is for ($2, its application_name), so that a conflict can name the
#: holder.
TRY_NAMED = Statement(
    b"cs_try_named",
    b"SELECT CASE WHEN set_config('application_name', $2::text, false) IS NOT NULL"
    b" THEN pg_try_advisory_lock($1::bigint) END",
)

#: Blocks in the server, first come first served, up to $2 milliseconds. CASE fixes the order: the timeout is set first.
#: The session is ours alone, so the setting needs no reset.
WAIT = Statement(
    b"cs_wait",
    b"SELECT CASE WHEN set_config('lock_timeout', $2::text, false) IS NOT NULL THEN pg_advisory_lock($1::bigint) END",
)

RELEASE = Statement(b"cs_release", b"SELECT pg_advisory_unlock($1::bigint)")

#: After a wait that failed: an answer 55P03 can reach us although the lock was granted (madelson/DistributedLock #147).
#: Not pg_advisory_unlock: that writes a WARNING into the server's log whenever there was nothing to repair.
RELEASE_ALL = Statement(b"cs_release_all", b"SELECT pg_advisory_unlock_all()")

_HOLDERS = """SELECT l.pid, coalesce(a.application_name, ''), coalesce(host(a.client_addr), '')
  FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid = ((NUMBER::bigint >> 32) & 4294967295)::oid
   AND l.objid = (NUMBER::bigint & 4294967295)::oid
 ORDER BY l.pid"""

#: Who holds a key now, for people. classid and objid are the key's unsigned halves; objsubid 1 is the bigint space.
#: Source: https://www.postgresql.org/docs/current/view-pg-locks.html
HOLDERS = Statement(b"cs_holders", _HOLDERS.replace("NUMBER", "$1").encode())
HOLDERS_IN_TRANSACTION = _HOLDERS.replace("NUMBER", "%(number)s")

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


# Transaction scope, on Django's connection (its driver's placeholders).
TRY_IN_TRANSACTION = "SELECT pg_try_advisory_xact_lock(%s)"
WAIT_IN_TRANSACTION = "SELECT pg_advisory_xact_lock(%s)"
TIMEOUTS_IN_TRANSACTION = "SELECT current_setting('lock_timeout'), current_setting('statement_timeout')"
SET_TIMEOUTS_IN_TRANSACTION = "SELECT set_config('lock_timeout', %s, true), set_config('statement_timeout', %s, true)"

LOCK_NOT_AVAILABLE = "55P03"
DEADLOCK_DETECTED = "40P01"
OUT_OF_MEMORY = "53200"
QUERY_CANCELED = "57014"
INVALID_PARAMETER = "22023"
