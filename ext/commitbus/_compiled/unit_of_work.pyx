# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""The unit of work: documented in `commitbus._pure.unit_of_work`."""

cimport cython
from cpython.contextvars cimport PyContextVar_Reset, PyContextVar_Set
from cpython.object cimport PyObject

from commitbus._compiled.event_bus cimport make
from commitbus._compiled.multi_event_bus cimport MultiStore

from types import FunctionType

from commitbus import _lock, _messages, _notes, _outer
from commitbus._commit import watch
from commitbus._compiled.multi_event_bus import MultiEventBus
from commitbus._context import committed as _committed
from commitbus._interfaces import EventBusOrchestrator
from commitbus._marks import numbers
from commitbus._rounds import check_rounds
from commitbus._transactions import see_errors_of
from commitbus._unit_end import Rest
from commitbus._unit_of_work import Yielded, check_callbacks

# What stands for an argument that was not given.
cdef object MISSING = _messages.MISSING


cdef extern from "Python.h":
    ctypedef struct PyTypeObject
    ctypedef object (*newfunc)(PyTypeObject*, object, PyObject*)
    ctypedef struct PyTypeObject:
        # Returns a new reference, or NULL with an exception set.
        newfunc tp_new


cdef object MULTI = MultiEventBus
cdef object COMMITTED = _committed
cdef object FUNCTION = FunctionType
cdef list LOOKS = _outer.looks
# Give numbers, each larger than those before: of savepoints, and of where a unit of work began.
cdef object NUMBERS = numbers


cdef object yielded(object orchestrator, object execute):
    """Make the pair, without the look-ups of a call of its class."""
    return (<PyTypeObject*>Yielded).tp_new(<PyTypeObject*>Yielded, ((orchestrator, execute),), NULL)


cdef class UnitStore:
    # As in `commitbus._unit_of_work`.
    cdef public MultiStore buses
    cdef public object commit, commit_transaction, rollback_transaction, on_unapplied, robust, rounds
    cdef public object begun, kept, doubted, aside, ended_by
    cdef public bint called, committed, rolled_back, failed, applying, undone
    cdef public object forks

    def __enter__(self):
        return yielded(self.buses, self.commit_and_execute_side_effects)

    def __exit__(self, kind, error, traceback):
        # Mostly all was committed and applied, and there is nothing to see to.
        if (
            error is not None
            or not self.called
            or self.committed
            or self.doubted is not None
            or self.buses.holds_any()
        ):
            self.leave(error)

    def commit_and_execute_side_effects(self):
        """Commit, apply, and return the events that were applied."""
        cdef bint plainly, committing = False
        cdef list applied, stored = None
        if self.applying or self.failed or self.forks is not _lock.forks:
            self.refuse_call()
            # A handler calls it again, and there is nothing to commit.
            return self.buses.gather(self.commit, self.robust, self.rounds)
        if self.doubted is not None:
            self.begin_anew()
        plainly = self.buses.is_plain(False)
        if not plainly:
            self.refuse()
        if self.commit_transaction is None and self.commit and LOOKS:
            _outer.look(self.buses)
        self.called = True
        self.rolled_back = False
        if self.commit and not self.committed:
            commit = None
            try:
                commit_transaction = self.commit_transaction
                if not plainly:
                    stored, commit_transaction = self.store()
                if commit_transaction is not None:
                    if type(self.commit_transaction) is not FUNCTION or (
                        self.rollback_transaction is not None and type(self.rollback_transaction) is not FUNCTION
                    ):  # else nobody knows whose it is
                        commit = watch(self.commit_transaction, self.rollback_transaction)
                    committing = True
                    result = commit_transaction()
                    committing = False
                    self.committed = True
                    if result is not None or commit is not None:
                        self.see(result, commit)
            except BaseException as error:
                self.fail(error, committing, commit)
                raise
            self.committed = True
        token = PyContextVar_Set(COMMITTED, self.commit)
        try:
            self.applying = True
            if not plainly:
                self.set_apart()
            applied = self.buses.gather(self.commit, self.robust, self.rounds)
        except BaseException as error:
            stored = None  # the traceback keeps this frame, and must keep no event
            if not self.commit:
                self.roll_back(error)
            _notes.drop_own_frames(error)
            raise error  # and not only `raise`, which would bring back the frames that were dropped
        finally:
            self.applying = False
            PyContextVar_Reset(COMMITTED, token)
        self.committed = False
        if self.kept or self.buses.holds_any():
            self.end_commit()
        if not self.commit:
            applied += self.end_dry_run()
        return stored + applied if stored else applied


class Unit(UnitStore, Rest):
    """One unit of work: its buses, and how far it came. The block of a ``with`` statement."""

    __slots__ = ()


cdef object UNIT = Unit


@cython.final
cdef class Given:
    """The block of a callee: its caller commits and applies."""

    cdef object orchestrator

    def __enter__(self):
        return yielded(self.orchestrator, list)

    def __exit__(self, kind, error, traceback):
        pass


cdef bint is_callback(object function):
    return function is None or callable(function)


@cython.embedsignature(False)
def use_orchestrator_or_create_multi_event_bus(
    event_bus_orchestrator=MISSING,
    commit=MISSING,
    *,
    commit_transaction=None,
    rollback_transaction=None,
    robust=False,
    rounds=1,
    on_unapplied=None,
):
    """Run in the caller's unit of work or, without one, in a new one."""
    cdef UnitStore unit
    cdef Given given
    if commit is MISSING:
        both = ("event_bus_orchestrator",) if event_bus_orchestrator is MISSING else ()
        raise _messages.missing_arguments("use_orchestrator_or_create_multi_event_bus", *both, "commit")
    if not (is_callback(commit_transaction) and is_callback(rollback_transaction) and is_callback(on_unapplied)):
        check_callbacks(commit_transaction, rollback_transaction, on_unapplied)
    if type(rounds) is not int or rounds < 1:
        check_rounds(rounds)
    if event_bus_orchestrator is not None:
        if type(event_bus_orchestrator) is not MULTI and not isinstance(event_bus_orchestrator, EventBusOrchestrator):
            raise _messages.not_an_orchestrator(event_bus_orchestrator)
        given = Given.__new__(Given)
        given.orchestrator = event_bus_orchestrator
        return given
    if commit_transaction is not None and type(commit_transaction) is not FUNCTION:
        see_errors_of(commit_transaction)
    unit = make(UNIT)
    unit.buses = make(MULTI)
    unit.commit = commit
    unit.commit_transaction = commit_transaction
    unit.rollback_transaction = rollback_transaction
    unit.on_unapplied = on_unapplied
    unit.robust = robust
    unit.rounds = rounds
    unit.begun = next(NUMBERS)
    unit.kept = ()
    unit.forks = _lock.forks
    return unit


use_orchestrator_or_create_multi_event_bus.__module__ = "commitbus.multi_event_bus"
