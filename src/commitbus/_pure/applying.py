"""Applying: takes a batch out of a bus, runs it, and puts back what is not done of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from commitbus import _notes
from commitbus._batch import Batch, new_batch, put_back
from commitbus._failures import Failures
from commitbus._marks import check_open
from commitbus._pure import loops
from commitbus._pure.batch import event_of, position_of, see_to, take
from commitbus._pure.loops import begin, run, run_first, run_robustly
from commitbus._rounds import check_rounds, in_rounds, leave

if TYPE_CHECKING:
    from commitbus._batch import PlainBatch
    from commitbus._context import Run
    from commitbus._pure.batch import Home

Filled: TypeAlias = "Failures | list[Failures] | None"  # described below


def carry_out(home: Home, bus: object, hook: Any, commit: bool, failures: Filled, out: list[Any] | None) -> list[Any]:
    """Apply what is pending: the one path behind every apply, but for the plainest of them.

    Parameters
    ----------
    home : Home
        What puts the batch's events into effect, and where those go back that were not applied.
    bus : object
        Named in notes.
    hook : callable
        What `home` applies an event with, looked up before anything is taken.
    commit : bool
        As in `AbstractEventBus.apply`.
    failures : Failures or list, optional
        Filled by a robust apply; an empty list, to which these are added once something has failed; None for an apply
        that stops at the first error.
    out : list, optional
        Gathers the events that multi buses apply.

    Returns
    -------
    list
        The events that were applied.
    """
    source = home._commitbus_source()
    if source._commitbus_marks is not None:
        check_open(source)
    running = new_batch([])
    batch: Any = running
    before = len(failures.errors) if isinstance(failures, Failures) else 0
    applied: list[Any] = []
    whole: list[Any] = []
    scope: Run | None = None
    try:
        try:
            if (stack := loops.middleware) is not None:  # read once: another thread may take it away
                hook = home._commitbus_surrounded(hook, stack)
            home._commitbus_start(batch)
            take(source, batch)
            if not batch.events:
                return []
            if (scope := home._commitbus_scope(commit)) is not None:
                whole = batch.events.copy()  # for what it swallows: what is done of a batch that was put back may go
                scope.enter()
            begin(batch, bus, failures)
            handler = home._commitbus_choose(hook, None if isinstance(failures, list) else failures, out, batch)
            if failures is None:
                run(handler, batch, commit)
            elif isinstance(failures, list):
                failures = run_first(handler, batch, commit, bus, failures)
            else:
                run_robustly(handler, batch, commit, bus, failures)
            applied = end(home, bus, batch, failures)
            batch = None
        except BaseException:
            put_back(home, batch)
            raise
        if scope is not None and leave(scope, bus, failures, before) and failures is not None:
            del failures.errors[before:]
        return applied
    except BaseException as error:
        if batch is not None:
            # fmt: off
            # One line, without a call: there may be no stack left, or an interrupt have come into `put_back`.
            if not batch.settled: batch.behind, home._commitbus_left, batch.settled = home._commitbus_left, batch, True  # noqa: E701
            # One line: that of a `try` alone is covered by no handler, not even by the `finally` below.
            try: stopped(home, batch, bus, error, failures)  # noqa: E701, SIM105
            # fmt: on
            except Exception:  # noqa: S110
                pass  # no stack or no memory: that costs the note
        if scope is not None and not scope.over and scope.leave(error):
            return [] if batch is None else applied_of(whole, batch, position_of(batch))
        raise
    finally:
        # The frame of a handler that failed leads to this one, and it must keep no event.
        batch, applied, whole = None, [], []
        home._commitbus_finish(running)
        del running
        if scope is not None:
            scope.over = True


def end(home: Home, bus: object, batch: Batch, failures: Failures | None) -> list[Any]:
    """Put back what has failed of a batch that was run to its end, and give what was applied."""
    if failures is None or not batch.failed:
        return batch.events[batch.begin :] if batch.begin else batch.events
    applied = applied_of(batch.events, batch, len(batch.events))
    failures.set_aside(bus, batch.events)
    put_back(home, batch)
    see_to(home, batch)
    return applied


def applied_of(events: list[Any], batch: PlainBatch, done: int) -> list[Any]:
    """List those of a batch's events that are done."""
    failed = set(batch.failed)
    return [events[i] for i in range(batch.begin, done) if i not in failed]


def apply_all(home: Any, bus: object, commit: bool, robust: bool, rounds: int, out: list[Any] | None) -> list[Any]:
    """Apply what is pending, robustly or in several rounds; raises what failed."""
    failures: list[Failures] | None = None
    if rounds != 1:
        check_rounds(rounds)
        if robust or home._commitbus_scope(commit) is not None:
            return apply_in_rounds(home, bus, commit, robust, rounds, out)
    elif robust:
        # Of a bus of events, nothing is made before something fails.
        failures = [Failures()] if home._commitbus_applies_buses() else []
    applied: list[Any] = []
    try:
        applied = carry_out(home, bus, home._commitbus_hook(), commit, failures[0] if failures else failures, out)
        # Where a handler has left a savepoint open, the next round is refused.
        if rounds != 1 and applied and (home._commitbus_holds_any() or home._commitbus_marks is not None):
            applied += apply_in_rounds(home, bus, commit, robust, rounds - 1, out)
    except BaseException as error:
        applied = []  # the traceback keeps this frame, and must keep no event
        _notes.drop_own_frames(error)
        raise
    if failures and failures[0].errors:
        applied = []
        raise failures[0].end(bus)
    return applied


def apply_in_rounds(
    home: Any, bus: object, commit: bool, robust: bool, rounds: int, out: list[Any] | None
) -> list[Any]:
    # Not where it is called from: a function with a closure in it takes a fifth longer for one event.
    return in_rounds(
        bus,
        rounds,
        robust,
        home._commitbus_scope(commit),
        lambda failures: carry_out(home, bus, home._commitbus_hook(), commit, failures, out),
    )


def stopped(home: Home, batch: PlainBatch, bus: object, error: BaseException, failures: Filled) -> None:
    """See to a batch that was put back: bring it into order, and make the note."""
    events, first, done = batch.events, batch.begin, position_of(batch)
    event = event_of(events[done]) if done < len(events) else None
    earlier, count, left = len(batch.failed), len(events) - first, done < len(events)
    tried = see_to(home, batch)
    _notes.drop_own_frames(error)
    if tried > earlier:
        place = (done - first, batch.width, batch.span, count)
        _notes.note_stopped(error, bus, event, place, earlier)
    elif left:
        _notes.note_interrupted(error, bus, done - first, count)
    made = failures if isinstance(failures, list) else [failures]
    if made and made[0] is not None and not isinstance(error, Exception):
        made[0].chain(error, bus)
