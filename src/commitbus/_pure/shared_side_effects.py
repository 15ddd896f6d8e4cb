"""`SharedSideEffectsEventBus`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commitbus import _messages, _notes
from commitbus._context import Run, SharedSideEffectContext
from commitbus._pure.event_bus import AbstractEventBus
from commitbus._pure.side_effects import SideEffectCall

if TYPE_CHECKING:
    from typing import Self


class SharedSideEffectsEventBus(AbstractEventBus[SideEffectCall]):
    """A bus of side-effect calls that share a `SharedSideEffectContext`.

    Examples
    --------
    One connection for all the mails of a commit, opened when the first is sent and closed after the
    last:

    >>> from contextlib import contextmanager
    >>> from commitbus import SharedSideEffectContext, SharedSideEffectsEventBus, SideEffectCall
    >>> @contextmanager
    ... def connection():
    ...     print("connect")
    ...     yield "smtp"
    ...     print("disconnect")
    >>> def send(address: str, *, commit: bool) -> None:
    ...     context = SharedSideEffectContext.current()
    ...     client = context.get_or_create("smtp", lambda: context.enter_context(connection()))
    ...     print(client, address)
    >>> bus = SharedSideEffectsEventBus()
    >>> bus.publish(SideEffectCall(send, "ada@example.org"))
    >>> bus.publish(SideEffectCall(send, "grace@example.org"))
    >>> _ = bus.apply(commit=True)
    connect
    smtp ada@example.org
    smtp grace@example.org
    disconnect
    """

    __module__ = "commitbus.shared_side_effects"

    __slots__ = ("__dict__", "_commitbus_context")
    _commitbus_context: SharedSideEffectContext
    _commitbus_plain = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an empty bus with a context; a subclass's ``__init__`` takes the arguments."""
        self = super().__new__(cls, *args, **kwargs)
        self._commitbus_context = SharedSideEffectContext()
        return self

    @property
    def context(self) -> SharedSideEffectContext:
        """What the side effects share: the same object for the whole life of the bus.

        A copy, and a bus that was pickled, has a context of its own.
        """
        return self._commitbus_context

    def publish(self, event: SideEffectCall) -> None:
        """Add a side-effect call, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : SideEffectCall
            The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` is anything else. The bus is as it was.
        """
        if type(event) is not SideEffectCall:
            raise _messages.not_a_call(event)
        self._commitbus_pending.append(event)
        if self._commitbus_owner is not None:
            self._commitbus_register()

    def _apply_event(self, event: SideEffectCall, commit: bool) -> None:
        """Call the event, within the shared context.

        Parameters
        ----------
        event : SideEffectCall
            The call.
        commit : bool
            Passed to it as a keyword.

        Raises
        ------
        TypeError
            When it returns a coroutine, which is closed.
        """
        run = None
        try:
            if self._commitbus_context._run() is None:
                # Somebody called what collect() gave: that call is the outermost apply.
                run = Run(self._commitbus_context, commit)
                run.enter()
            if (result := event(commit=commit)) is not None:
                _notes.refuse_coroutine(event, result)
        except BaseException as error:
            if run is not None and run.leave(error):
                return
            raise
        else:
            if run is not None:
                # One line: that of a `try` alone, within another, is covered by no handler, and a tracer may raise.
                # fmt: off
                try: run.leave(None)  # noqa: E701
                # fmt: on
                except BaseException as error:
                    _notes.note_left(error, self)
                    raise
        finally:
            if run is not None:
                run.over = True

    def _commitbus_scope(self, commit: bool) -> Run:
        return Run(self._commitbus_context, commit)
