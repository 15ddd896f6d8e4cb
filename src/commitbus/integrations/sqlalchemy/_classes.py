"""The classes that sessions with buses are given: of the same name, and with a few methods of ours."""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.util.concurrency import in_greenlet as _in_greenlet

from commitbus.integrations.sqlalchemy import _messages
from commitbus.integrations.sqlalchemy._session import HAS_GREENLET

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, SessionTransaction


def ending_class(cls: type[Session]) -> type[Session]:
    """Give the class of a session that has buses: one for each class of sessions, of the same name.

    An attribute of the session would either keep it alive or not be kept alive by it, and hide what others put there.
    """
    for known in cls.__subclasses__():
        if "_commitbus_names" in vars(known):
            return known
    names = [name for name in ("rollback", "close", "reset", "invalidate") if hasattr(cls, name)]
    body: dict[str, Any] = {name: _method(cls, name) for name in names}
    body |= _commit_methods(cls)
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    try:
        return cast("type[Session]", metaclass(cls.__name__, (cls,), body | {"_commitbus_names": names}))
    except TypeError as error:
        raise _messages.not_to_be_subclassed(cls, error) from error


def _method(cls: type[Session], name: str) -> Callable[..., Any]:
    function = getattr(cls, name)

    @wraps(function)
    def method(self: Session, *args: Any, **kwargs: Any) -> Any:
        bound: Any = vars(self).get("_commitbus_bound")
        return function(self, *args, **kwargs) if bound is None else bound.end(self, name, function, *args, **kwargs)

    return method


def _commit_methods(cls: type[Session]) -> dict[str, Any]:
    commit_of, begin_of = cls.commit, cls.begin

    @wraps(commit_of)
    def commit(self: Session, *args: Any, **kwargs: Any) -> None:  # a subclass may take some
        bound: Any = vars(self).get("_commitbus_bound")
        if bound is None or bound.running or bound.applying:
            commit_of(self, *args, **kwargs)
            return
        # As `Bound.commit`, without its calls: most commits come by here.
        try:
            bound.running = True
            bound.awaited = HAS_GREENLET and _in_greenlet()
            if bound.awaited:
                bound.commit_to_the_end(self, partial(commit_of, self, *args, **kwargs))
            else:
                commit_of(self, *args, **kwargs)
            if bound.buses._commitbus_holds_any():
                bound.check_heard()
        except BaseException as error:
            bound.fail(self, error)
            raise
        finally:
            bound.running = False

    @wraps(begin_of)
    def begin(self: Session, *args: Any, **kwargs: Any) -> SessionTransaction:
        transaction = begin_of(self, *args, **kwargs)
        bound: Any = vars(self).get("_commitbus_bound")
        if bound is not None:
            if transaction is bound.ending:
                bound.see(transaction)
            elif not (transaction.nested or bound.applying):
                bound.refuse_deaf()
        return transaction

    return {"commit": commit, "begin": begin}


def storing_class(cls: type[Session]) -> type[Session]:
    """Give the class of a session that stores, as long as its commit flushes, what belongs to the transaction.

    That is after the listeners of `before_commit`, and after those of a flush, which may publish, too.
    """
    if "_commitbus_stores" in vars(cls):
        return cls
    for known in cls.__subclasses__():
        if "_commitbus_stores" in vars(known):
            return known
    flush_of = cls.flush
    is_clean_of: Any = getattr(cls, "_is_clean", None)  # private: since 0.5, in 2.0 and 2.1

    @wraps(flush_of)
    def flush(self: Session, *args: Any, **kwargs: Any) -> None:
        flush_of(self, *args, **kwargs)
        bound: Any = vars(self).get("_commitbus_bound")
        if bound is not None and bound.storing:
            bound.store(self)

    def is_clean(self: Session) -> bool:
        bound: Any = vars(self).get("_commitbus_bound")
        return bool(is_clean_of(self)) and not (bound is not None and bound.storing and bound.has_to_store())

    body: dict[str, Any] = {"flush": flush, "_is_clean": is_clean, "_commitbus_stores": True}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    return cast("type[Session]", metaclass(cls.__name__, (cls,), body))
