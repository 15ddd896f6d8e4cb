"""Settings for Django's own tests of `transaction.on_commit`, which run with `OnCommitEventBus` in its place.

``nox -s django`` fetches Django's tests, and runs them with these.
"""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, Any

from django.db import transaction

if TYPE_CHECKING:
    from collections.abc import Callable

DATABASES = {name: {"ENGINE": "django.db.backends.sqlite3"} for name in ("default", "other")}
SECRET_KEY = "tests"
USE_TZ = False

theirs: Any = transaction.on_commit
buses: dict[str | None, Any] = {}
published: list[object] = []


def on_commit(func: Callable[[], object], using: str | None = None, robust: bool = False) -> None:
    """Publish in place of registering a hook."""
    from commitbus import BasicEventBus
    from commitbus.integrations.django import OnCommitEventBus

    def call(*, commit: bool) -> None:
        assert commit is True
        func()

    # Django logs and swallows what a robust hook raises, which no bus does; and it has its own text for a TypeError.
    if robust or not callable(func):
        theirs(func, using, robust)
        return
    if using not in buses:
        buses[using] = OnCommitEventBus(BasicEventBus(), using)
    published.append(func)
    buses[using].publish(call)


transaction.on_commit = on_commit
atexit.register(lambda: published and print(len(published), "hooks were published on a bus"))
