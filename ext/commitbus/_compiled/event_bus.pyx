# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`AbstractEventBus` and `BasicEventBus`: what they do, and why, is documented in `commitbus._pure.event_bus`."""

cimport cython
from cpython.object cimport PyObject

from commitbus._compiled.applying cimport apply_all, carry_out
from commitbus._compiled.batch cimport Handling, Progress, Source
from commitbus._compiled.loops cimport call_event, call_events, call_handler, check, look_up, surround

from abc import abstractmethod

from commitbus import _lock, _messages, _naming, _notes, _state
from commitbus._interfaces import CommittableFunction, EventBus, T, iterate
from commitbus._looking import Shown
from commitbus._marks import begun_anew, check_open, may_collect
from commitbus.savepoint import Savepoint


cdef extern from "Python.h":
    ctypedef struct PyTypeObject
    ctypedef object (*newfunc)(PyTypeObject*, object, PyObject*)
    ctypedef struct PyTypeObject:
        # Changes with every change to the class or its bases; 0 while it has none.
        unsigned int tp_version_tag
        # Returns a new reference, or NULL with an exception set.
        newfunc tp_new
    PyTypeObject* Py_TYPE(object instance)
    Py_ssize_t Py_REFCNT(PyObject* instance)
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

cdef tuple EMPTY = ()
# What stands for an argument that was not given.
cdef object MISSING = _messages.MISSING
# The extension types below, and those of the modules that build on this one.
EXTENSION_TYPES = set()
# Is told of each bus that is made, while tests look for what was forgotten; or None.
cdef object TRACK = None
# Makes marks of what covers a bus: of `multi_event_bus`, which builds on this module.
cdef object MAKE_MARKS = None


def use_track(function):
    """Have a function told of each bus that is made; None ends that."""
    global TRACK
    TRACK = function


def use_covers(function):
    """Have a function make marks of what covers a bus."""
    global MAKE_MARKS
    MAKE_MARKS = function


cdef object make(object cls):
    """Make an instance, without the look-ups of ``cls.__new__(cls)`` and without __init__."""
    return (<PyTypeObject*>cls).tp_new(<PyTypeObject*>cls, EMPTY, NULL)


# What a class overrides


cdef enum:
    CLASSES = 64  # that are remembered
    PLACES = 4  # where a class may be found, from the one that its address gives: two never share one


cdef struct ClassInfo:
    PyTypeObject* cls
    unsigned int version
    int flags


cdef ClassInfo[CLASSES] class_infos


cdef int class_flags(object bus) except -1:
    """Tell which methods the class of a bus leaves as they are.

    A look-up on a class takes as long as a call, and a request makes ten of them: remembering them takes 12 %
    off it.
    """
    cdef PyTypeObject* cls = Py_TYPE(bus)
    cdef size_t first = <size_t>cls >> 5
    cdef size_t place
    cdef ClassInfo* info
    if WITH_GIL:
        for place in range(first, first + PLACES):
            info = &class_infos[place % CLASSES]
            if info.cls == cls and info.version == cls.tp_version_tag and info.version != 0:
                return info.flags
    return look_up_class_flags(<object>cls, first)


cdef int look_up_class_flags(object cls, size_t first) except -1:
    cdef int flags = 0
    cdef size_t place
    cdef ClassInfo* info = &class_infos[first % CLASSES]
    # A method is ours where an extension type defines it, and no class before that in the order of bases.
    if is_extension_method(cls, "publish"):
        flags |= PUBLISH_IS_OURS
    if is_extension_method(cls, "collect"):
        flags |= COLLECT_IS_OURS
    if is_extension_method(cls, "apply"):
        flags |= APPLY_IS_OURS
    if not (cls.applies_before_commit or cls.applies_after_rollback or cls._commitbus_multi):
        flags |= IS_PLAIN
    if cls._commitbus_awaited:
        flags |= IS_AWAITED
    if cls._commitbus_awaited == 2:
        flags |= IS_GROUPED
    if WITH_GIL:
        for place in range(first, first + PLACES):
            if class_infos[place % CLASSES].cls == <PyTypeObject*>cls or class_infos[place % CLASSES].cls is NULL:
                info = &class_infos[place % CLASSES]
                break
        cls.publish  # a look-up gives the class its version, if it has none yet
        info.cls = <PyTypeObject*>cls
        info.version = info.cls.tp_version_tag
        info.flags = flags
    return flags


cdef bint is_extension_method(object cls, str name) except -1:
    for base in cls.__mro__:
        if name in base.__dict__:
            return base in EXTENSION_TYPES
    return False


# Collecting


# As many as CPython keeps of free tuples, the pairs that these are in: a fifth of the time of collect().
@cython.freelist(2000)
cdef class Collected:
    """The default callable of a collected event."""

    # Set once.
    cdef EventStore bus
    cdef readonly object event

    def __call__(self, *, commit):
        if class_flags(self.bus) & IS_AWAITED:
            return self.bus._commitbus_await(self.event, commit)
        handler = self.bus._apply_event
        check(handler, handler(self.event, commit))

    def __reduce__(self):
        return _state.collected, (self.bus, self.event)


@cython.final
cdef class CollectedAgain(Collected):
    """That of an event which is such a callable itself. For the others, a __dealloc__ takes a seventh of collect()."""

    def __dealloc__(self):
        # One after another: thousands that are nested in each other would take all of the stack.
        event = self.event
        self.event = None
        while type(event) is CollectedAgain and Py_REFCNT(<PyObject*>event) == 1:
            inner = (<CollectedAgain>event).event
            (<CollectedAgain>event).event = None
            event = inner


cdef object collected(EventStore bus, object event):
    cdef Collected made
    if type(event) is Collected or type(event) is CollectedAgain:
        made = CollectedAgain.__new__(CollectedAgain)
    else:
        made = Collected.__new__(Collected)
    made.bus = bus
    made.event = event
    return made


cdef bint collects_itself(EventStore bus) except -1:
    """Whether a bus's class overrides `collect`."""
    return not class_flags(bus) & COLLECT_IS_OURS


cdef bint collects_plainly(EventStore bus) except -1:
    """Whether a bus collects with the default callables, so that its bare events are enough."""
    cdef bint method = False
    return (
        class_flags(bus) & COLLECT_IS_OURS
        and bus.keeps_events()
        and is_default(look_up(bus, "_collect_event", &method), method)
    )


cdef inline bint is_default(object collect_event, bint method):
    return method and collect_event is COLLECT_EVENT


# Storage


cdef class EventStore(Source):
    def __cinit__(self):
        if TRACK is not None:
            TRACK(self)

    cdef int add(self, object event) except -1:
        """Check an event, and append it."""
        return self.append(event)

    cdef int append(self, object event) except -1:
        with cython.critical_section(self):
            if self.pending is not None:
                self.pending.append(event)
                return 0
        return self.append_first(event)

    cdef int append_first(self, object event) except -1:
        # Making a list may run the garbage collector, and that a finalizer that publishes here: look again.
        # And not [event], which has room for one: the next event would have to make room again.
        cdef list made = []
        made.append(event)
        return self.append_all(made)

    cdef int append_all(self, list events) except -1:
        """Append events in a list that nobody else has."""
        self.extend(events)
        return self.register()

    cdef int extend(self, list events) except -1:
        """Append events, without any Python code: registering may run some."""
        with cython.critical_section(self):
            if self.pending is None:
                self.pending = events
            else:
                self.pending.extend(events)
        return 0

    cdef int add_all(self, object events) except -1:
        """Append one by one; what nobody can see happen, at once."""
        cdef list copied
        if type(events) is list or type(events) is tuple:
            copied = list(events)
            return self.append_all(copied) if copied else 0
        for event in iterate(events):
            self.append(event)
        return 0

    cdef int register(self) except -1:
        """Register with the multi bus that let go of this bus last, if that is still there."""
        if self.owner is None:
            return 0
        with cython.critical_section(self):
            owner, wrapper = self.owner, self.wrapper
            self.owner = self.wrapper = None
        multi = None if owner is None else owner()
        if multi is None:
            return 0
        try:
            delayed = wrapper()
            if delayed is None:
                multi.wrap(self)
            else:
                multi.publish(delayed)
        except BaseException:
            with cython.critical_section(self):
                if self.owner is None:  # an interrupt: the next event tries again
                    self.owner, self.wrapper = owner, wrapper
            raise
        return 0

    @property
    def _commitbus_marks(self):
        """The marks of the savepoints that are open, in a tuple, or None."""
        if self.cover is not None:
            MAKE_MARKS(self)
        return self.marks

    @_commitbus_marks.setter
    def _commitbus_marks(self, tuple marks):
        self.marks = marks

    cdef list take(self, Py_ssize_t* head):
        cdef list taken = None
        cdef bint done = False
        while not done:
            if is_covered(self):
                check_open(self)
            with cython.critical_section(self):
                if not is_covered(self):  # else another thread has opened one meanwhile
                    taken = self.remove(head)
                    done = True
        return taken

    cdef list take_within(self, Py_ssize_t* head, tuple marks):
        cdef list taken
        with cython.critical_section(self):
            taken = self.remove(head)
            if self.marks is not None:
                self.marks = marks or None
        return taken

    cdef list remove(self, Py_ssize_t* head):
        cdef list taken
        head[0] = 0
        if self.left is None:
            taken = self.pending
        else:
            if self.pending is not None:
                self.left.extend(self.pending)
            taken = self.left
            head[0] = self.head
            self.left = None
        self.pending = None
        return taken

    cdef int put_back(self, list batch, Py_ssize_t head, Py_ssize_t begun) except -1:
        cdef Py_ssize_t i
        with cython.critical_section(self):
            if self.left is not None:  # a nested apply, or one in another thread, has put back before
                for i in range(self.head, PyList_GET_SIZE(self.left)):
                    batch.append(self.left[i])
            self.left = batch
            self.head = head
        return self.register()

    cdef int forget_again(self, list tried) except -1:
        """See to events that were tried, and are put back where they were collected."""
        return 0

    cdef bint holds_any(self) noexcept:
        return self.pending is not None or self.left is not None

    cdef bint goes_on(self) noexcept:
        return self.holds_any() or is_covered(self)

    cdef bint holds_buses(self) noexcept:
        return self.is_multi()

    cdef list items(self):
        """Copy what is pending."""
        cdef list copied = []
        with cython.critical_section(self):
            if self.left is not None:
                copied = self.left[self.head:]
            if self.pending is not None:
                copied.extend(self.pending)
        return copied

    cdef list look(self, list items):
        """Give the events that the items of a pending list stand for."""
        return items

    cdef bint is_multi(self) noexcept:
        return False

    cdef bint keeps_events(self) noexcept:
        """Whether the items of the pending list are the events themselves."""
        return True

    cdef object hook(self, bint* method):
        return look_up(self, "_apply_event", method)

    cdef object surrounded(self, object hook, bint* method, object stack):
        handler = hook.__get__(self) if method[0] else hook
        method[0] = False
        return surround(stack, self, handler)

    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1:
        return call_handler(self, how, batch, at)

    # Bound as a function of Python's own is: CPython specialises the call of one, but not of a method descriptor that
    # a subclass inherits. A sixth of the time of publishing.
    @cython.binding(True)
    def publish(self, event):
        """Add an event, in constant time; nothing happens to it until it is applied."""
        self.append(event)

    def publish_all(self, events):
        """Publish one by one."""
        if class_flags(self) & PUBLISH_IS_OURS:
            self.add_all(events)
        else:
            publish = self.publish
            for event in iterate(events):
                publish(event)

    # A commit that was forgotten is told as the pure twin tells it: Cython names neither class nor parameter.
    @cython.embedsignature(False)
    def apply(self, commit=MISSING, *, robust=False, rounds=1):
        """Apply the pending events in the order in which they were published."""
        if commit is MISSING:
            raise _messages.missing_arguments("AbstractEventBus.apply", "commit")
        if rounds != 1 or robust:
            return apply_all(self, self, commit, robust, rounds, None)
        return carry_out(self, self, commit, None, None)

    @cython.embedsignature(False)
    def collect(self, commit=MISSING):
        """Take the pending events, each with the callable that applies it."""
        cdef Py_ssize_t head = 0
        cdef list items, pairs = []
        cdef bint method = False
        if commit is MISSING:
            raise _messages.missing_arguments("AbstractEventBus.collect", "commit")
        collect_event = look_up(self, "_collect_event", &method)
        if is_covered(self) and may_collect(self):
            with _lock.lock:  # no savepoint is opened meanwhile
                items = self.take_within(&head, begun_anew(self))
        else:
            items = self.take(&head)
        if items is None:
            return pairs
        try:
            self.pair_up(items if head == 0 else items[head:], collect_event, method, commit, pairs)
        except BaseException as error:
            self.uncollected(items, head, pairs, error)
            raise
        return pairs

    cdef int pair_up(self, list batch, object collect_event, bint method, object commit, list pairs) except -1:
        batch = self.look(batch)
        if is_default(collect_event, method):
            for event in batch:
                pairs.append((event, collected(self, event)))
            return 0
        if method:
            collect_event = collect_event.__get__(self)
        for event in batch:
            function = collect_event(event, commit)
            if not callable(function):
                check(collect_event, function)
                raise _messages.not_collected(self, function)
            pairs.append((event, function))
        return 0

    cdef int uncollected(self, list items, Py_ssize_t head, list pairs, object error) except -1:
        cdef Py_ssize_t done = PyList_GET_SIZE(pairs)
        cdef Py_ssize_t count = PyList_GET_SIZE(items) - head
        item = items[head + done] if done < count else None
        self.put_back(items, head, 0)
        try:
            if done < count:
                _notes.note_uncollected(error, self, self.look([item])[0], done + 1, count)
        except Exception:
            pass
        return 0

    def _collect_event(self, event, commit):
        """Give the callable that applies one event."""
        return collected(self, event)

    def pending_events(self):
        """Return what was published and neither collected, applied nor discarded."""
        return tuple(self.look(self.items()))

    def discard_pending_events(self):
        """Drop the pending events."""
        cdef Py_ssize_t head = 0
        cdef list items = self.take(&head)
        if items is None:
            return []
        return self.look(items if head == 0 else items[head:])

    def _commitbus_bring_back(self, Py_ssize_t count, marks):
        """Bring the last events that were put back to what is pending, and set the marks: collecting them failed."""
        cdef Py_ssize_t begin
        cdef list newer
        with cython.critical_section(self):
            if self.left is not None and count:
                begin = max(self.head, PyList_GET_SIZE(self.left) - count)
                newer = self.left[begin:]
                if self.pending is not None:
                    newer.extend(self.pending)
                self.pending = newer
                del self.left[begin:]
                if self.head >= PyList_GET_SIZE(self.left):
                    self.left = None
            self.marks = marks

    def savepoint(self):
        """Begin a block whose events are dropped when it is left by an exception."""
        return Savepoint(self)

    def _commitbus_mark(self):
        """Give where what is published from now on begins, and how much was put back before."""
        with cython.critical_section(self):
            return (
                0 if self.pending is None else PyList_GET_SIZE(self.pending),
                0 if self.left is None else PyList_GET_SIZE(self.left) - self.head,
            )

    def _commitbus_cut(self, Py_ssize_t start, kept):
        """Drop what is pending from a mark on, but for some spans, and give it."""
        cdef Py_ssize_t place = start, begin, size
        cdef list dropped = [], rest = []
        cdef list spans = list(kept)
        # All in one section, and without any Python code: a thread that publishes meanwhile waits, or comes after it.
        with cython.critical_section(self):
            if self.pending is not None:
                for begin, size in spans:
                    dropped.extend(self.pending[place:begin])
                    rest.extend(self.pending[begin:begin + size])
                    place = begin + size
                dropped.extend(self.pending[place:])
                del self.pending[start:]
                self.pending.extend(rest)
                if not self.pending:
                    self.pending = None
        return self.look(dropped)

    def _commitbus_holds_any(self):
        """Whether anything is pending."""
        return self.holds_any()

    def _commitbus_follower(self):
        """Give the delayed bus that the next event here registers, or None."""
        with cython.critical_section(self):
            wrapper = self.wrapper
        return None if wrapper is None else wrapper()

    def _commitbus_events(self):
        """Copy what is pending, whatever a subclass overrides."""
        return self.look(self.items())

    def _commitbus_get(self):
        return self.items()

    def _commitbus_set(self, kept):
        for event in kept:
            self.append(event)

    # For `commitbus.aio`, whose loops are coroutines. Items are what the pending list has: see `look`.

    def _commitbus_take_into(self, list items):
        """Move all that is pending to the end of a list that the caller has, so that no interrupt loses it."""
        self.take_into(items)

    cdef int take_into(self, list items) except -1:
        cdef Py_ssize_t head = 0
        cdef list taken = self.take(&head)
        if taken is not None:
            try:
                items.extend(taken[head:])
            except BaseException:
                self.put_back(taken, head, 0)
                raise
        return 0

    def _commitbus_look(self, list items):
        """Give the events that items stand for."""
        return self.look(items)


cdef class CallableStore(EventStore):
    cdef int add(self, object event) except -1:
        if not callable(event):
            raise _messages.not_callable(event)
        return self.append(event)

    cdef int add_all(self, object events) except -1:
        for event in iterate(events):
            self.add(event)
        return 0

    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1:
        if how.method and how.hook == <PyObject*>CALL_EVENT:
            return call_events(batch, at, how)
        return call_handler(self, how, batch, at)

    @cython.binding(True)  # as in `EventStore`
    def publish(self, event):
        """Add an event, in constant time; nothing happens to it until it is applied."""
        self.add(event)

    def _apply_event(self, event, commit):
        """Call the event."""
        call_event(event, commit)


EXTENSION_TYPES.update((EventStore, CallableStore))
cdef object COLLECT_EVENT = EventStore._collect_event
cdef object CALL_EVENT = CallableStore._apply_event
_naming.see_through(Collected, Collected.event.__get__)


# The public classes: Python classes, since an extension type cannot inherit from an abstract one


class AbstractEventBus(EventStore, Shown, _state.Stateful, EventBus[T]):
    """A bus that keeps its events until it is applied: subclass it and implement ``_apply_event``."""

    __module__ = "commitbus.event_bus"
    __slots__ = ()
    applies_before_commit = False
    applies_after_rollback = False
    _commitbus_awaited = 0
    _commitbus_delayed = False
    _commitbus_multi = False

    @classmethod
    def __init_subclass__(cls, **kwargs):
        """Refuse a class that is applied both before a commit and after a rollback."""
        super(AbstractEventBus, cls).__init_subclass__(**kwargs)
        if cls.applies_after_rollback and (cls.applies_before_commit or cls._commitbus_multi):
            raise _messages.not_after_rollback(cls, cls.applies_before_commit)

    @abstractmethod
    @cython.embedsignature(False)
    def _apply_event(self, event, commit):
        """Carry one event out, or only pretend to."""


class BasicEventBus(CallableStore, AbstractEventBus[CommittableFunction]):
    """A bus whose events are callables: each is called as ``event(commit=commit)``."""

    __module__ = "commitbus.event_bus"
