# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`SideEffectsBus`: documented in `commitbus._pure.side_effects_bus`."""

cimport cython
from cpython.object cimport PyObject

from commitbus._compiled.applying cimport apply_all, carry_out
from commitbus._compiled.batch cimport Handling, Pair, Progress, Source, events_of, explicit
from commitbus._compiled.loops cimport call_event, check, look_up
from commitbus._compiled.event_bus cimport EventStore, collected

from commitbus import _messages, _naming
from commitbus._compiled.event_bus import EXTENSION_TYPES, AbstractEventBus
from commitbus._context import gathering
from commitbus._interfaces import T, iterate
from commitbus.middleware import surround_pair

# What stands for an argument that was not given.
cdef object MISSING = _messages.MISSING


cdef extern from "Python.h":
    # No checks of type or index; borrowed.
    PyObject* PyList_GET_ITEM(object list, Py_ssize_t index)
    Py_ssize_t PyList_GET_SIZE(object list)


cdef bint is_delayed(object event) noexcept:
    """Whether an event is a delayed bus: a source of batches, and no store of events."""
    return isinstance(event, Source) and not isinstance(event, EventStore)


@cython.final
cdef class Around:
    """A hook with middleware around it: for the events that stand for themselves, and for pairs."""

    cdef tuple stack
    cdef object hook
    cdef bint method


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
            (<Source>delayed).register()
        return 0

    cdef int put_back(self, list batch, Py_ssize_t head, Py_ssize_t begun) except -1:
        cdef list tried
        if not self.wraps.is_multi():
            return EventStore.put_back(self, batch, head, begun)
        tried = [event for event in events_of(batch[head:head + begun]) if is_delayed(event)]
        try:
            self.wraps.forget_again(tried)
        finally:
            EventStore.put_back(self, batch, head, begun)
        return 0

    cdef tuple pair_of(self, object item):
        return (<Pair>item).pair if type(item) is Pair else (item, collected(self.wraps, item))

    cdef list look(self, list items):
        cdef list pairs = []
        for item in items:
            pairs.append(self.pair_of(item))
        return pairs

    cdef bint keeps_events(self) noexcept:
        return False

    cdef object scope(self, object commit):
        return self.wrapped().scope(commit)

    cdef bint surrounds(self) noexcept:
        return self.wraps is None or self.wraps.surrounds()

    cdef bint holds_buses(self) noexcept:
        return self.wraps is None or self.wraps.is_multi()

    cdef object hook(self, bint* method):
        """Give the hook of the wrapped bus or, in a tuple, one that somebody has set on this bus."""
        hook = look_up(self, "_apply_event", method)
        return self.wrapped().hook(method) if method[0] and hook is CALL_PAIR else (self._apply_event,)

    cdef object surrounded(self, object hook, bint* method, object stack):
        cdef Around around = Around.__new__(Around)
        around.stack = stack
        around.hook = hook if type(hook) is tuple else self.wraps.surrounded(hook, method, stack)
        around.method = method[0]
        method[0] = False
        return around

    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1:
        cdef EventStore wraps = self.wraps
        cdef Handling within = how[0]
        cdef list out = <object>how.out
        hook, commit, stack = <object>how.hook, <object>how.commit, None
        if type(hook) is Around:  # which whoever has called this has as long as it runs
            stack = (<Around>hook).stack
            within.method = (<Around>hook).method
            hook = (<Around>hook).hook
            within.hook = <PyObject*>hook
        own = hook[0] if type(hook) is tuple else None
        if own is None and not self.mixed:
            return wraps.run(&within, batch, at, failures)
        outer = gathering.get()
        if out is not None and wraps.is_multi():
            gathering.set((wraps, out))
        try:
            while at.done < PyList_GET_SIZE(batch):
                pair = self.pair_of(<object>PyList_GET_ITEM(batch, at.done))
                if stack is not None and not is_delayed(pair[0]):
                    surround_pair(stack, wraps, pair, commit, own)
                elif own is None:
                    call_event(pair[1], commit)
                else:
                    check(own, own(pair, commit))
                if out is not None and wraps.is_multi() and not is_delayed(pair[0]):
                    out.append(pair[0])
                at.done += 1
        finally:
            gathering.set(outer)
        return 0

    def publish(self, event):
        """Add a pair, in constant time; nothing happens to it until it is applied."""
        self.add(event)

    @cython.embedsignature(False)
    def apply(self, commit=MISSING, *, robust=False, rounds=1):
        """Apply the collected events in the order in which they were collected."""
        if commit is MISSING:
            raise _messages.missing_arguments("SideEffectsBus.apply", "commit")
        if rounds != 1 or robust:
            return self.look(apply_all(self, self, commit, robust, rounds, None))
        return self.look(carry_out(self, self, commit, None, None))

    def _apply_event(self, event, commit):
        """Call the callable of a pair."""
        call_event(event[1], commit)

    @property
    def _commitbus_wrapped_bus(self):
        return self.wraps

    @property
    def _commitbus_collector(self):
        return self.collector

    @property
    def _commitbus_mixed(self):
        return self.mixed

    @_commitbus_mixed.setter
    def _commitbus_mixed(self, bint mixed):
        self.mixed = mixed

    def _commitbus_get(self):
        cdef list items = self.items()
        pairs = {i: (<Pair>item).pair for i, item in enumerate(items) if type(item) is Pair}
        return self.wrapped(), events_of(items), pairs

    def _commitbus_set(self, kept):
        self.wraps, items, pairs = kept
        self.mixed = bool(pairs)
        for i, item in enumerate(items):
            self.append(explicit(pairs[i]) if i in pairs else item)


EXTENSION_TYPES.add(PairStore)
cdef object CALL_PAIR = PairStore._apply_event


# The public class: a Python class, since an extension type cannot inherit from an abstract one


class SideEffectsBus(PairStore, AbstractEventBus[T]):
    """The pairs that a `DelayedEventBus` collected: made only when somebody looks at them."""

    __module__ = "commitbus.delayed_event_bus"


_naming.see_bus_through(SideEffectsBus, lambda bus: bus._commitbus_get()[0])
