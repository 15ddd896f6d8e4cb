"""An apply in several rounds, once for both twins: each round is an apply of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from commitbus import _messages, _notes
from commitbus._failures import Failures, Rounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus._context import Run


def in_rounds(
    bus: object,
    rounds: int,
    robust: bool,
    scope: Run | None,
    apply_once: Callable[[Failures | None], list[Any]],
) -> list[Any]:
    """Apply what is pending, then what handlers published meanwhile, and so on.

    Parameters
    ----------
    bus : object
        Named in the error.
    rounds : int
        How often at most.
    robust : bool
        Try every event once, whatever the others raise.
    scope : Run, optional
        What surrounds the handlers of all rounds.
    apply_once : callable
        Applies what is pending, and fills the `Failures` that it is given.

    Returns
    -------
    list
        The events that were applied in all rounds.

    Raises
    ------
    TypeError
        When `rounds` is no int.
    ValueError
        When `rounds` is below 1.
    """
    check_rounds(rounds)
    progress = Rounds()
    failures = Failures(rounds=progress) if robust else None
    applied: list[Any] = []
    try:
        if scope is not None:
            scope.enter()
        for _ in range(rounds):
            before = progress.tried
            batch = apply_once(failures)
            applied += batch
            # A bus with failures is not among what was applied, but may have applied something.
            if not batch and progress.tried == before:
                break
        if scope is not None and leave(scope, bus, failures, 0):
            cast("Any", failures).errors.clear()
        if failures is not None and failures.errors:
            raise failures.end(bus)
        return applied
    except BaseException as error:
        if scope is not None and not scope.over and scope.leave(error):
            return applied
        if failures is not None:
            failures.chain(error, bus)  # those of the rounds before stay in sight
        applied = batch = []  # the traceback keeps this frame, and must keep no event
        _notes.drop_own_frames(error)
        raise
    finally:
        if scope is not None:
            scope.over = True


def check_rounds(rounds: object) -> None:
    """Refuse a number of rounds that is none."""
    if not isinstance(rounds, int) or rounds < 1:
        raise _messages.not_rounds(rounds)


def leave(scope: Run, bus: object, failures: Failures | None, before: int) -> bool:
    """Leave what surrounded the handlers, which have all run; true if that swallowed their errors, from `before` on."""
    try:
        failed = failures is not None and len(failures.errors) > before
        return scope.leave(failures.group(bus) if failures is not None and failed else None) and failed
    except BaseException as error:
        _notes.note_left(error, bus)
        raise
