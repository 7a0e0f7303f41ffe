"""Run a command that ends with whoever holds the other end of this process's standard input.

The demo starts each of its servers as `python -m example.demo.tether COMMAND...`, in a session of
its own and with a pipe as standard input. The kernel closes that pipe however the demo ends,
`kill -9` included, and a stop in good order closes it as well: there is one way to end, and every
run takes it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

#: Seconds between asking the command to stop and killing whatever is left of its session.
GRACE = 3.0


def main() -> None:
    """Run the command; when it ends or the pipe closes, leave nothing of it behind."""
    with subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, close_fds=False) as child:
        threading.Thread(target=_end_with_the_pipe, args=(child,), daemon=True).start()
        child.wait()
    _kill_session()


def _end_with_the_pipe(child: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    child.terminate()
    time.sleep(GRACE)
    _kill_session()


def _kill_session() -> None:
    # This process is the leader of its group, and the command's own children are in it.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
