"""`Savepoint`, one class for both twins: it runs once a block, not once an event."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

from commitbus import _messages, _notes
from commitbus._looking import Shown
from commitbus._opened import Opened

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


__all__ = ["Savepoint"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


class Savepoint:
    """What is published on a bus in a block: kept when the block ends, dropped when an exception leaves it.

    ``bus.savepoint()`` gives it: open it beside the savepoint of the transaction, and a new one for each block. It
    is open from then on; use it as a context manager, or call `release` or `rollback` by hand. Savepoints nest, and
    end in that order alone.

    While it is open, the buses that it covers can be published on, wrapped, registered and looked at, and a
    `DelayedEventBus` collects as ever; what would carry out or drop events is a `RuntimeError`. What another
    thread publishes on these buses meanwhile belongs to the savepoint, too.

    On a `MultiEventBus` it covers all buses that are registered, those of nested ones included, and what they
    collect meanwhile. A bus that is registered in the block is let go of when the block fails, with all that is
    in it: its next event registers it again.

    Keep it until it has ended: one that nobody has any more, as after an interrupt, is ended by the next use of the
    bus that it would refuse, with a warning or an error.

    Examples
    --------
    >>> from commitbus import AbstractEventBus
    >>> class MailBus(AbstractEventBus[str]):
    ...     def _apply_event(self, event: str, commit: bool) -> None:
    ...         print("send to", event)
    >>> bus = MailBus()
    >>> bus.publish("ada@example.org")
    >>> try:
    ...     with bus.savepoint():
    ...         bus.publish("nobody@example.org")
    ...         raise ValueError("no such user")
    ... except ValueError:
    ...     pass
    >>> _ = bus.apply(commit=True)
    send to ada@example.org
    """

    __module__ = "commitbus.savepoint"

    # Marks refer to what was opened, and not to this: where an interrupt keeps a block from ending it, nobody has it
    # any more, and what was opened is told.
    __slots__ = ("__weakref__", "_opened")

    def __init__(self, bus: Any) -> None:
        if not isinstance(bus, Shown):
            raise _messages.not_for_savepoints(bus)
        # As Shown buses, they have these.
        of: Any = bus if not cast("Any", bus)._commitbus_delayed else cast("Any", bus)._commitbus_parts()[0]
        if type(of).applies_after_rollback:
            raise _messages.savepoint_after_rollback(of)
        self._opened = Opened(bus, weakref.ref(self))
        self._opened.open()

    def release(self) -> None:
        """End it, and keep what was published.

        Raises
        ------
        RuntimeError
            When it has ended, or one that was opened later has not.
        """
        self._opened.release()

    def rollback(self) -> list[Any]:
        """End it, and drop what was published since.

        Returns
        -------
        list
            The events that were dropped; those of a multi bus flat, bus after bus. Nothing else keeps a
            reference to them.

        Raises
        ------
        RuntimeError
            When it has ended, or one that was opened later has not.
        """
        return self._opened.rollback()

    def __enter__(self) -> Self:
        """Return itself: it is open since it was made.

        Raises
        ------
        RuntimeError
            When it has ended.
        """
        if self._opened._bus is None:
            raise _messages.savepoint_ended()
        self._opened._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release it or, after an exception, roll it back, with those that were opened later.

        One that was ended by hand in the block stays as it is.
        """
        opened = self._opened
        if opened._bus is None:
            return
        if kind is None:
            opened.release()
            return
        try:
            opened._roll_back_all()
        except Exception as second:
            _notes.chain(cast("BaseException", error), second)  # what left the block is the first error

    def __reduce__(self) -> Any:
        """Refuse to be copied or pickled."""
        raise _messages.savepoint_is_no_value()

    def __repr__(self) -> str:
        """Name the bus."""
        return repr(self._opened)
