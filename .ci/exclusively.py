"""Run a command while holding a lock: ``exclusively.py LOCKFILE COMMAND ARGUMENT...``

The operating system drops the lock when the command ends, however it ends: an interrupted build leaves
nothing to clean up. A second build started meanwhile stops at once.
"""

import fcntl
import os
import sys


def main(lockfile: str, *command: str) -> None:
    """Take the lock or stop with a message, then become the command."""
    os.makedirs(os.path.dirname(lockfile) or ".", exist_ok=True)
    lock = os.open(lockfile, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit("Another build is running in this folder; wait for it, or stop it, and call make again.")
    os.set_inheritable(lock, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
