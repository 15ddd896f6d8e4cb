# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""The compiled twin: what it does, and why, is documented in `commitbus._pure`.

Three things hold the loops together. A batch is a list that an apply took out of a bus: nobody else
has it, so each event in it is applied by that apply or put back. ``done`` counts the events of a batch
that were applied; C code is not interrupted between a handler's return and the count. And where the
GIL is off, a critical section guards each append to, and each swap of, a pending list.
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from cpython.weakref cimport PyWeakref_NewRef
from libc.string cimport memcpy

from abc import abstractmethod
from contextvars import ContextVar
from types import MappingProxyType

from commitbus import _messages, _state
from commitbus._context import SharedSideEffectContext, _Run
from commitbus._unit_of_work import unit_of_work
from commitbus._interfaces import (
    CommittableFunction,
    EventBus,
    EventBusOrchestrator,
    T,
    UnappliedEventsWarning,
    iterate,
)

__all__ = [
    "AbstractEventBus",
    "BasicEventBus",
    "CommittableFunction",
    "DelayedEventBus",
    "EventBus",
    "EventBusOrchestrator",
    "MultiEventBus",
    "SharedSideEffectContext",
    "SharedSideEffectsEventBus",
    "SideEffectCall",
    "UnappliedEventsWarning",
    "use_orchestrator_or_create_multi_event_bus",
]


cdef extern from "Python.h":
    const size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    # Returns a new reference, or NULL with an exception set. The arguments stay the caller's. With
    # the offset flag the callee may use args[-1] for a while, which saves it a copy.
    PyObject* PyObject_Vectorcall(PyObject* function, PyObject* const* args, size_t count, PyObject* names)
    # The same with a method of args[0] by name: it makes no bound method.
    PyObject* PyObject_VectorcallMethod(PyObject* name, PyObject* const* args, size_t count, PyObject* names)
    # The vectorcall function of an object, or NULL: then it is called in another way.
    ctypedef PyObject* (*vectorcallfunc)(PyObject*, PyObject* const*, size_t, PyObject*)
    vectorcallfunc PyVectorcall_Function(PyObject* function)
    # A built-in method: the C function tells whether it is ours, whatever object it is bound to.
    ctypedef PyObject* (*PyCFunction)(PyObject*, PyObject*)
    bint PyCFunction_Check(object function)
    PyCFunction PyCFunction_GET_FUNCTION(object function)
    # A Python method in its two parts: borrowed references, good as long as the method is.
    bint PyMethod_Check(object method)
    PyObject* PyMethod_GET_FUNCTION(object method)
    PyObject* PyMethod_GET_SELF(object method)
    # No checks of type or index; borrowed.
    PyObject* PyList_GET_ITEM(object list, Py_ssize_t index)
    Py_ssize_t PyList_GET_SIZE(object list)
    ctypedef struct PyTypeObject
    ctypedef object (*newfunc)(PyTypeObject*, object, PyObject*)
    ctypedef struct PyTypeObject:
        const char* tp_name
        # Changes with every change to the class or its bases; 0 while it has none.
        unsigned int tp_version_tag
        PyTypeObject* tp_base
        int (*tp_init)(PyObject*, PyObject*, PyObject*)
        # These return a new reference, or NULL with an exception set.
        newfunc tp_new
        vectorcallfunc tp_vectorcall
    ctypedef struct PyTupleObject:
        PyObject* ob_item[1]
    Py_ssize_t PyTuple_GET_SIZE(object tuple)
    PyTypeObject* Py_TYPE(object instance)
    int Py_EnterRecursiveCall(const char* where) except -1
    void Py_LeaveRecursiveCall()

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #define WITH_GIL 0
    #else
    #define WITH_GIL 1
    #endif
    """
    bint WITH_GIL

cdef enum:
    FEW = 10  # arguments that need no memory of their own
    FEW_EVENTS = 2  # for which to look up the handler takes less time than to bind it

cdef tuple COMMIT = ("commit",)
cdef tuple EMPTY = ()
cdef str APPLY_EVENT = "_apply_event"


# Calling


cdef int check(object function, PyObject* result) except -1:
    """Take over what a handler returned, if it is not None, and refuse a coroutine."""
    taken = <object>result
    Py_DECREF(taken)
    _messages.refuse_coroutine(function, taken)
    return 0


cdef inline int finish(object function, PyObject* result) except -1:
    """Take over what a call gave: NULL and an exception, None, or anything else."""
    if result == <PyObject*>None:
        Py_DECREF(None)
        return 0
    if result is NULL:
        return -1
    return check(function, result)


cdef inline PyObject* call_function(PyObject* function, PyObject* const* args, size_t count, PyObject* names) noexcept:
    """Call what may have a vectorcall function of its own directly.

    `PyObject_Vectorcall` also looks up the thread state and checks the result, which is a tenth of the
    time of a call. Returns a new reference, or NULL with an exception set.
    """
    cdef vectorcallfunc vectorcall = PyVectorcall_Function(function)
    if vectorcall is NULL:
        return PyObject_Vectorcall(function, args, count, names)
    return vectorcall(function, args, count, names)


cdef inline int call_event(object event, object commit) except -1:
    """Call an event as ``event(commit=commit)``."""
    cdef PyObject* stack[2]
    if type(event) is SideEffectCall:
        return finish(event, (<SideEffectCall>event).call(<PyObject*>commit))
    stack[0] = NULL
    stack[1] = <PyObject*>commit
    return finish(
        event, call_function(<PyObject*>event, stack + 1, PY_VECTORCALL_ARGUMENTS_OFFSET, <PyObject*>COMMIT)
    )


cdef int call_events(list batch, Py_ssize_t* done, object commit) except -1:
    """Call the events of a batch that are not done."""
    while done[0] < PyList_GET_SIZE(batch):
        call_event(<object>PyList_GET_ITEM(batch, done[0]), commit)
        done[0] += 1
    return 0


cdef int call_handler(object handler, list batch, Py_ssize_t* done, object commit) except -1:
    """Call ``handler(event, commit)`` for the events of a batch that are not done."""
    cdef PyObject* stack[4]
    cdef PyObject** arguments = stack + 1
    cdef PyObject* function = <PyObject*>handler
    cdef size_t count = 2
    cdef vectorcallfunc vectorcall
    if PyMethod_Check(handler):
        # Unpacked once here, not once for each event: `handler` keeps both alive.
        function = PyMethod_GET_FUNCTION(handler)
        stack[1] = PyMethod_GET_SELF(handler)
        count = 3
    # Looked up once as well: call_function() says why it is called directly.
    vectorcall = PyVectorcall_Function(function)
    if vectorcall is NULL:
        vectorcall = PyObject_Vectorcall
    stack[0] = NULL
    stack[count] = <PyObject*>commit
    while done[0] < PyList_GET_SIZE(batch):
        event = <object>PyList_GET_ITEM(batch, done[0])
        stack[count - 1] = <PyObject*>event
        finish(handler, vectorcall(function, arguments, count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL))
        done[0] += 1
    return 0


cdef inline bint is_ours(object method, PyCFunction function) noexcept:
    """Whether a bound method is a certain one of the classes below."""
    return PyCFunction_Check(method) and PyCFunction_GET_FUNCTION(method) == function


cdef enum:
    PUBLISH_IS_OURS = 1
    COLLECT_IS_OURS = 2
    MULTI_APPLY_IS_OURS = 4
    CLASSES = 64  # as many are remembered, each in the place that its address gives


cdef struct ClassInfo:
    PyTypeObject* cls
    unsigned int version
    int flags


cdef ClassInfo[CLASSES] class_infos


cdef inline int class_flags(object bus) except -1:
    """Tell which methods the class of a bus leaves as they are.

    A look-up on a class takes as long as a call, and a request makes ten of them.
    """
    cdef PyTypeObject* cls = Py_TYPE(bus)
    cdef ClassInfo* info = &class_infos[(<size_t>cls >> 5) % CLASSES]
    if WITH_GIL and info.cls == cls and info.version == cls.tp_version_tag and info.version != 0:
        return info.flags
    return look_up_class_flags(<object>cls, info)


cdef int look_up_class_flags(object cls, ClassInfo* info) except -1:
    cdef int flags = 0
    if cls.publish is PUBLISH:
        flags |= PUBLISH_IS_OURS
    if cls.collect is COLLECT:
        flags |= COLLECT_IS_OURS
    if cls.apply is MULTI_APPLY:
        flags |= MULTI_APPLY_IS_OURS
    if WITH_GIL:
        info.cls = <PyTypeObject*>cls
        info.version = info.cls.tp_version_tag
        info.flags = flags
    return flags


cdef inline object make(object cls):
    """Make an instance, without the look-ups of ``cls.__new__(cls)`` and without __init__."""
    return (<PyTypeObject*>cls).tp_new(<PyTypeObject*>cls, EMPTY, NULL)


# Storage


cdef class _EventStore:
    # None while nothing is pending. In a critical section it is appended to, or swapped for another:
    # whoever swapped it out owns what is in it.
    cdef list pending
    cdef object __weakref__

    cdef int add(self, object event) except -1:
        """Check an event, and append it."""
        return self.append(event)

    cdef inline int append(self, object event) except -1:
        with cython.critical_section(self):
            if self.pending is None:
                # Not [event], which has room for one: the next event would have to make room again.
                self.pending = []
            self.pending.append(event)
        return 0

    cdef list take(self):
        """Empty the pending list, and give what was in it."""
        cdef list taken
        with cython.critical_section(self):
            taken = self.pending
            self.pending = None
        return taken

    cdef int put_back(self, list events) except -1:
        with cython.critical_section(self):
            if self.pending is None:
                self.pending = events
            else:
                self.pending[0:0] = events
        return 0

    cdef list items(self):
        """Copy the pending list."""
        cdef list copied
        with cython.critical_section(self):
            copied = [] if self.pending is None else self.pending[:]
        return copied

    cdef list look(self, list items):
        """Give the events that a pending list stands for."""
        return items

    cdef _MultiStore as_multi(self):
        return None

    cdef int run(self, list batch, Py_ssize_t* done, object commit, bint robust, list out) except -1:
        """Apply the events of a batch that are not done, up to the first that fails."""
        cdef PyObject* stack[4]
        cdef PyObject* result
        if PyList_GET_SIZE(batch) > FEW_EVENTS:
            return call_handler(self._apply_event, batch, done, commit)
        stack[0] = NULL
        stack[1] = <PyObject*>self
        stack[3] = <PyObject*>commit
        while done[0] < PyList_GET_SIZE(batch):
            event = <object>PyList_GET_ITEM(batch, done[0])
            stack[2] = <PyObject*>event
            result = PyObject_VectorcallMethod(
                <PyObject*>APPLY_EVENT, stack + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL
            )
            if result is NULL:
                return -1  # before anything is looked up: an exception is set
            if result == <PyObject*>None:
                Py_DECREF(None)
            else:
                check(self._apply_event, result)
            done[0] += 1
        return 0

    cdef list carry_out(
        self,
        _EventStore runner,
        object keeper,
        object bus,
        list batch,
        object commit,
        bint robust,
        list out,
        list applied,
    ):
        """Apply events of this bus: the one path behind every apply.

        `runner` runs the batch; what is not applied goes back to `keeper`; `bus` is named in notes.
        `out` gathers what multi buses apply; `applied` what this one did when an error is raised.
        """
        cdef Py_ssize_t done = 0
        cdef list failed = None
        cdef list errors = None
        try:
            if not robust:
                runner.run(batch, &done, commit, False, out)
                return batch
            failed = []
            errors = []
            while True:
                try:
                    runner.run(batch, &done, commit, True, out)
                    break
                except Exception as error:
                    several = error.errors if type(error) is _Several else [error]
                    failed.append(done)
                    done += 1
                    _messages.note_failed(several, bus, event_of(batch[done - 1]), done, len(batch))
                    errors.extend(several)
            if errors:
                raise _messages.group(bus, errors, len(failed), len(batch))
            return batch
        except BaseException as error:
            stopped(keeper, bus, batch, done, failed, errors, applied, error)
            raise

    def publish(self, event):
        """Add an event, in constant time; nothing happens to it until it is applied."""
        self.add(event)

    def publish_all(self, events):
        """Publish one by one."""
        if class_flags(self) & PUBLISH_IS_OURS:
            self.add_all(events)
        else:
            publish = self.publish
            for event in iterate(events):
                publish(event)

    cdef int add_all(self, object events) except -1:
        """Add one by one; what nobody can see happen, at once."""
        if type(events) is list or type(events) is tuple:
            with cython.critical_section(self):
                if self.pending is None:
                    self.pending = list(events)
                else:
                    self.pending.extend(events)
        else:
            for event in iterate(events):
                self.append(event)
        return 0

    def apply(self, commit, *, robust=False):
        """Apply the pending events in the order in which they were published."""
        cdef list batch = self.take()
        if batch is None:
            return []
        return self.carry_out(self, self, self, batch, commit, robust, None, None)

    def collect(self, commit):
        """Take the pending events, each with the callable that applies it."""
        cdef list items = self.take()
        cdef list pairs = []
        cdef list batch
        if items is None:
            return pairs
        try:
            batch = self.look(items)
            collect_event = self._collect_event
            if is_ours(collect_event, COLLECT_EVENT):
                return [(event, collected(self, event)) for event in batch]
            else:
                for event in batch:
                    function = collect_event(event, commit)
                    if not callable(function):
                        _messages.refuse_coroutine(collect_event, function)
                        raise _messages.not_collected(self, function)
                    pairs.append((event, function))
        except BaseException as error:
            self.put_back(items)
            _messages.note_uncollected(error, self, batch[len(pairs)], len(pairs) + 1, len(batch))
            raise
        return pairs

    def _collect_event(self, event, commit):
        """Give the callable that applies one event."""
        return collected(self, event)

    def pending_events(self):
        """Return what was published and neither collected, applied nor discarded."""
        return tuple(self.look(self.items()))

    def discard_pending_events(self):
        """Drop the pending events."""
        cdef list items = self.take()
        return [] if items is None else self.look(items)

    def __copy__(self):
        """Make a copy that shares the events, but not their list."""
        return _state.shallow(self)

    def __deepcopy__(self, memo):
        """Make a copy with copies of the events."""
        return _state.deep(self, memo)

    def __reduce__(self):
        """Take the bus apart for `pickle`, with its pending events."""
        return _state.reduce(self)

    def _commitbus_get(self):
        return self.items()

    def _commitbus_set(self, kept):
        for event in kept:
            self.append(event)


cdef class _CallableStore(_EventStore):
    cdef int add(self, object event) except -1:
        if not callable(event):
            raise _messages.not_callable(event)
        return self.append(event)

    cdef int add_all(self, object events) except -1:
        for event in iterate(events):
            self.add(event)
        return 0

    cdef int run(self, list batch, Py_ssize_t* done, object commit, bint robust, list out) except -1:
        handler = self._apply_event
        if not is_ours(handler, CALL_EVENT):
            return call_handler(handler, batch, done, commit)
        return call_events(batch, done, commit)

    def _apply_event(self, event, commit):
        """Call the event."""
        call_event(event, commit)


@cython.final
cdef class _Explicit:
    """A pair in a list of collected events: its callable is not the default one."""

    cdef tuple pair


cdef inline object event_of(object item):
    return (<_Explicit>item).pair[0] if type(item) is _Explicit else item


cdef list events_of(list items):
    return [event_of(item) for item in items]


cdef object explicit(tuple pair):
    cdef _Explicit item = _Explicit.__new__(_Explicit)
    item.pair = pair
    return item


# As many as CPython keeps of free tuples, the pairs that these are in: a fifth of the time of collect().
@cython.final
@cython.freelist(2000)
cdef class _Collected:
    """The default callable of a collected event."""

    # Set once.
    cdef _EventStore bus
    cdef object event

    def __call__(self, *, commit):
        handler = self.bus._apply_event
        result = handler(self.event, commit)
        if result is not None:
            _messages.refuse_coroutine(handler, result)

    def __reduce__(self):
        return _state.collected, (self.bus, self.event)


cdef inline object collected(_EventStore bus, object event):
    cdef _Collected made = _Collected.__new__(_Collected)
    made.bus = bus
    made.event = event
    return made


cdef class _PairStore(_EventStore):
    # `pending` has the bare events of the bus that is wrapped, and other pairs in an _Explicit.
    cdef _EventStore wraps
    # Whether there ever was an _Explicit: set before it goes in, read after a batch was taken.
    cdef bint mixed

    cdef int add(self, object event) except -1:
        if not (type(event) is tuple and len(event) == 2 and callable(event[1])):
            raise _messages.not_a_pair(event)
        self.mixed = True
        return self.append(explicit(event))

    cdef int add_all(self, object events) except -1:
        for event in iterate(events):
            self.add(event)
        return 0

    cdef tuple pair(self, object item):
        return (<_Explicit>item).pair if type(item) is _Explicit else (item, collected(self.wraps, item))

    cdef list look(self, list items):
        return [self.pair(item) for item in items]

    cdef int run(self, list batch, Py_ssize_t* done, object commit, bint robust, list out) except -1:
        hook = self._apply_event
        ours = is_ours(hook, CALL_PAIR)
        if ours and not self.mixed:
            return self.wraps.run(batch, done, commit, robust, out)
        while done[0] < PyList_GET_SIZE(batch):
            pair = self.pair(<object>PyList_GET_ITEM(batch, done[0]))
            if ours:
                call_event(pair[1], commit)
            else:
                result = hook(pair, commit)
                if result is not None:
                    _messages.refuse_coroutine(hook, result)
            done[0] += 1
        return 0

    cdef list apply_items(self, object bus, object commit, bint robust, list out):
        """Apply, and give the items of the pending list."""
        cdef list batch = self.take()
        if batch is None:
            return []
        return self.wraps.carry_out(self, self, bus, batch, commit, robust, out, None)

    def apply(self, commit, *, robust=False):
        """Apply the collected events in the order in which they were collected."""
        return self.look(self.apply_items(self, commit, robust, None))

    def _apply_event(self, event, commit):
        """Call the callable of a pair."""
        call_event(event[1], commit)

    def _commitbus_get(self):
        cdef list items = self.items()
        pairs = {i: (<_Explicit>item).pair for i, item in enumerate(items) if type(item) is _Explicit}
        return self.wraps, events_of(items), pairs

    def _commitbus_set(self, kept):
        self.wraps, items, pairs = kept
        self.mixed = bool(pairs)
        for i, item in enumerate(items):
            self.append(explicit(pairs[i]) if i in pairs else item)


cdef class _DelayedStore:
    # None until __init__.
    cdef _EventStore actual
    # Whether the class of `actual` leaves `publish` as it is.
    cdef bint direct
    # The multi bus that has applied this bus, and that it registers with once more when it is next
    # published on: a weak reference, as nobody else could apply it. A tuple of them where several have,
    # None where none has.
    cdef object owners
    # None until something was collected.
    cdef _PairStore collected
    cdef object __weakref__

    def __init__(self, actual_event_bus):
        """Wrap a bus."""
        # Every AbstractEventBus is one, and this check takes no time.
        if not isinstance(actual_event_bus, _EventStore):
            raise _messages.not_a_bus(actual_event_bus)
        self.owners = None
        self.collected = None
        self.enclose(actual_event_bus)

    cdef int enclose(self, _EventStore actual) except -1:
        self.actual = actual
        self.direct = class_flags(actual) & PUBLISH_IS_OURS
        return 0

    cdef inline int initialised(self) except -1:
        if self.actual is None:
            raise _messages.not_wrapping()
        return 0

    @property
    def actual_event_bus(self):
        """The wrapped bus."""
        self.initialised()
        return self.actual

    @property
    def side_effects_bus(self):
        """The bus of the pairs that were collected, each an event and the callable that applies it."""
        return self.collecting()

    def publish(self, event):
        """Publish on the wrapped bus."""
        if self.direct:
            self.actual.add(event)
        else:
            self.initialised()
            self.actual.publish(event)
        # After the event was added: a multi bus lets go of this one before it takes the events.
        if self.owners is not None:
            self.register()

    def publish_all(self, events):
        """Publish one by one on the wrapped bus."""
        if type(self).publish is not DELAYED_PUBLISH:
            publish = self.publish
            for event in iterate(events):
                publish(event)
            return
        self.initialised()
        try:
            self.actual.publish_all(events)
        finally:
            if self.owners is not None:
                self.register()

    def apply(self, commit):
        """Collect what is pending in the wrapped bus; nothing is carried out."""
        return self.collect(commit)

    def apply_without_delay(self, commit, *, robust=False):
        """Carry out what ``apply`` collected so far, in order."""
        self.initialised()
        if self.collected is None:
            return []
        cdef list items = self.collected.apply_items(self, commit, robust, None)
        return events_of(items) if self.collected.mixed else items

    def pending_events(self):
        """Return what is pending in the wrapped bus."""
        self.initialised()
        return self.actual.pending_events()

    def discard_pending_events(self):
        """Drop what is pending in the wrapped bus."""
        self.initialised()
        return self.actual.discard_pending_events()

    def collected_events(self):
        """Return what was collected and not yet applied."""
        self.initialised()
        return () if self.collected is None else tuple(events_of(self.collected.items()))

    def __copy__(self):
        """Make a copy that wraps the same bus, with its own list of what was collected."""
        return _state.shallow(self)

    def __deepcopy__(self, memo):
        """Make a copy that wraps a copy."""
        return _state.deep(self, memo)

    def __reduce__(self):
        """Take the bus apart for `pickle`, with the wrapped bus and what was collected."""
        return _state.reduce(self)

    def _commitbus_get(self):
        self.initialised()
        return (self.actual, [], {}) if self.collected is None else self.collected._commitbus_get()

    def _commitbus_set(self, kept):
        _DelayedStore.__init__(self, kept[0])
        if kept[1]:
            self.collecting()._commitbus_set(kept)

    cdef _PairStore collecting(self):
        cdef _PairStore made
        if self.collected is None:
            self.initialised()
            made = make(SIDE_EFFECTS)
            made.wraps = self.actual
            with cython.critical_section(self):
                if self.collected is None:
                    self.collected = made
        return self.collected

    cdef list collect(self, object commit):
        cdef _PairStore store = self.collecting()
        cdef list events
        if collects_plainly(self.actual):
            events = self.actual.take()
            if events is None:
                return []
            copied = events[:]
            with cython.critical_section(store):
                if store.pending is None:
                    store.pending = events
                else:
                    store.pending.extend(events)
            return copied
        events = [explicit((event, function)) for event, function in self.actual.collect(commit)]
        store.mixed = True
        for item in events:
            store.append(item)
        return events_of(events)

    cdef int turn(self, object commit, bint robust, list out) except -1:
        """Collect what is pending, and carry it out: this bus's turn in a multi bus."""
        cdef list batch
        self.initialised()
        try:
            if self.collected is None and collects_plainly(self.actual):
                # The direct path: nobody can have seen what was never collected.
                batch = self.actual.take()
                if batch is None:
                    return 0
                batch = self.actual.carry_out(self.actual, self, self, batch, commit, robust, out, None)
            else:
                self.collect(commit)
                batch = events_of(self.collected.apply_items(self, commit, robust, out))
        except ExceptionGroup as error:
            if robust and getattr(error, "_commitbus_bus", None) is self:
                raise _Several(list(error.exceptions)) from None
            raise
        if out is not None and self.actual.as_multi() is None:
            out.extend(batch)
        return 0

    cdef int own(self, object owner) except -1:
        """Have the next event register this bus with `owner`."""
        cdef _MultiStore actual = self.actual.as_multi()
        with cython.critical_section(self):
            if self.owners is None:
                self.owners = owner
            elif self.owners is not owner:
                self.owners = (*[ref for ref in owners_of(self.owners) if ref is not owner], owner)
        if actual is not None:
            actual.tell(self)
        return 0

    cdef int disown(self, object owner) except -1:
        """Keep the next event from registering this bus with `owner`."""
        with cython.critical_section(self):
            if self.owners is not None:
                self.owners = tuple([ref for ref in owners_of(self.owners) if ref() is not owner]) or None
        return 0

    cdef int register(self) except -1:
        cdef object owners
        with cython.critical_section(self):
            owners = self.owners
            self.owners = None
        if owners is not None:
            for ref in owners_of(owners):
                owner = ref()
                if owner is not None:
                    owner.publish(self)
        return 0


cdef inline tuple owners_of(object owners):
    return owners if type(owners) is tuple else (owners,)


cdef bint collects_plainly(_EventStore bus) except -1:
    """Whether a bus collects with the default callables, so that its bare events are enough."""
    return class_flags(bus) & COLLECT_IS_OURS and is_ours(bus._collect_event, COLLECT_EVENT)


class _Several(Exception):
    """The errors of one delayed bus, on their way into the group of the multi bus around it."""

    def __init__(self, errors):
        self.errors = errors


cdef int stopped(
    object keeper,
    object bus,
    list batch,
    Py_ssize_t done,
    list failed,
    list errors,
    list applied,
    object error,
) except -1:
    """Note an error, and keep what was not applied."""
    cdef list rest = batch[done:]
    cdef set skip = set(failed or ())
    if rest:
        _messages.note_stopped(error, bus, event_of(batch[done]), done + 1, len(batch), len(skip))
    if errors and not isinstance(error, Exception):
        _messages.chain(error, bus, errors, len(skip), len(batch))
    if failed:
        rest = [batch[i] for i in failed] + rest
    if isinstance(keeper, _DelayedStore):
        keeper = (<_DelayedStore>keeper).collecting()
    (<_EventStore>keeper).put_back(rest)
    if applied is not None:
        applied.extend([batch[i] for i in range(done) if i not in skip])
    return 0


# The multi bus that is applying and where its applied events go, for a subclass's _apply_event.
_gathering = ContextVar("commitbus_gathering", default=None)


cdef list gathering_of(object bus):
    gathering = _gathering.get()
    return gathering[1] if gathering is not None and gathering[0] is bus else None


cdef class _MultiStore(_EventStore):
    # The delayed buses around this one that an outer multi bus has let go of, or None. Swapped, not
    # changed.
    cdef list wrappers

    cdef _MultiStore as_multi(self):
        return self

    def wrap(self, event_bus):
        """Delay a bus and register it."""
        if not isinstance(event_bus, _EventStore):
            raise _messages.not_wrappable(event_bus, isinstance(event_bus, _DelayedStore))
        cdef _DelayedStore delayed = make(DELAYED)
        delayed.enclose(event_bus)
        if class_flags(self) & PUBLISH_IS_OURS:
            self.add(delayed)
        else:
            self.publish(delayed)
        return delayed

    cdef int add(self, object event) except -1:
        cdef list wrappers
        if not isinstance(event, _DelayedStore):
            raise _messages.not_delayed(event)
        (<_DelayedStore>event).initialised()
        self.append(event)
        if (<_DelayedStore>event).owners is not None:
            (<_DelayedStore>event).disown(self)
        if self.wrappers is not None:
            with cython.critical_section(self):
                wrappers = self.wrappers
                self.wrappers = None
            if wrappers is not None:
                for wrapper in wrappers:
                    (<_DelayedStore>wrapper).register()
        return 0

    cdef int add_all(self, object events) except -1:
        for event in iterate(events):
            self.add(event)
        return 0

    cdef int run(self, list batch, Py_ssize_t* done, object commit, bint robust, list out) except -1:
        hook = self._apply_event
        ours = is_ours(hook, TAKE_TURN)
        ref = PyWeakref_NewRef(self, None)
        Py_EnterRecursiveCall(" while applying the buses of a MultiEventBus")
        try:
            while done[0] < PyList_GET_SIZE(batch):
                delayed = <object>PyList_GET_ITEM(batch, done[0])
                if ours:
                    self.turn(delayed, ref, commit, robust, out)
                else:
                    token = None if out is None else _gathering.set((self, out))
                    try:
                        result = hook(delayed, commit)
                    finally:
                        if token is not None:
                            _gathering.reset(token)
                    if result is not None:
                        _messages.refuse_coroutine(hook, result)
                done[0] += 1
        finally:
            Py_LeaveRecursiveCall()
        return 0

    cdef int turn(self, _DelayedStore delayed, object ref, object commit, bint robust, list out) except -1:
        # Before anything is taken: whatever is published from now on registers the bus again.
        delayed.own(ref)
        cls = type(delayed)
        if cls is DELAYED or (
            cls.apply is DELAYED_APPLY and cls.apply_without_delay is DELAYED_APPLY_WITHOUT_DELAY
        ):
            return delayed.turn(commit, robust, out)
        delayed.apply(commit)
        # It may have been written without `robust`.
        if robust:
            events = delayed.apply_without_delay(commit, robust=True)
        else:
            events = delayed.apply_without_delay(commit)
        if out is not None:
            out.extend(events)
        return 0

    cdef list carry_out(
        self,
        _EventStore runner,
        object keeper,
        object bus,
        list batch,
        object commit,
        bint robust,
        list out,
        list applied,
    ):
        try:
            return _EventStore.carry_out(self, runner, keeper, bus, batch, commit, robust, out, applied)
        except BaseException:
            self.settle()
            raise

    cdef int settle(self) except -1:
        """Have each bus registered once, after some were put back that may have registered again."""
        cdef list once
        with cython.critical_section(self):
            once = None if self.pending is None else list({id(bus): bus for bus in self.pending}.values())
            self.pending = once
        if once is not None:
            for delayed in self.items():
                (<_DelayedStore>delayed).disown(self)
        return 0

    cdef int tell(self, _DelayedStore wrapper) except -1:
        """Have the next bus that registers here register `wrapper` with its own multi bus."""
        with cython.critical_section(self):
            wrappers = [other for other in self.wrappers or () if (<_DelayedStore>other).owners is not None]
            if not any([other is wrapper for other in wrappers]):
                wrappers.append(wrapper)
            self.wrappers = wrappers
        return 0

    def apply(self, commit, *, robust=False):
        """Apply the registered buses in the order in which they were registered."""
        return self.apply_buses(commit, robust, gathering_of(self))

    cdef list apply_buses(self, object commit, bint robust, list out):
        cdef list batch = self.take()
        if batch is None:
            return []
        return self.carry_out(self, self, self, batch, commit, robust, out, None)

    def apply_and_get_applied_events(self, commit, *, robust=False):
        """Apply the registered buses, and return the events instead."""
        cdef list out = []
        if class_flags(self) & MULTI_APPLY_IS_OURS:
            self.apply_buses(commit, robust, out)
            return out
        token = _gathering.set((self, out))
        try:
            if robust:
                self.apply(commit, robust=True)
            else:
                self.apply(commit)
        finally:
            _gathering.reset(token)
        return out

    def _apply_event(self, event, commit):
        """Collect what is pending in one delayed bus, and apply it without delay."""
        self.turn(event, PyWeakref_NewRef(self, None), commit, False, gathering_of(self))

    def _commitbus_set(self, kept):
        for delayed in kept:
            _MultiStore.add(self, delayed)


@cython.final
@cython.freelist(2000)
cdef class SideEffectCall:
    # The signature, then the text.
    "SideEffectCall(function, /, *args, **kwargs)\n--\n\n\
A function with its arguments, to be called with a ``commit`` of its own later."

    # The function, then the positional arguments, then the values of the keyword arguments.
    cdef tuple values
    # The names of the keyword arguments, then "commit".
    cdef tuple names
    # How many of `values` are not keyword arguments.
    cdef Py_ssize_t positional
    cdef object __weakref__

    cdef PyObject* call(self, PyObject* commit) except? NULL:
        """Call the function; returns a new reference."""
        cdef PyObject* few[FEW]
        cdef PyObject** stack = few
        cdef Py_ssize_t count = PyTuple_GET_SIZE(self.values)
        cdef PyObject* result
        if count >= FEW:
            stack = <PyObject**>PyMem_Malloc((count + 1) * sizeof(PyObject*))
            if stack is NULL:
                raise MemoryError
        # `self` keeps what is in `values`, and whoever calls this keeps `self`. The function's own place
        # is the one that the offset flag lends.
        memcpy(stack, &(<PyTupleObject*>self.values).ob_item[0], count * sizeof(PyObject*))
        stack[count] = commit
        result = PyObject_Vectorcall(
            stack[0], stack + 1, (self.positional - 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, <PyObject*>self.names
        )
        if stack != few:
            PyMem_Free(stack)
        return result

    def __call__(self, *, commit):
        """Call the function with its arguments and ``commit``."""
        cdef PyObject* result = self.call(<PyObject*>commit)
        taken = <object>result
        Py_DECREF(taken)
        return taken

    @property
    def function(self):
        """The function."""
        return self.values[0]

    @property
    def args(self):
        """The positional arguments."""
        return self.values[1:self.positional]

    cdef dict keywords(self):
        return dict(zip(self.names, self.values[self.positional:]))

    @property
    def kwargs(self):
        """The keyword arguments, read only."""
        return MappingProxyType(self.keywords())

    def __setattr__(self, name, value):
        """Refuse: it is immutable."""
        raise _messages.immutable(name)

    def __delattr__(self, name):
        """Refuse: it is immutable."""
        raise _messages.immutable(name)

    def __eq__(self, other):
        """Compare by function and arguments."""
        if type(other) is not SideEffectCall:
            return NotImplemented
        cdef SideEffectCall call = other
        return (
            self.positional == call.positional
            and self.values[:self.positional] == call.values[:self.positional]
            and self.keywords() == call.keywords()
        )

    def __hash__(self):
        """Hash by function and arguments."""
        return hash((self.values[:self.positional], frozenset(self.keywords().items())))

    def __repr__(self):
        """Show the function and the arguments as they were passed."""
        return _messages.call_repr(self.values[0], self.args, self.keywords())

    def __copy__(self):
        """Return itself: it is immutable."""
        return self

    def __reduce__(self):
        """Take the call apart for `pickle`."""
        return _state.call, (_state.reference(SideEffectCall), self.values[0], self.args, self.keywords())


# How a SideEffectCall is made: from a vector of arguments, as the interpreter has them. By way of a
# __cinit__, with a tuple and a dict, it took four times as long.

cdef newfunc allocate_call = (<PyTypeObject*>SideEffectCall).tp_new
# The names that were used last, and what was made of them: those of one place in the code are one tuple.
cdef tuple last_keywords = None
cdef tuple last_names = None


cdef SideEffectCall build_call(tuple values, Py_ssize_t positional, tuple keywords):
    global last_keywords, last_names
    cdef SideEffectCall call
    cdef tuple names = COMMIT
    if positional == 0:
        raise _messages.no_function()
    if not callable(values[0]):
        raise _messages.not_a_function(values[0])
    if keywords is not None:
        if WITH_GIL and keywords is last_keywords:
            names = last_names
        else:
            if COMMIT[0] in keywords:
                raise _messages.commit_keyword()
            names = keywords + COMMIT
            if WITH_GIL:
                last_keywords = keywords
                last_names = names
    call = allocate_call(<PyTypeObject*>SideEffectCall, EMPTY, NULL)
    call.values = values
    call.names = names
    call.positional = positional
    return call


cdef object vectorcall_new_call(PyObject* cls, PyObject* const* args, size_t nargsf, PyObject* keywords):
    cdef Py_ssize_t positional = nargsf & ~PY_VECTORCALL_ARGUMENTS_OFFSET
    cdef Py_ssize_t count = positional
    cdef Py_ssize_t i
    if keywords is not NULL:
        count += PyTuple_GET_SIZE(<object>keywords)
    values = PyTuple_New(count)
    for i in range(count):
        # The tuple takes over a reference, and the caller keeps its own.
        Py_INCREF(<object>args[i])
        PyTuple_SET_ITEM(values, i, <object>args[i])
    return build_call(values, positional, None if keywords is NULL else <tuple>keywords)


cdef object tuple_new_call(PyTypeObject* cls, object args, PyObject* kwargs):
    cdef dict keywords = {} if kwargs is NULL else <dict>kwargs
    return build_call((*args, *keywords.values()), len(args), tuple(keywords) or None)


(<PyTypeObject*>SideEffectCall).tp_new = tuple_new_call
(<PyTypeObject*>SideEffectCall).tp_vectorcall = <vectorcallfunc>vectorcall_new_call


cdef class _SharedStore(_EventStore):
    # The same object for the whole life of the bus.
    cdef object shared

    def __cinit__(self):
        self.shared = SharedSideEffectContext()

    @property
    def context(self):
        """What the side effects share: the same object for the whole life of the bus."""
        return self.shared

    cdef int add(self, object event) except -1:
        if type(event) is not SideEffectCall:
            raise _messages.not_a_call(event)
        return self.append(event)

    cdef int add_all(self, object events) except -1:
        for event in iterate(events):
            self.add(event)
        return 0

    cdef int run(self, list batch, Py_ssize_t* done, object commit, bint robust, list out) except -1:
        handler = self._apply_event
        if not is_ours(handler, CALL_SHARED):
            return call_handler(handler, batch, done, commit)
        return call_events(batch, done, commit)

    cdef list carry_out(
        self,
        _EventStore runner,
        object keeper,
        object bus,
        list batch,
        object commit,
        bint robust,
        list out,
        list applied,
    ):
        run = _Run(self.shared, commit)
        applied = []
        try:
            done = _EventStore.carry_out(self, runner, keeper, bus, batch, commit, robust, out, applied)
        except BaseException as error:
            if run.leave(error):
                return applied
            raise
        self.leave(run)
        return done

    cdef int leave(self, object run) except -1:
        try:
            run.leave(None)
        except BaseException as error:
            _messages.note_left(error, self)
            raise
        return 0

    def _apply_event(self, event, commit):
        """Call the event, within the shared context."""
        if self.shared._run() is not None:
            call_event(event, commit)
            return
        # Somebody called what collect() gave: that call is the outermost apply.
        run = _Run(self.shared, commit)
        try:
            call_event(event, commit)
        except BaseException as error:
            if run.leave(error):
                return
            raise
        self.leave(run)


# What __cinit__(self, *args, **kwargs) would do, but that makes a dict for each bus, a third of its cost.

cdef struct Store:
    PyTypeObject* cls
    newfunc new


cdef Store[5] stores


cdef object new_store(PyTypeObject* cls, object args, PyObject* kwargs):
    """Make an instance; refuse arguments that no __init__ takes."""
    if PyTuple_GET_SIZE(args) or (kwargs is not NULL and <dict>kwargs):
        if cls.tp_init == (<PyTypeObject*>object).tp_init:
            raise _messages.no_arguments(<object>cls)
    cdef PyTypeObject* base = cls
    cdef int i
    while base is not NULL:
        for i in range(5):
            if stores[i].cls == base:
                return stores[i].new(cls, args, kwargs)
        base = base.tp_base
    raise TypeError("not a bus")  # cannot be: only stores have this tp_new


for i, store in enumerate((_EventStore, _CallableStore, _PairStore, _MultiStore, _SharedStore)):
    stores[i].cls = <PyTypeObject*>store
    stores[i].new = stores[i].cls.tp_new
    stores[i].cls.tp_new = new_store
del i, store


# The public classes: Python classes, since an extension type cannot inherit from an abstract one


class AbstractEventBus(_EventStore, EventBus[T]):
    """A bus that keeps its events until it is applied: subclass it and implement ``_apply_event``."""

    __slots__ = ()

    @abstractmethod
    @cython.embedsignature(False)
    def _apply_event(self, event, commit):
        """Carry one event out, or only pretend to."""


class BasicEventBus(_CallableStore, AbstractEventBus[CommittableFunction]):
    """A bus whose events are callables: each is called as ``event(commit=commit)``."""


class _SideEffectsBus(_PairStore, AbstractEventBus[T]):
    """The pairs that a `DelayedEventBus` collected: made only when somebody looks at them."""


class DelayedEventBus(_DelayedStore, EventBus[T]):
    """A bus whose ``apply`` carries nothing out: it only collects, until `apply_without_delay`."""


class MultiEventBus(_MultiStore, AbstractEventBus[DelayedEventBus], EventBusOrchestrator):
    """Runs many buses at once: hand it out as an orchestrator, then apply it."""


class SharedSideEffectsEventBus(_SharedStore, AbstractEventBus[SideEffectCall]):
    """A bus of side-effect calls that share a `SharedSideEffectContext`."""


def use_orchestrator_or_create_multi_event_bus(
    event_bus_orchestrator, commit, *, commit_transaction=None, robust=False
):
    """Run in the caller's unit of work or, without one, in a new one."""
    return unit_of_work(MultiEventBus, event_bus_orchestrator, commit, commit_transaction, robust)


# What the classes above compare with, to see what is overridden

cdef object DELAYED = DelayedEventBus
cdef object SIDE_EFFECTS = _SideEffectsBus
cdef object PUBLISH = _EventStore.publish
cdef object COLLECT = _EventStore.collect
cdef object DELAYED_PUBLISH = _DelayedStore.publish
cdef object DELAYED_APPLY = _DelayedStore.apply
cdef object DELAYED_APPLY_WITHOUT_DELAY = _DelayedStore.apply_without_delay
cdef object MULTI_APPLY = _MultiStore.apply
cdef PyCFunction COLLECT_EVENT = PyCFunction_GET_FUNCTION(_EventStore()._collect_event)
cdef PyCFunction CALL_EVENT = PyCFunction_GET_FUNCTION(_CallableStore()._apply_event)
cdef PyCFunction CALL_PAIR = PyCFunction_GET_FUNCTION(_PairStore()._apply_event)
cdef PyCFunction TAKE_TURN = PyCFunction_GET_FUNCTION(_MultiStore()._apply_event)
cdef PyCFunction CALL_SHARED = PyCFunction_GET_FUNCTION(_SharedStore()._apply_event)


for name, module in {
    "AbstractEventBus": "event_bus",
    "BasicEventBus": "event_bus",
    "DelayedEventBus": "delayed_event_bus",
    "_SideEffectsBus": "delayed_event_bus",
    "MultiEventBus": "multi_event_bus",
    "SharedSideEffectsEventBus": "shared_side_effects",
    "use_orchestrator_or_create_multi_event_bus": "multi_event_bus",
}.items():
    globals()[name].__module__ = f"commitbus.{module}"
del name, module
# An extension type takes its module from its name, and the name cannot be given in Cython.
(<PyTypeObject*>SideEffectCall).tp_name = "commitbus.side_effects.SideEffectCall"
_state.own(globals(), [*__all__, "_SideEffectsBus"])
_messages.see_through(SideEffectCall, SideEffectCall.function.__get__)
_messages.wraps_bus(_SideEffectsBus, lambda bus: bus._commitbus_get()[0])
_messages.wraps_bus(DelayedEventBus, DelayedEventBus.actual_event_bus.__get__)
