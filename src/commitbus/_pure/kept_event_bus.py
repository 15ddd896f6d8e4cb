"""`KeptEventBus`: what was left of a bus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commitbus import _naming
from commitbus._interfaces import T
from commitbus._pure.applying import carry_out
from commitbus._pure.batch import event_of
from commitbus._pure.delayed_event_bus import DelayedEventBus
from commitbus._pure.loops import AGAIN

if TYPE_CHECKING:
    import weakref

    from commitbus._failures import Failures
    from commitbus._pure.event_bus import AbstractEventBus


class KeptEventBus(DelayedEventBus[T]):
    """What was left of a bus: applied as that bus applies it, which itself goes on with newer events.

    Parameters
    ----------
    actual_event_bus : AbstractEventBus
        The bus. A reference is kept.
    always : bool, default False
        Whether these events are applied whatever becomes of the transaction: they are for a rollback, and their
        savepoint was rolled back.
    """

    __module__ = "commitbus.delayed_event_bus"

    __slots__ = ()
    _commitbus_kept = True

    def __init__(self, actual_event_bus: AbstractEventBus[T], always: bool = False) -> None:
        super().__init__(actual_event_bus)
        self._commitbus_collected()
        if always:
            self._commitbus_always = True

    def pending_events(self) -> tuple[T, ...]:
        return ()

    def discard_pending_events(self) -> list[T]:
        return []

    def _commitbus_collect(self, commit: bool) -> list[T]:  # noqa: ARG002
        return []

    def _commitbus_turn(
        self,
        ref: weakref.ref[Any],
        commit: bool,
        failures: Failures | None,
        out: list[Any] | None,
    ) -> object:
        self._commitbus_let_go(ref)
        collected = self._commitbus_collected()
        applied = carry_out(collected, self, collected._commitbus_hook(), commit, failures, out)
        if out is not None:
            out.extend(map(event_of, applied))
        del applied  # as in the turn of any other
        return AGAIN if failures is not None and failures.positions else None

    def _commitbus_take_turn(self, ref: weakref.ref[Any], commit: bool, items: list[Any]) -> bool:  # noqa: ARG002
        self._commitbus_let_go(ref)
        collected = self._commitbus_collected()
        collected._commitbus_take_into(items)
        return collected._commitbus_mixed

    # The wrapped bus is registered by another: no event on it has anything to do with this one.

    def _commitbus_after_turn(self) -> None:
        if self._commitbus_collected()._commitbus_holds_any():
            self._commitbus_register()

    def _commitbus_let_go(self, owner: weakref.ref[Any]) -> None:
        self._commitbus_owner = owner

    def _commitbus_hold(self) -> None:
        self._commitbus_owner = None


_naming.see_bus_through(KeptEventBus, DelayedEventBus.actual_event_bus.__get__, alone=True)
