"""Run a command while holding a lock: ``exclusively.py LOCKFILE COMMAND ARGUMENT...``

The operating system drops the lock when the command ends, however it ends: an interrupted build leaves
nothing to clean up. A second build started meanwhile stops at once.
"""

import errno
import fcntl
import os
import sys

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # how systems say that another process has the lock


def main(lockfile: str, *command: str) -> None:
    """Take the lock or stop with a message, then become the command."""
    folder = os.path.dirname(lockfile) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        lock = os.open(lockfile, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        sys.exit(f"{folder}: cannot be written ({error.strerror}); build in a copy of the book that you may write to.")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            sys.exit("Another build is running in this folder; wait for it, or stop it, and call make again.")
        sys.exit(
            f"{folder}: this file system has no locks ({error.strerror}), which keep two builds apart; "
            "build in a copy of the book on one that has, e.g. a local disk."
        )
    os.set_inheritable(lock, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
