"""`use_orchestrator_or_create_multi_event_bus`: the unit of work."""

from __future__ import annotations

from contextlib import nullcontext
from types import FunctionType
from typing import TYPE_CHECKING

from commitbus import _messages
from commitbus._interfaces import EventBusOrchestrator
from commitbus._pure.multi_event_bus import MultiEventBus
from commitbus._rounds import check_rounds
from commitbus._transactions import see_errors_of
from commitbus._unit_of_work import Unit, Yielded, check_callbacks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any


def use_orchestrator_or_create_multi_event_bus(
    event_bus_orchestrator: EventBusOrchestrator | None,
    commit: bool,
    *,
    commit_transaction: Callable[[], object] | None = None,
    rollback_transaction: Callable[[], object] | None = None,
    robust: bool = False,
    rounds: int = 1,
    on_unapplied: Callable[[MultiEventBus], object] | None = None,
) -> AbstractContextManager[tuple[EventBusOrchestrator, Callable[[], list[Any]]], bool | None]:
    """Run in the caller's unit of work or, without one, in a new one.

    Parameters
    ----------
    event_bus_orchestrator : EventBusOrchestrator or None
        The caller's, or None to create a `MultiEventBus`.
    commit : bool
        Handed to every handler: true to do it for real, false for a dry run.
    commit_transaction : callable, optional
        Called without arguments before anything is applied, if `commit` is true. Not called with an
        orchestrator: the caller owns the transaction, too. Pass the method of the connection or session
        itself: of a function around it, nobody knows what became of the transaction when it raises.
    rollback_transaction : callable, optional
        Called without arguments where the transaction must not stay open: when an exception leaves the
        block before the commit succeeded, when `commit_transaction` raises, after a dry run, and when the
        block ends without a call of ``commit_and_execute_side_effects``. What was
        published in the block and not applied is dropped, with the data; on buses whose class has
        ``applies_after_rollback = True`` it is applied then, and dropped by a commit. What it raises itself becomes
        the last in the chain of the error that was there before. Not called with an orchestrator.
    robust : bool, default False
        Try every event once, whatever the others raise.
    rounds : int, default 1
        How often to go on with what handlers published meanwhile, at most.
    on_unapplied : callable, optional
        Called with a `MultiEventBus` when the block is left, after the commit or without an exception,
        with events that were never applied: to log, store or enqueue them. Instead of the warning or the
        note below. Also, beside the note, with those of which nobody knows whether they were committed, and
        with those that are for a rollback and were not applied after it.

    Returns
    -------
    context manager of (EventBusOrchestrator, callable)
        It yields what to wrap buses with, and ``commit_and_execute_side_effects``. That commits,
        applies, and returns the events that were applied. Called again after an apply that failed, it
        goes on applying without committing again. With an orchestrator it does nothing and returns an
        empty list. It raises what `commit_transaction` raises, and then nothing was applied: a note says
        so where it is not known whether the transaction was committed. It raises `NotCommittedError` where
        it can be seen that it was not, or would not be; else what `MultiEventBus.apply` raises. A bus whose
        class has ``applies_before_commit = True``, an outbox, is applied before `commit_transaction` is
        called.

    Raises
    ------
    TypeError
        When `event_bus_orchestrator` is neither an orchestrator nor None, when one of the functions cannot
        be called (``session.commit()`` instead of ``session.commit``), or `rounds` is no int.
    ValueError
        When `rounds` is below 1.

    Warns
    -----
    UnappliedEventsWarning
        When the block is left, not by an exception, with events that were never applied. When it is left by
        one after the commit, a note on the exception says how many, and which, instead.

    Examples
    --------
    A process that may be a part of a larger one:

    >>> from commitbus import BasicEventBus, use_orchestrator_or_create_multi_event_bus
    >>> def say(*, commit: bool) -> None:
    ...     print("mail sent")
    >>> def order(event_bus_orchestrator=None):
    ...     with use_orchestrator_or_create_multi_event_bus(
    ...         event_bus_orchestrator, True, commit_transaction=lambda: print("committed")
    ...     ) as (event_bus, commit_and_execute_side_effects):
    ...         event_bus.wrap(BasicEventBus()).publish(say)
    ...         return len(commit_and_execute_side_effects())
    >>> order()
    committed
    mail sent
    1

    Called by another, it leaves commit and side effects to that one:

    >>> with use_orchestrator_or_create_multi_event_bus(None, True) as (event_bus, execute):
    ...     print(order(event_bus), "applied by the callee")
    ...     print(len(execute()), "applied by the caller")
    0 applied by the callee
    mail sent
    1 applied by the caller
    """
    functions = (commit_transaction, rollback_transaction, on_unapplied)
    check_callbacks(*functions)
    if type(rounds) is not int or rounds < 1:
        check_rounds(rounds)
    if event_bus_orchestrator is None:
        if commit_transaction is not None and type(commit_transaction) is not FunctionType:
            see_errors_of(commit_transaction)
        return Unit(MultiEventBus(), commit, functions, robust, rounds)
    if not isinstance(event_bus_orchestrator, EventBusOrchestrator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _messages.not_an_orchestrator(event_bus_orchestrator)
    return nullcontext(Yielded((event_bus_orchestrator, list)))


use_orchestrator_or_create_multi_event_bus.__module__ = "commitbus.multi_event_bus"
