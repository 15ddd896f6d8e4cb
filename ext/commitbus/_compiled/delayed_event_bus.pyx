# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`DelayedEventBus`: documented in `commitbus._pure.delayed_event_bus`."""

cimport cython
from cpython.object cimport PyObject
from cpython.weakref cimport PyWeakref_NewRef

from commitbus._compiled.applying cimport apply_all, carry_out
from commitbus._compiled.batch cimport Handling, Progress, Source, events_of, explicit
from commitbus._compiled.loops cimport look_up
from commitbus._compiled.event_bus cimport (
    PUBLISH_IS_OURS,
    EventStore,
    class_flags,
    collects_itself,
    collects_plainly,
    is_covered,
    make,
)
from commitbus._compiled.side_effects_bus cimport PairStore

from commitbus import _lock, _messages, _naming, _state
from commitbus._compiled.side_effects_bus import SideEffectsBus
from commitbus._context import gathering_of
from commitbus._interfaces import EventBus, T, iterate
from commitbus._looking import ClassSignature, Shown
from commitbus._collecting import Collecting
from commitbus._marks import begun_anew, check_open, collecting_by, covering
from commitbus.savepoint import Savepoint

# What stands for an argument that was not given.
cdef object MISSING = _messages.MISSING


cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject* instance)
    Py_ssize_t PyList_GET_SIZE(object list)
    # Where the first of the weak references to an instance is; NULL in it without any.
    PyObject** PyObject_GET_WEAKREFS_LISTPTR(PyObject* instance)

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #define WITH_GIL 0
    #else
    #define WITH_GIL 1
    #endif
    """
    bint WITH_GIL


cdef class DelayedStore(Source):
    def __init__(self, actual_event_bus=MISSING):
        """Wrap a bus."""
        if actual_event_bus is MISSING:
            raise _messages.missing_arguments("DelayedEventBus.__init__", "actual_event_bus")
        # Every AbstractEventBus is one, and this check takes no time.
        if not isinstance(actual_event_bus, EventStore):
            raise _messages.not_a_bus(actual_event_bus)
        if self.actual is not None and is_covered(self.actual) and covering(self.actual, self):
            check_open(self.actual)
        if self.collected is not None and self.collected.items():
            raise _messages.still_collected(self)
        self.hold()
        self.enclose(actual_event_bus)
        if self.collected is not None:
            # Kept, since a handler may call this while what was collected is being applied.
            self.collected.wraps = actual_event_bus

    cdef int enclose(self, EventStore actual) except -1:
        self.direct = class_flags(actual) & PUBLISH_IS_OURS
        self.actual = actual
        return 0

    cdef EventStore wrapped(self):
        """Give the wrapped bus: a reference of the caller's own, since a handler may call __init__ again."""
        if self.actual is None:
            raise _messages.not_wrapping()
        return self.actual

    @property
    def actual_event_bus(self):
        """The wrapped bus."""
        actual = self.wrapped()
        if self.owner is not None and not self.linked:
            self.link()  # from now on somebody may publish on it directly
        return actual

    @property
    def side_effects_bus(self):
        """The bus of the pairs that were collected, each an event and the callable that applies it."""
        return self.collecting()

    @cython.binding(True)  # as in `EventStore`
    def publish(self, event):
        """Publish on the wrapped bus."""
        cdef EventStore actual = self.actual
        if actual is None:
            raise _messages.not_wrapping()
        if self.direct:
            actual.add(event)
        else:
            actual.publish(event)
        # After the event was added: a multi bus lets go of this one before it takes the events.
        if self.owner is not None:
            self.register()

    def publish_all(self, events):
        """Publish one by one on the wrapped bus."""
        if type(self).publish is not DELAYED_PUBLISH:
            publish = self.publish
            for event in iterate(events):
                publish(event)
            return
        try:
            self.wrapped().publish_all(events)
        finally:
            if self.owner is not None:
                self.register()

    @cython.embedsignature(False)
    def apply(self, commit=MISSING):
        """Collect what is pending in the wrapped bus; nothing is carried out."""
        if commit is MISSING:
            raise _messages.missing_arguments("DelayedEventBus.apply", "commit")
        return self.collect(commit)

    @cython.embedsignature(False)
    def apply_without_delay(self, commit=MISSING, *, robust=False, rounds=1):
        """Carry out what ``apply`` collected so far, in order."""
        if commit is MISSING:
            raise _messages.missing_arguments("DelayedEventBus.apply_without_delay", "commit")
        cdef EventStore actual = self.wrapped()
        cdef PairStore store = self.collected
        cdef list applied
        if rounds != 1:
            return events_of(apply_all(self.collecting(), self, commit, robust, rounds, gathering_of(actual)))
        if store is None:
            if is_covered(actual) and covering(actual, self):
                check_open(actual)
            return []
        if robust:
            applied = apply_all(store, self, commit, robust, rounds, gathering_of(actual))
        else:
            applied = carry_out(store, self, commit, None, gathering_of(actual))
        return events_of(applied) if store.mixed else applied

    def savepoint(self):
        """Begin a block whose events are dropped when it is left by an exception, collected or not."""
        self.wrapped()
        return Savepoint(self)

    def pending_events(self):
        """Return what is pending in the wrapped bus."""
        return self.wrapped().pending_events()

    def discard_pending_events(self):
        """Drop what is pending in the wrapped bus."""
        return self.wrapped().discard_pending_events()

    def collected_events(self):
        """Return what was collected and not yet applied."""
        self.wrapped()
        cdef PairStore store = self.collected
        return () if store is None else tuple(events_of(store.items()))

    def _commitbus_parts(self):
        """Give the wrapped bus, and that of what was collected, or None."""
        return self.wrapped(), self.collected

    def _commitbus_get(self):
        cdef EventStore actual = self.wrapped()
        cdef PairStore store = self.collected
        cdef tuple kept = (actual, [], {}) if store is None else store._commitbus_get()
        with cython.critical_section(self):
            owner = self.owner
        return kept + (None if owner is None else owner(),)

    def _commitbus_set(self, kept):
        DelayedStore.__init__(self, kept[0])
        if kept[1]:
            self.collecting()._commitbus_set(kept[:3])
        if kept[3] is not None:
            self.owner = PyWeakref_NewRef(kept[3], None)
            self.link()

    cdef PairStore collecting(self):
        cdef PairStore made
        cdef EventStore actual = self.wrapped()
        if self.collected is None:
            made = make(SIDE_EFFECTS)
            made.wraps = actual
            made.collector = PyWeakref_NewRef(self, None)
            if not is_covered(actual):
                self.keep_first(made)
            # Looked at after it was kept: else a savepoint that is opened meanwhile would not see it.
            if is_covered(actual):
                with _lock.lock:
                    made.marks = covering(actual, self)
                    self.keep_first(made)
        return self.collected

    cdef int keep_first(self, PairStore made) except -1:
        with cython.critical_section(self):
            if self.collected is None:
                self.collected = made
        return 0

    cdef list collect(self, object commit):
        cdef EventStore actual = self.wrapped()
        # Made before anything is taken: it needs memory.
        cdef PairStore store = self.collecting()
        cdef Py_ssize_t head = 0
        cdef list items, events, copied
        cdef bint stored = False
        if collects_itself(actual):
            return self.collect_overridden(commit)
        if not collects_plainly(actual) or is_covered(actual):
            return self.collect_with_care(commit)
        with cython.critical_section(actual):
            if not is_covered(actual):
                items = actual.remove(&head)
                stored = True
        if not stored:  # another thread has opened a savepoint meanwhile
            return self.collect_with_care(commit)
        if items is None:
            return []
        try:
            copied = items[head:]
            events = items if head == 0 else items[head:]
            with cython.critical_section(actual):
                stored = not is_covered(actual)
                if stored:
                    store.extend(events)
            if not stored:  # opened since: what was taken is older
                copied = self.store(Collecting(actual, self, taken=True), events, None)
        except BaseException:
            actual.put_back(items, head, 0)
            raise
        store.register()
        return copied

    cdef list collect_with_care(self, object commit):
        """Collect by a hook, or while a savepoint is open, whose marks say what of it is older than they are."""
        cdef EventStore actual = self.wrapped()
        cdef PairStore store = self.collecting()
        cdef Py_ssize_t head = 0
        cdef bint method = False
        cdef bint plainly = collects_plainly(actual)
        cdef list events, copied, items = None, pairs = []
        hook = None if plainly else look_up(actual, "_collect_event", &method)
        collecting = None
        try:
            with _lock.lock:  # no savepoint is opened meanwhile, or rolled back
                if is_covered(actual):
                    collecting = Collecting(actual, self)
                    items = actual.take_within(&head, begun_anew(actual))
                else:
                    items = actual.take(&head)
                if plainly and items is not None:
                    copied = self.store(collecting or Collecting(actual, self, taken=True), items[head:], None)
            if items is None:
                return []
            if not plainly:
                actual.pair_up(items if head == 0 else items[head:], hook, method, commit, pairs)
                events = []
                for pair in pairs:
                    events.append(explicit(pair))
                store.mixed = True
                copied = self.store(collecting or Collecting(actual, self, taken=True), events, None)
        except BaseException as error:
            if items is not None:
                actual.uncollected(items, head, items[head:] if plainly else pairs, error)
                if collecting is not None:
                    with _lock.lock:
                        collecting.fail()
            raise
        if copied:
            store.register()
        return events_of(copied)

    cdef list store(self, object collecting, list items, list events):
        """Add items to what was collected, but for what was rolled back meanwhile, and give them.

        Nothing raises once they are added.
        """
        cdef EventStore actual = self.actual
        cdef PairStore store = self.collected
        cdef list copied
        with _lock.lock:
            place = None
            while place != store._commitbus_mark()[0]:  # Python code ran meanwhile
                place = store._commitbus_mark()[0]
                keep, marks = collecting.end(place, PyList_GET_SIZE(items), events)
            if PyList_GET_SIZE(keep) < PyList_GET_SIZE(items):
                items = list(map(items.__getitem__, keep))
            copied = list(items)
            if copied:
                store.extend(items)
            actual.marks = marks
        return copied

    cdef list collect_overridden(self, object commit):
        """Collect by what the wrapped bus's class has in the place of `collect`."""
        cdef EventStore actual = self.wrapped()
        cdef PairStore store = self.collecting()
        cdef list pairs, copied, events = [], items = []
        with _lock.lock:
            collecting = Collecting(actual, self)
            collecting.look()
        try:
            with collecting_by(actual):
                pairs = list(actual.collect(commit))
        except BaseException:
            with _lock.lock:
                collecting.fail()
            raise
        store.mixed = True
        for event, function in pairs:
            events.append(event)
            items.append(explicit((event, function)))
        copied = self.store(collecting, items, events)
        if copied:
            store.register()
        return events_of(copied)

    # A turn in a multi bus: it takes from the wrapped bus, and puts back into what was collected.

    cdef object hook(self, bint* method):
        return self.wrapped().hook(method)

    cdef object surrounded(self, object hook, bint* method, object stack):
        cdef EventStore actual = self.actual
        return actual.surrounded(hook, method, stack)

    cdef list take(self, Py_ssize_t* head):
        return self.actual.take(head)

    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1:
        cdef EventStore actual = self.actual
        return actual.run(how, batch, at, failures)

    cdef object scope(self, object commit):
        cdef EventStore actual = self.actual
        return actual.scope(commit)

    cdef int put_back(self, list batch, Py_ssize_t head, Py_ssize_t begun) except -1:
        cdef PairStore store
        try:
            store = self.collecting()
        except (MemoryError, RecursionError):
            # They are pending again instead of collected.
            return self.actual.put_back(batch, head, begun)
        return store.put_back(batch, head, begun)

    cdef int turn(self, object ref, object commit, object failures, list out) except -1:
        """Collect what is pending, and carry it out, let go of by the multi bus to which `ref` refers."""
        if self.actual is None:
            raise _messages.not_wrapping()
        # No reference of its own: `let_go` sees by their number whether anybody else has the wrapped bus.
        cdef bint multi = self.actual.is_multi()
        cdef PairStore store
        cdef list applied
        if is_covered(self.actual):
            check_open(self.actual)
        if self.collected is None and collects_plainly(self.actual):
            # The direct path: nobody can have seen what was never collected. From now on an event registers
            # this bus again; what is pending is taken after that.
            self.let_go(ref)
            applied = carry_out(self, self, commit, failures, out)
        else:
            self.hold()  # where it has another turn, too: what it collects here registers nothing
            self.collect(commit)
            self.let_go(ref)
            store = self.collecting()
            applied = carry_out(store, self, commit, failures, out)
            if store.mixed:
                applied = events_of(applied)
        if out is not None and not multi:
            out.extend(applied)
        return failures is not None and len(failures.positions) > 0

    cdef list take_turn(self, object ref, object commit, Py_ssize_t* head, bint* mixed):
        """Take what is to be applied in a turn that is awaited; sets `mixed` where there may be pairs.

        What is left of it is put back here.
        """
        cdef list taken
        # As in `turn`.
        if is_covered(self.actual):
            check_open(self.actual)
        mixed[0] = False
        if self.collected is None and collects_plainly(self.actual):
            self.let_go(ref)
            return self.actual.take(head)
        self.hold()
        self.collect(commit)
        self.let_go(ref)
        taken = self.collecting().take(head)
        mixed[0] = self.collected.mixed  # only now: another thread may have added a pair before
        return taken

    # Registering again

    def _commitbus_remember(self, owner):
        """Have the next event here register this bus with `owner`; the wrapped bus is registered by another."""
        with cython.critical_section(self):
            self.owner = owner
            self.linked = True

    def _commitbus_let_go(self, owner):
        """Have the next event, here or on the wrapped bus, register this bus with `owner`, a multi bus."""
        self.let_go(owner)
        self.link()

    cdef int let_go(self, object owner) except -1:
        """Have the next event register this bus with `owner`, a weak reference to a multi bus."""
        with cython.critical_section(self):
            self.owner = owner
            self.linked = False
        # Mostly nobody else has the wrapped bus: the weak reference that this takes can be saved, which is a twentieth
        # of a request for three buses.
        if self.is_shared() or self.actual.owner is not None:
            self.link()
        return 0

    cdef bint is_shared(self) noexcept:
        """Whether anybody else has the wrapped bus, and may publish on it directly."""
        cdef PyObject* actual = <PyObject*>self.actual
        return not WITH_GIL or Py_REFCNT(actual) > 1 or PyObject_GET_WEAKREFS_LISTPTR(actual)[0] is not NULL

    cdef int after_turn(self) except -1:
        """See to what came onto this bus while its turn began, or may come onto the wrapped bus itself."""
        if self.owner is None or self.actual is None:
            return 0
        if self.actual.holds_any() or (self.collected is not None and self.collected.holds_any()):
            self.register()
        elif not self.linked and (self.is_shared() or self.actual.is_multi()):
            self.link()
        return 0

    cdef int link(self) except -1:
        cdef EventStore actual = self.actual
        wrapper = PyWeakref_NewRef(self, None)
        with cython.critical_section(self):
            owner = self.owner
            self.linked = True
        with cython.critical_section(actual):
            actual.owner = owner
            actual.wrapper = wrapper
        return 0

    cdef int hold(self) except -1:
        """Note that this bus is registered: the next event need not do it."""
        cdef EventStore actual = self.actual
        with cython.critical_section(self):
            self.owner = None
        if actual is not None and actual.owner is not None:
            with cython.critical_section(actual):
                wrapper = actual.wrapper
            if wrapper is not None and wrapper() is self:
                with cython.critical_section(actual):
                    if actual.wrapper is wrapper:
                        actual.owner = actual.wrapper = None
        return 0

    cdef int register(self) except -1:
        """Register with the multi bus that let go of this bus last, if that is still there."""
        with cython.critical_section(self):
            owner = self.owner
            self.owner = None
        multi = None if owner is None else owner()
        if multi is not None:
            try:
                multi.publish(self)
            except BaseException:
                with cython.critical_section(self):
                    if self.owner is None:  # an interrupt: the next event tries again
                        self.owner = owner
                raise
        return 0


cdef class KeptStore(DelayedStore):
    cdef bint differs  # as in `CallableStore`

    cdef list collect(self, object commit):
        return []

    cdef int turn(self, object ref, object commit, object failures, list out) except -1:
        cdef PairStore store = self.collecting()
        cdef list applied
        self.let_go(ref)
        applied = carry_out(store, self, commit, failures, out)
        if out is not None:
            out.extend(events_of(applied) if store.mixed else applied)
        return failures is not None and len(failures.positions) > 0

    cdef list take_turn(self, object ref, object commit, Py_ssize_t* head, bint* mixed):
        cdef list taken
        self.let_go(ref)
        taken = self.collecting().take(head)
        mixed[0] = self.collected.mixed
        return taken

    # The wrapped bus is registered by another: no event on it has anything to do with this one.

    cdef int after_turn(self) except -1:
        if self.owner is not None and self.collecting().holds_any():
            self.register()
        return 0

    cdef int let_go(self, object owner) except -1:
        with cython.critical_section(self):
            self.owner = owner
            self.linked = True
        return 0

    cdef int link(self) except -1:
        return 0

    cdef int hold(self) except -1:
        with cython.critical_section(self):
            self.owner = None
        return 0


cdef object DELAYED_PUBLISH = DelayedStore.publish


# The public class: a Python class, since an extension type cannot inherit from an abstract one


class DelayedEventBus(DelayedStore, Shown, _state.Stateful, EventBus[T]):
    """A bus whose ``apply`` carries nothing out: it only collects, until `apply_without_delay`."""

    __module__ = "commitbus.delayed_event_bus"
    __signature__ = ClassSignature("actual_event_bus")
    _commitbus_delayed = True
    _commitbus_kept = False
    _commitbus_always = False

    def _commitbus_keeper(self, always):
        """Make a bus that keeps what is left of this one."""
        return KeptEventBus(self.actual_event_bus, always)


class KeptEventBus(KeptStore, DelayedEventBus[T]):
    """What was left of a bus: applied as that bus applies it, which itself goes on with newer events."""

    __module__ = "commitbus.delayed_event_bus"
    _commitbus_kept = True

    def __init__(self, actual_event_bus, always=False):
        DelayedEventBus.__init__(self, actual_event_bus)
        self.side_effects_bus  # made here
        if always:
            self._commitbus_always = True

    def pending_events(self):
        return ()

    def discard_pending_events(self):
        return []


cdef object SIDE_EFFECTS = SideEffectsBus
_naming.see_bus_through(DelayedEventBus, DelayedEventBus.actual_event_bus.__get__)
_naming.see_bus_through(KeptEventBus, DelayedEventBus.actual_event_bus.__get__, alone=True)
