"""One lock for what is not done in one line, for all buses, held for a few instructions; and whether we forked."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from threading import RLock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

# Whether a line without a call, a jump back or an allocation is atomic: see `commitbus._batch`.
ATOMIC = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()

# For what changes rarely: which middleware there is, and which savepoints are open. Re-entrant, since a finalizer or a
# signal handler may come in while it is held. Looked up as an attribute of this module each time, as a forked child
# gets another.
lock = RLock()
# Held by those who change what is left of a batch. Where lines are atomic it is nothing: a lock would be held while a
# finalizer runs, and for good where a tracer raises as it is about to be released.
guard: AbstractContextManager[Any] = nullcontext() if ATOMIC else lock

forks = 0  # of this process's line: what was begun with another number belongs to a parent


def renew() -> None:
    """Make a lock that nobody holds."""
    global lock, guard
    before, lock = lock, RLock()
    if guard is before:
        guard = lock


def _begin_child() -> None:
    """Start a forked child with a lock that no thread of its parent holds."""
    global forks
    renew()
    forks += 1


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows)
    os.register_at_fork(after_in_child=_begin_child)
