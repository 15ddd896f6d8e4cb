# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`MultiEventBus`: documented in `commitbus._pure.multi_event_bus`."""

cimport cython
from cpython.object cimport PyObject
from cpython.weakref cimport PyWeakref_NewRef

from commitbus._compiled.applying cimport apply_all, carry_out
from commitbus._compiled.batch cimport Handling, Progress, events_of
from commitbus._compiled.loops cimport check
from commitbus._compiled.delayed_event_bus cimport DelayedStore
from commitbus._compiled.event_bus cimport (
    APPLY_IS_OURS,
    IS_AWAITED,
    IS_PLAIN,
    PUBLISH_IS_OURS,
    EventStore,
    class_flags,
    is_covered,
    make,
)

from commitbus import _after_rollback, _messages
from commitbus._compiled.delayed_event_bus import DelayedEventBus
from commitbus._compiled.event_bus import EXTENSION_TYPES, AbstractEventBus
from commitbus._context import gathering, gathering_of
from commitbus._interfaces import EventBusOrchestrator, iterate
from commitbus._looking import events_to_apply
from commitbus._marks import refuse_open

# What stands for an argument that was not given.
cdef object MISSING = _messages.MISSING
# Covers the plain buses by a savepoint: of `cover`, which builds on this module.
cdef object COVER = None


cdef extern from "Python.h":
    # No checks of type or index; borrowed.
    PyObject* PyList_GET_ITEM(object list, Py_ssize_t index)
    Py_ssize_t PyList_GET_SIZE(object list)
    # Takes over the reference, and forgets the one that it replaces.
    void PyList_SET_ITEM(object list, Py_ssize_t index, PyObject* item)

cdef extern from *:
    """
    /* 3.12 and 3.13 count calls of C code, up to ten thousand, and not the stack that they take: more than one
       for each of the several functions that a nested multi bus takes. */
    #if PY_VERSION_HEX >= 0x030C0000 && PY_VERSION_HEX < 0x030E0000
    #define CALLS_PER_LEVEL 12
    #else
    #define CALLS_PER_LEVEL 1
    #endif
    static int enter_level(const char *where) {
        for (int i = 0; i < CALLS_PER_LEVEL; i++) {
            if (Py_EnterRecursiveCall(where)) {
                while (i--) Py_LeaveRecursiveCall();
                return 1;
            }
        }
        return 0;
    }
    static void leave_level(void) {
        for (int i = 0; i < CALLS_PER_LEVEL; i++) Py_LeaveRecursiveCall();
    }
    """
    # Returns 1 with an exception set when the stack is too deep.
    int enter_level(const char* where) except 1
    void leave_level()


def use_cover(function):
    """Have a function cover what is registered by a savepoint."""
    global COVER
    COVER = function


cdef class MultiStore(EventStore):
    # What is pending are DelayedStores, and nothing else.

    cdef bint is_multi(self) noexcept:
        return True

    @cython.binding(True)  # as `publish` in `EventStore`
    def wrap(self, event_bus):
        """Delay a bus and register it."""
        if not isinstance(event_bus, EventStore):
            raise _messages.not_wrappable(event_bus, isinstance(event_bus, DelayedStore))
        cdef DelayedStore delayed = make(DELAYED)
        delayed.enclose(event_bus)
        if class_flags(self) & PUBLISH_IS_OURS:
            self.append(delayed)
        else:
            self.publish(delayed)
        return delayed

    cdef int add(self, object event) except -1:
        if not isinstance(event, DelayedStore):
            raise _messages.not_delayed(event)
        (<DelayedStore>event).wrapped()
        owner = (<DelayedStore>event).owner
        try:
            # In this order: once it is there, another thread may apply it and let go of it: that must not be undone.
            (<DelayedStore>event).hold()
            self.append(event)
        except BaseException:
            if owner is not None:
                (<DelayedStore>event).let_go(owner)  # its next event registers it
            raise
        return 0

    cdef int add_all(self, object events) except -1:
        for event in iterate(events):
            self.add(event)
        return 0

    cdef object surrounded(self, object hook, bint* method, object stack):
        return hook  # the buses are not events

    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1:
        cdef bint ours = how.method and how.hook == <PyObject*>TAKE_TURN
        cdef object hook = <object>how.hook, commit = <object>how.commit
        cdef list out = <object>how.out
        cdef object ref = PyWeakref_NewRef(self, None)
        cdef object outer = None if ours else gathering.get()
        if how.method and not ours:
            hook = hook.__get__(self)
        enter_level(" while applying the buses of a MultiEventBus")
        try:
            self.begin(batch)
            while at.done < PyList_GET_SIZE(batch):
                delayed = <object>PyList_GET_ITEM(batch, at.done)
                if ours:
                    if self.turn(delayed, ref, commit, failures, out):
                        # The bus has put back what failed in it, and stays registered.
                        failures.positions.append(at.done)
                        at.done += 1
                        failures.again.add(at.done - 1)
                        return 1
                else:
                    if out is not None:
                        gathering.set((self, out))
                    check(hook, hook(delayed, commit))
                at.done += 1
        finally:
            leave_level()
            self.finish(batch)
            if not ours:
                gathering.set(outer)
        return 0

    cdef list items_from(self, Py_ssize_t position):
        """Copy what is registered from a position on."""
        cdef Py_ssize_t left = 0
        if self.left is not None:
            left = PyList_GET_SIZE(self.left) - self.head
        if position < left or self.pending is None:
            return self.items()[position:]
        return self.pending[position - left:]

    cdef int begin(self, list batch) except -1:
        """Note that a batch runs, for a savepoint that a handler opens."""
        cdef list made = None
        if self.running is not None:
            made = []
        with cython.critical_section(self):
            self.applied = True
            if self.running is None:
                self.running = batch
            else:
                if self.others is None:
                    self.others = [] if made is None else made
                self.others.append(batch)
        return 0

    cdef int finish(self, list batch) except -1:
        """Note that a batch does not run any more."""
        cdef Py_ssize_t i
        with cython.critical_section(self):
            if self.running is batch:
                self.running = None
            elif self.others is not None:
                for i in range(PyList_GET_SIZE(self.others)):
                    if PyList_GET_ITEM(self.others, i) == <PyObject*>batch:
                        del self.others[i]
                        break
        return 0

    cdef int turn(self, DelayedStore delayed, object ref, object commit, object failures, list out) except -1:
        cls = type(delayed)
        if (
            delayed.actual is not None
            and not class_flags(delayed.actual) & IS_PLAIN
            and _after_rollback.passes_by(delayed, delayed.actual, commit)
        ):
            discard(delayed, ref)
            return 0
        try:
            if cls is DELAYED or (
                cls.apply is DELAYED_APPLY and cls.apply_without_delay is DELAYED_APPLY_WITHOUT_DELAY
            ):
                return delayed.turn(ref, commit, None if failures is None else failures.inner(), out)
            else:
                apply_overridden(delayed, ref, commit, failures is not None, out)
        finally:
            delayed.after_turn()
        return 0

    cdef int put_back(self, list batch, Py_ssize_t head, Py_ssize_t begun) except -1:
        cdef Py_ssize_t i
        cdef list tried
        try:
            tried = list({id(delayed): delayed for delayed in batch[head:head + begun]}.values())
        except (MemoryError, RecursionError):
            EventStore.put_back(self, batch, head, begun)  # some are registered twice then, which is harmless
            raise
        if len(tried) < begun:  # two applies at once had the same bus: keep each once
            for i in range(head, head + begun):
                batch[i] = None
            head += begun - len(tried)
            for i in range(len(tried)):
                batch[head + i] = tried[i]
        # Forgotten first: as soon as they are put back, another thread may give them their turn, and let go of them.
        try:
            self.forget_again(tried)
        finally:
            EventStore.put_back(self, batch, head, begun)
        return 0

    cdef int forget_again(self, list tried) except -1:
        """Take the buses that were tried out of what is pending.

        Each has registered itself again when it put back its events, and is put back with the batch.
        """
        cdef DelayedStore delayed
        for delayed in tried:
            delayed.hold()
        with cython.critical_section(self):
            # Only here: what another thread has put back may be the last place where a bus is.
            if self.pending is not None:
                for delayed in tried:
                    delayed.failed = True
                drop_failed(self.pending)
                for delayed in tried:
                    delayed.failed = False
                if not self.pending:
                    self.pending = None
        return 0

    def publish(self, event):
        """Register a delayed bus: the next apply runs it."""
        self.add(event)

    @cython.embedsignature(False)
    def apply(self, commit=MISSING, *, robust=False, rounds=1):
        """Apply the registered buses in the order in which they were registered."""
        if commit is MISSING:
            raise _messages.missing_arguments("MultiEventBus.apply", "commit")
        if rounds != 1 or robust:
            return apply_all(self, self, commit, robust, rounds, gathering_of(self))
        return carry_out(self, self, commit, None, gathering_of(self))

    @cython.binding(True)
    def apply_and_get_applied_events(self, commit, *, robust=False, rounds=1):
        """Apply the registered buses, and return the events instead."""
        return self.gather(commit, robust, rounds)

    cdef list gather(self, object commit, object robust, object rounds):
        cdef list out = []
        if class_flags(self) & APPLY_IS_OURS:
            if rounds != 1 or robust:
                apply_all(self, self, commit, robust, rounds, out)
            else:
                carry_out(self, self, commit, None, out)
            return out
        outer = gathering.get()
        gathering.set((self, out))
        try:
            # It may know neither.
            self.apply(commit, **({"robust": True} if robust else {}), **({} if rounds == 1 else {"rounds": rounds}))
        finally:
            gathering.set(outer)
        return out

    # For the unit of work.

    def _commitbus_is_plain(self, bint awaited):
        """Whether all that is registered is applied after the commit, and no savepoint covers it.

        Where that is not `awaited`, nothing may have to be.
        """
        return self.is_plain(awaited)

    cdef bint is_plain(self, bint awaited) except -1:
        cdef Py_ssize_t i
        cdef int flags
        cdef DelayedStore delayed
        cdef EventStore actual
        cdef bint plain = not is_covered(self) and self.left is None
        with cython.critical_section(self):
            for i in range(0 if self.pending is None or not plain else PyList_GET_SIZE(self.pending)):
                delayed = <DelayedStore>PyList_GET_ITEM(self.pending, i)
                actual = delayed.actual
                if actual is None or is_covered(actual):
                    plain = False
                elif delayed.collected is not None and is_covered(delayed.collected):
                    plain = False
                else:
                    flags = class_flags(actual)
                    if not flags & IS_PLAIN or (flags & IS_AWAITED and not awaited):
                        plain = False
                if not plain:
                    break
        return plain

    def _commitbus_was_applied(self):
        """Whether it was applied at least once."""
        return self.applied

    # For `commitbus.aio`, whose loop is a coroutine.

    def _commitbus_begin(self, list buses):
        """Note that these buses have their turns, for a savepoint that a handler opens."""
        self.begin(buses)

    def _commitbus_end(self, list buses):
        """Note that they have them no more."""
        self.finish(buses)

    def _commitbus_take_turn(self, delayed, commit, failures, out):
        """Apply one bus; true where something failed in it, in a robust apply."""
        return bool(self.turn(delayed, PyWeakref_NewRef(self, None), commit, failures, out))

    def _commitbus_to_cover(self, savepoint):
        """Cover the plain buses that are registered by a savepoint, and give the others: they need marks.

        To be called in the lock of the savepoints.
        """
        return COVER(self, savepoint)

    def _commitbus_running(self):
        """Copy the batches of buses that applies have taken and not finished."""
        cdef list batches = []
        cdef list running = []
        with cython.critical_section(self):
            if self.running is not None:
                batches.append(self.running)
            if self.others is not None:
                batches.extend(self.others)
        for batch in batches:
            running.append(events_of(batch))
        return running

    def _commitbus_unregister(self, identities):
        """Take buses out of what is registered, each given by its identity."""
        with cython.critical_section(self):
            if self.left is not None:
                self.left = [one for one in self.left[self.head:] if id(one) not in identities] or None
                self.head = 0
            if self.pending is not None:
                self.pending = [one for one in self.pending if id(one) not in identities] or None

    def _commitbus_discard(self, delayed):
        """Let go of a bus that was registered, and drop all that is in it."""
        discard(delayed, PyWeakref_NewRef(self, None))

    @cython.binding(True)
    def apply_after_rollback(self, commit):
        """Apply what is for the case that the transaction was rolled back, and drop the rest."""
        refuse_open(self)
        _after_rollback.refuse_asynchronous(self)
        _after_rollback.drop_others(self)
        return _after_rollback.apply(self, commit)

    def events_to_apply(self):
        """Return the events that an apply would carry out now, flat, in that order."""
        return events_to_apply(self)

    def discard_pending_events(self):
        """Let go of the registered buses, and drop what is pending or collected in them."""
        cdef Py_ssize_t head = 0
        cdef Py_ssize_t i
        cdef list buses
        refuse_open(self)
        cdef list taken = self.take(&head)
        if taken is None:
            return []
        try:
            buses = taken[head:]
            ref = PyWeakref_NewRef(self, None)
            for i in range(len(buses)):
                discard(buses[i], ref)
                head += 1
        except BaseException:
            self.put_back(taken, head, 1)
            raise
        return buses

    def _apply_event(self, event, commit):
        """Collect what is pending in one delayed bus, and apply it without delay."""
        if not isinstance(event, DelayedStore):
            raise _messages.not_delayed(event)
        self.turn(event, PyWeakref_NewRef(self, None), commit, None, gathering_of(self))


cdef int drop_failed(list buses) except -1:
    """Drop those that are marked: in place, and without any memory or Python code."""
    cdef Py_ssize_t kept = 0
    cdef Py_ssize_t i
    cdef PyObject* item
    for i in range(PyList_GET_SIZE(buses)):
        item = PyList_GET_ITEM(buses, i)
        if not (<DelayedStore>item).failed:
            PyList_SET_ITEM(buses, i, PyList_GET_ITEM(buses, kept))
            PyList_SET_ITEM(buses, kept, item)
            kept += 1
    if kept < PyList_GET_SIZE(buses):
        try:
            del buses[kept:]
        except MemoryError:
            pass  # registered twice: the second turn finds nothing
    return 0


cdef int discard(DelayedStore delayed, object ref) except -1:
    """Let go of a bus, and drop all that is in it: from now on, an event registers it again."""
    delayed.wrapped()
    delayed.let_go(ref)
    try:
        if delayed.collected is not None:
            discard_buses(delayed.collected.discard_pending_events(), delayed.actual)
        delayed.discard_pending_events()
    finally:
        delayed.after_turn()
    return 0


cdef int discard_buses(list pairs, EventStore actual) except -1:
    """Drop what is in the buses that were collected from a multi bus."""
    if actual.is_multi():
        ref = PyWeakref_NewRef(actual, None)
        for event, _ in pairs:
            if isinstance(event, DelayedStore):
                discard(event, ref)
    return 0


cdef int apply_overridden(DelayedStore delayed, object ref, object commit, bint robust, list out) except -1:
    """Take the turn of a bus whose class overrides how it is applied; it may know no `robust`."""
    cdef EventStore actual = delayed.wrapped()
    outer = gathering.get()
    if out is not None and actual.is_multi():
        gathering.set((actual, out))
    try:
        delayed.apply(commit)
        delayed.let_go(ref)
        if robust:
            events = delayed.apply_without_delay(commit, robust=True)
        else:
            events = delayed.apply_without_delay(commit)
    finally:
        gathering.set(outer)
    if out is not None and not actual.is_multi():
        out.extend(events)
    return 0


EXTENSION_TYPES.add(MultiStore)
cdef object DELAYED = DelayedEventBus
cdef object DELAYED_APPLY = DelayedStore.apply
cdef object DELAYED_APPLY_WITHOUT_DELAY = DelayedStore.apply_without_delay
cdef object TAKE_TURN = MultiStore._apply_event


# The public class: a Python class, since an extension type cannot inherit from an abstract one


class MultiEventBus(MultiStore, AbstractEventBus[DelayedEventBus], EventBusOrchestrator):
    """Runs many buses at once: hand it out as an orchestrator, then apply it."""

    __module__ = "commitbus.multi_event_bus"
    _commitbus_multi = True

    @staticmethod
    def _commitbus_new():
        """Make one of this twin."""
        return MultiEventBus()
