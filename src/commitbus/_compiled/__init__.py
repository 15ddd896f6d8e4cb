"""The compiled twin: its modules are built from ``ext/commitbus/_compiled``."""

# Its names are those of the pure twin, which type checkers read: `tests/test_twins.py` compares them.
# ruff: noqa: F401
# pyright: reportUnusedImport=false, reportMissingImports=false, reportUnknownVariableType=false, reportMissingModuleSource=false

from commitbus._compiled.side_effects import SideEffectCall, if_committed, version  # isort: skip (its absence says that nothing was built)
from commitbus import __version__ as _expected

if version not in ("", _expected):  # else what it lacks would fail somewhere, later
    raise ImportError(
        f"the compiled twin was built for commitbus {version}, and lies beside the Python files of {_expected}; "
        "install it again: pip install --force-reinstall commitbus"
    )
from commitbus._compiled.batch_event_bus import BatchEventBus
from commitbus._compiled.cover import cover_plain as cover_plain  # which multi buses need
from commitbus._compiled.delayed_event_bus import DelayedEventBus
from commitbus._compiled.delayed_event_bus import KeptEventBus as KeptEventBus  # pickles name it
from commitbus._compiled.event_bus import AbstractEventBus, BasicEventBus
from commitbus._compiled.event_bus import use_track as use_track  # for the tests of others
from commitbus._compiled.multi_event_bus import MultiEventBus
from commitbus._compiled.shared_side_effects import SharedSideEffectsEventBus
from commitbus._compiled.side_effects_bus import SideEffectsBus as SideEffectsBus  # pickles name it
from commitbus._compiled.unit_of_work import use_orchestrator_or_create_multi_event_bus
from commitbus._context import SharedSideEffectContext
from commitbus._interfaces import (
    CommittableFunction,
    EventBus,
    EventBusOrchestrator,
    NotCommittedError,
    PartlyApplied,
    UnappliedEventsWarning,
)
