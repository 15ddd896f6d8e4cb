"""What a session or connection of SQLAlchemy knows of its transaction, and what was seen of its errors."""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from commitbus._drivers import IN_FAILED_TRANSACTION, driver_of, has_ended, is_refusal, package_of, sqlstate
from commitbus._outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def has_failed(owner: object) -> bool:
    """Whether the transaction of a connection, or of a session, is one that the server will not commit."""
    with suppress(Exception):  # of a connection that was closed, say: what comes next tells
        return any(driver_of(connection).has_failed(connection) for connection in _driver_connections(owner))
    return False


def _driver_connections(owner: Any) -> Iterable[Any]:
    package = package_of(owner)
    if package == "sqlalchemy":
        return [connection.connection.driver_connection for connection in connections_of(owner)]
    return [owner.connection] if package == "django" else [owner]


def owner_of(function: object) -> Any:
    if type(function) is FunctionType:
        return None
    try:
        return getattr(function, "__self__", None)
    except Exception:  # of an odd one
        return None


def transaction_of(owner: Any) -> Any:
    """Give the outermost transaction of a session or connection of SQLAlchemy, or None."""
    with suppress(Exception):
        one = plain_session_of(owner)
        return None if one is None else one.get_transaction()
    return None


def after_of_session(transaction: Any, error: BaseException) -> Outcome:
    """Say what became of a transaction of a session, or connection, of SQLAlchemy, when its commit has raised."""
    if transaction is None:  # there was none, so that it has begun and ended within the commit, or never
        return _after_of_sent(error)
    of_connection = getattr(transaction, "_state", None) is None
    return _after_of_sent(error) if of_connection else after_of_transaction(transaction, error)


def _after_of_sent(error: BaseException) -> Outcome:
    # Not by what the driver tells: when an interrupt comes within the driver's commit, before that has said anything,
    # SQLAlchemy (2.0, 2.1) gives the connection back to its pool without a rollback, and whoever has it next commits.
    return Outcome.NOT_COMMITTED if is_refusal(error) else Outcome.UNKNOWN


def after_of_transaction(transaction: Any, error: BaseException) -> Outcome:
    """Say what became of the transaction of a session of SQLAlchemy, when its commit has raised."""
    with suppress(Exception):
        # Private: since 1.4, in 2.0 and 2.1.
        state = transaction._state.name
        if state == "COMMITTED":
            return Outcome.COMMITTED
        if state == "CLOSED":  # by its end, after which a listener has failed, or by a rollback of the session's own
            return Outcome.UNKNOWN
        kept: dict[Any, tuple[Any, ...]] = transaction._connections
        # Where none was tried, an interrupt may have come right after the COMMIT, before SQLAlchemy has noted that.
        if state != "PREPARED" or not kept or _is_from_sqlalchemy(error):
            return Outcome.NOT_COMMITTED  # no COMMIT was sent
        tried = {id(connection) for connection, one, *_ in kept.values() if not one.is_active}
        if len(tried) == 1 and not transaction.session.twophase:
            return _after_of_sent(error)
    return Outcome.UNKNOWN


def _is_from_sqlalchemy(error: BaseException) -> bool:
    """Whether SQLAlchemy itself refuses to commit, since the line was lost before, for example."""
    from sqlalchemy.exc import InvalidRequestError

    return isinstance(error, InvalidRequestError)


def session_has_failed(session: Any) -> bool:
    """Do the same as `has_failed` for a session that is about to commit, and ask the server where that is needed."""
    if not getattr(session.get_transaction(), "_connections", None):
        return False  # it has no connection yet
    return has_failed(session) or (needs_asking(session) and ask(session))


def needs_asking(owner: object) -> bool:
    """Whether an error was seen in the transaction of a session of SQLAlchemy whose driver keeps no status."""
    if not _seen:
        return False
    with suppress(Exception):
        return any(map(_error_seen, connections_of(owner)))
    return False


def ask(session: object) -> bool:
    """Ask the server whether the transaction of a session of SQLAlchemy has failed, where an error was seen in it."""
    for connection in connections_of(session):
        if _error_seen(connection):
            try:
                connection.exec_driver_sql("SELECT 1")
            except Exception as error:
                if sqlstate(error) == IN_FAILED_TRANSACTION:
                    return True
    return False


# The transaction of SQLAlchemy in which an error was seen last, and the one that the server has ended at an error of a
# statement, by its connection: weakly, as they refer to that.
_seen: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


_ended: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


_told: list[Callable[[object], None]] = []  # what is called with the connection of such a one


_listening = False


def tell_ended(function: Callable[[object], None]) -> None:
    """Have a function called when the server has ended the transaction of a connection of SQLAlchemy at an error."""
    _told.append(function)


def see_errors() -> None:
    """Have SQLAlchemy tell of each error of a driver."""
    global _listening
    if not _listening:
        from sqlalchemy import Engine, event

        event.listen(Engine, "handle_error", _see_error)
        _listening = True


def see_errors_of(function: object) -> None:
    """See the errors of the statements before a commit, where a unit of work's is that of a session of SQLAlchemy."""
    if not _listening and package_of(owner_of(function)) == "sqlalchemy":
        with suppress(Exception):
            see_errors()


def _see_error(context: Any) -> None:
    connection = context.connection
    if connection is None or (transaction := connection.get_transaction()) is None:
        return
    _seen[connection] = weakref.ref(transaction)
    if context.statement is not None and has_ended(context.original_exception, lambda: connection.connection):
        _ended[connection] = weakref.ref(transaction)
        for function in _told:
            function(connection)


def has_connection(session: object, connection: object) -> bool:
    """Whether a session of SQLAlchemy has a connection in its transaction."""
    with suppress(Exception):
        return any(one is connection for one in connections_of(session))
    return False


def _error_seen(connection: Any) -> bool:
    return _is_current(_seen.get(connection), connection)


def was_ended(owner: Any) -> bool:
    """Whether the server has ended the transaction of a session or connection of SQLAlchemy at an error."""
    if not _ended or package_of(owner) != "sqlalchemy":
        return False
    with suppress(Exception):
        return any(_is_current(_ended.get(connection), connection) for connection in connections_of(owner))
    return False


def _is_current(seen: weakref.ref[Any] | None, connection: Any) -> bool:
    return seen is not None and seen() is not None and seen() is connection.get_transaction()


def session_of(function: object) -> Any:
    """Give the plain session of SQLAlchemy whose method a function is, or None."""
    with suppress(Exception):
        owner = owner_of(function)
        if owner is not None and package_of(owner) == "sqlalchemy":
            found = plain_session_of(owner)
            return found if hasattr(found, "identity_map") else None
    return None


def scoped_sessions(function: Any) -> list[Any]:
    """List the scoped sessions of SQLAlchemy that a function may ask for the session of the current task.

    Of a method its owner or, where that is none, what is in the owner's attributes; else what is in its closure, and
    what it names.
    """
    if "sqlalchemy" not in sys.modules:
        return []
    candidates: list[Any] = []
    try:
        if type(function) is FunctionType:
            if function.__closure__ is not None:
                candidates += [cell.cell_contents for cell in function.__closure__]
            if function.__code__.co_names:
                names = function.__globals__
                candidates += [names[name] for name in function.__code__.co_names if name in names]
        elif (owner := owner_of(function)) is not None:
            candidates += [owner, *cast("Any", vars(owner)).values()]
    except Exception:  # of an odd one, or of a variable that has no value yet
        return []
    return [one for one in candidates if package_of(one) == "sqlalchemy" and "registry" in getattr(one, "__dict__", {})]


def plain_session_of(owner: Any) -> Any:
    """Give the plain session or connection that an asynchronous or a scoped one of SQLAlchemy stands for, or None."""
    attributes: Any = getattr(owner, "__dict__", {})
    registry: Any = attributes.get("registry")
    if registry is not None:  # a scoped session, which would make one where there is none
        if not registry.has():
            return None
        owner = registry()
    return getattr(owner, "sync_session", None) or getattr(owner, "sync_connection", None) or owner


def connections_of(owner: Any) -> list[Any]:
    """List the connections that a session of SQLAlchemy has in its transaction; one is its own."""
    owner = plain_session_of(owner)
    if owner is None or hasattr(owner, "exec_driver_sql"):
        return [] if owner is None else [owner]
    # Private, as the public `session.connection()` would open one that is not there: since 1.4, in 2.0 and 2.1.
    kept: dict[Any, tuple[Any, ...]] = getattr(owner.get_transaction(), "_connections", {})
    return list({id(connection): connection for connection, *_ in kept.values()}.values())
