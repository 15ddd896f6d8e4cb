"""The errors and notes that several integrations have."""

from __future__ import annotations

from commitbus._naming import describe_bus, type_name
from commitbus._notes import add_note, were


def not_an_app(bus: object, app: object) -> TypeError:
    """Refuse what is no app of a task queue."""
    return TypeError(f"{type_name(type(bus))}() takes the app first, not {type_name(type(app))}")


def not_installed(extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Say what to install for an integration."""
    return ModuleNotFoundError(
        f"commitbus.integrations.{extra} needs a module that is not installed, {error.name}; "
        f"install it with: pip install 'commitbus[{extra}]'",
        name=error.name,
    )


def note_not_applied_after_rollback(error: BaseException, count: int, where: str) -> None:
    """Say where what is for a rollback is, and was not applied after it."""
    add_note(error, f"the transaction was rolled back, and for that case {were(count)} not applied: see {where}")


def left_and_doubted(what: str, left: int, doubted: int, leftovers: str, in_doubt: str) -> tuple[str, str]:
    said: list[str] = []
    if left:
        said.append(f"{were(left)} not applied after a transaction of this {what}")
    if doubted:
        said.append(
            f"{were(doubted)} not applied after a commit, of which nobody knows whether it was one, of this {what}"
        )
    return ", and ".join(said), " and ".join([leftovers] * bool(left) + [in_doubt] * bool(doubted))


def applied_by_the_transaction(bus: object) -> TypeError:
    """Refuse to apply by hand what a transaction applies."""
    return TypeError(
        f"{describe_bus(bus)} is applied by the transaction's commit; to apply by hand, publish on a bus of your own; "
        "for a dry run, roll the transaction back"
    )


def left_is_applied(function: str) -> TypeError:
    """Refuse to drop what is known to be committed."""
    return TypeError(
        f"{function} is for what nobody knows to be committed; what is left is to be applied: call apply(True), or "
        "discard_pending_events()"
    )
