# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`DelayedEventBus` and its `side_effects_bus`: documented in `commitbus._pure.delayed_event_bus`."""

cimport cython
from cpython.object cimport PyObject
from cpython.weakref cimport PyWeakref_NewRef

from commitbus._compiled.batch cimport (
    Pair,
    Source,
    call_event,
    carry_out,
    check,
    events_of,
    explicit,
    look_up,
)
from commitbus._compiled.event_bus cimport (
    PUBLISH_IS_OURS,
    EventStore,
    class_flags,
    collected,
    collects_plainly,
    make,
)

from commitbus import _messages, _naming, _state
from commitbus._compiled.event_bus import EXTENSION_TYPES, AbstractEventBus
from commitbus._context import gathering, gathering_of
from commitbus._interfaces import EventBus, T, iterate


cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject* instance)
    # No checks of type or index; borrowed.
    PyObject* PyList_GET_ITEM(object list, Py_ssize_t index)
    Py_ssize_t PyList_GET_SIZE(object list)

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #define WITH_GIL 0
    #else
    #define WITH_GIL 1
    #endif
    """
    bint WITH_GIL


# What was collected


cdef class PairStore(EventStore):
    # `pending` and `left` have the bare events of the bus that is wrapped, and other pairs in a Pair.

    cdef EventStore wrapped(self):
        if self.wraps is None:
            raise _messages.no_collector()
        return self.wraps

    cdef int add(self, object event) except -1:
        if not (type(event) is tuple and len(event) == 2 and callable(event[1])):
            raise _messages.not_a_pair(event)
        self.mixed = True
        return self.append(explicit(event))

    cdef int add_all(self, object events) except -1:
        for event in iterate(events):
            self.add(event)
        return 0

    cdef int register(self) except -1:
        EventStore.register(self)
        delayed = None if self.collector is None else self.collector()
        if delayed is not None:
            (<DelayedStore>delayed).register()
        return 0

    cdef int put_back(self, list batch, Py_ssize_t head, Py_ssize_t begun) except -1:
        cdef list tried
        if not self.wraps.is_multi():
            return EventStore.put_back(self, batch, head, begun)
        tried = [event for event in events_of(batch[head:head + begun]) if isinstance(event, DelayedStore)]
        EventStore.put_back(self, batch, head, begun)
        return self.wraps.forget_again(tried, None, 0)

    cdef tuple pair_of(self, object item):
        return (<Pair>item).pair if type(item) is Pair else (item, collected(self.wraps, item))

    cdef list look(self, list items):
        return [self.pair_of(item) for item in items]

    cdef bint keeps_events(self) noexcept:
        return False

    cdef object scope(self, object commit):
        return self.wrapped().scope(commit)

    cdef object hook(self, bint* method):
        """Give the hook of the wrapped bus or, in a tuple, one that somebody has set on this bus."""
        hook = look_up(self, "_apply_event", method)
        return self.wrapped().hook(method) if method[0] and hook is CALL_PAIR else (self._apply_event,)

    cdef int run(
        self, object hook, bint method, list batch, Py_ssize_t* done, object commit, object failures, list out
    ) except -1:
        cdef EventStore wraps = self.wraps
        own = hook[0] if type(hook) is tuple else None
        if own is None and not self.mixed:
            return wraps.run(hook, method, batch, done, commit, failures, out)
        outer = gathering.get()
        if out is not None and wraps.is_multi():
            gathering.set((wraps, out))
        try:
            while done[0] < PyList_GET_SIZE(batch):
                pair = self.pair_of(<object>PyList_GET_ITEM(batch, done[0]))
                if own is None:
                    call_event(pair[1], commit)
                else:
                    check(own, own(pair, commit))
                if out is not None and wraps.is_multi() and not isinstance(pair[0], DelayedStore):
                    out.append(pair[0])
                done[0] += 1
        finally:
            gathering.set(outer)
        return 0

    def publish(self, event):
        """Add a pair, in constant time; nothing happens to it until it is applied."""
        self.add(event)

    def apply(self, commit, *, robust=False):
        """Apply the collected events in the order in which they were collected."""
        failures = _messages.Failures() if robust else None
        applied = carry_out(self, self, commit, failures, None)
        if failures is not None and failures.errors:
            raise failures.end(self)
        return self.look(applied)

    def _apply_event(self, event, commit):
        """Call the callable of a pair."""
        call_event(event[1], commit)

    def _commitbus_get(self):
        cdef list items = self.items()
        pairs = {i: (<Pair>item).pair for i, item in enumerate(items) if type(item) is Pair}
        return self.wrapped(), events_of(items), pairs

    def _commitbus_set(self, kept):
        self.wraps, items, pairs = kept
        self.mixed = bool(pairs)
        for i, item in enumerate(items):
            self.append(explicit(pairs[i]) if i in pairs else item)


# The delayed bus


cdef class DelayedStore(Source):
    def __init__(self, actual_event_bus):
        """Wrap a bus."""
        # Every AbstractEventBus is one, and this check takes no time.
        if not isinstance(actual_event_bus, EventStore):
            raise _messages.not_a_bus(actual_event_bus)
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
        if self.owner is not None:
            self.link()  # from now on somebody may publish on it directly
        return actual

    @property
    def side_effects_bus(self):
        """The bus of the pairs that were collected, each an event and the callable that applies it."""
        return self.collecting()

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

    def apply(self, commit):
        """Collect what is pending in the wrapped bus; nothing is carried out."""
        return self.collect(commit)

    def apply_without_delay(self, commit, *, robust=False):
        """Carry out what ``apply`` collected so far, in order."""
        failures = _messages.Failures() if robust else None
        self.wrapped()
        cdef PairStore store = self.collected
        if store is None:
            return []
        cdef list applied = carry_out(store, self, commit, failures, gathering_of(self.actual))
        if failures is not None and failures.errors:
            raise failures.end(self)
        return events_of(applied) if store.mixed else applied

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

    def _commitbus_get(self):
        cdef EventStore actual = self.wrapped()
        cdef PairStore store = self.collected
        kept = (actual, [], {}) if store is None else store._commitbus_get()
        return (*kept, None if self.owner is None else self.owner())

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
            with cython.critical_section(self):
                if self.collected is None:
                    self.collected = made
        return self.collected

    cdef list collect(self, object commit):
        cdef EventStore actual = self.wrapped()
        # Made before anything is taken: it needs memory.
        cdef PairStore store = self.collecting()
        cdef Py_ssize_t head = 0
        cdef list events, copied
        if collects_plainly(actual):
            events = actual.take(&head)
            if events is None:
                return []
            try:
                copied = events[head:]
                store.append_all(events if head == 0 else events[head:])
            except MemoryError:
                actual.put_back(events, head, 0)
                raise
            return copied
        pairs = actual.collect(commit)
        events = [explicit((event, function)) for event, function in pairs]
        if events:
            copied = events_of(events)
            store.mixed = True
            store.append_all(events)
            return copied
        return events

    # A turn in a multi bus: it takes from the wrapped bus, and puts back into what was collected.

    cdef object hook(self, bint* method):
        return self.wrapped().hook(method)

    cdef list take(self, Py_ssize_t* head):
        return self.actual.take(head)

    cdef int run(
        self, object hook, bint method, list batch, Py_ssize_t* done, object commit, object failures, list out
    ) except -1:
        cdef EventStore actual = self.actual
        return actual.run(hook, method, batch, done, commit, failures, out)

    cdef object scope(self, object commit):
        cdef EventStore actual = self.actual
        return actual.scope(commit)

    cdef int put_back(self, list batch, Py_ssize_t head, Py_ssize_t begun) except -1:
        cdef PairStore store
        try:
            store = self.collecting()
        except MemoryError:
            # They are pending again instead of collected.
            return self.actual.put_back(batch, head, begun)
        return store.put_back(batch, head, begun)

    cdef int turn(self, object ref, object commit, object failures, list out) except -1:
        """Collect what is pending, and carry it out, let go of by the multi bus to which `ref` refers."""
        cdef EventStore actual = self.wrapped()
        cdef PairStore store
        cdef list applied
        if self.collected is None and collects_plainly(actual):
            # The direct path: nobody can have seen what was never collected. From now on an event registers
            # this bus again; what is pending is taken after that.
            self.let_go(ref)
            applied = carry_out(self, self, commit, failures, out)
        else:
            self.collect(commit)
            self.let_go(ref)
            store = self.collecting()
            applied = carry_out(store, self, commit, failures, out)
            if store.mixed:
                applied = events_of(applied)
        if out is not None and not actual.is_multi():
            out.extend(applied)
        return 0

    # Registering again

    cdef int let_go(self, object owner) except -1:
        """Have the next event register this bus with `owner`, a weak reference to a multi bus."""
        self.owner = owner
        # Whoever has the wrapped bus may publish on it directly. Mostly nobody has: then the weak reference
        # that this takes, a tenth of a request for three buses, can be saved.
        if not WITH_GIL or Py_REFCNT(<PyObject*>self.actual) > 1 or self.actual.owner is not None:
            self.link()
        return 0

    cdef int after_turn(self) except -1:
        """See to what came onto this bus while its turn began, or may come onto the wrapped bus itself."""
        if self.owner is None or self.actual is None:
            return 0
        if self.actual.holds_any() or (self.collected is not None and self.collected.holds_any()):
            self.register()
        elif self.actual.owner is None and (Py_REFCNT(<PyObject*>self.actual) > 1 or self.actual.is_multi()):
            self.link()
        return 0

    cdef int link(self) except -1:
        cdef EventStore actual = self.actual
        owner = self.owner
        wrapper = PyWeakref_NewRef(self, None)
        with cython.critical_section(actual):
            actual.owner = owner
            actual.wrapper = wrapper
        return 0

    cdef int hold(self) except -1:
        """Note that this bus is registered: the next event need not do it."""
        cdef EventStore actual = self.actual
        self.owner = None
        if actual is not None and actual.owner is not None:
            wrapper = actual.wrapper
            if wrapper is not None and wrapper() is self:
                with cython.critical_section(actual):
                    actual.owner = actual.wrapper = None
        return 0

    cdef int register(self) except -1:
        """Register with the multi bus that let go of this bus last, if that is still there."""
        with cython.critical_section(self):
            owner = self.owner
            self.owner = None
        multi = None if owner is None else owner()
        if multi is not None:
            multi.publish(self)
        return 0


EXTENSION_TYPES.add(PairStore)
cdef object CALL_PAIR = PairStore._apply_event
cdef object DELAYED_PUBLISH = DelayedStore.publish


# The public classes: Python classes, since an extension type cannot inherit from an abstract one


class SideEffectsBus(PairStore, AbstractEventBus[T]):
    """The pairs that a `DelayedEventBus` collected: made only when somebody looks at them."""

    __module__ = "commitbus.delayed_event_bus"


class DelayedEventBus(DelayedStore, _state.Stateful, EventBus[T]):
    """A bus whose ``apply`` carries nothing out: it only collects, until `apply_without_delay`."""

    __module__ = "commitbus.delayed_event_bus"


cdef object SIDE_EFFECTS = SideEffectsBus
_naming.see_bus_through(SideEffectsBus, lambda bus: bus._commitbus_get()[0])
_naming.see_bus_through(DelayedEventBus, DelayedEventBus.actual_event_bus.__get__)
