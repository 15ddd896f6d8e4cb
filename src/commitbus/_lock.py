"""One lock for what changes rarely: which middleware there is, and which savepoints are open; and whether we forked."""

from __future__ import annotations

import os
from threading import RLock

# Re-entrant, since a finalizer or a signal handler may come in while it is held. Looked up as an attribute of
# this module each time, as a forked child gets another.
lock = RLock()


forks = 0  # of this process's line: what was begun with another number belongs to a parent


def _renew() -> None:
    """Start a forked child with a lock that no thread of its parent holds."""
    global lock, forks
    lock = RLock()
    forks += 1


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows)
    os.register_at_fork(after_in_child=_renew)
