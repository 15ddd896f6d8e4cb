# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`SharedSideEffectsEventBus`: documented in `commitbus._pure.shared_side_effects`."""

cimport cython
from cpython.contextvars cimport PyContextVar_Get, PyContextVar_Set
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF

from commitbus._compiled.batch cimport Handling, Progress
from commitbus._compiled.loops cimport call_event, call_events, call_handler
from commitbus._compiled.event_bus cimport EventStore
from commitbus._compiled.side_effects cimport SideEffectCall

from commitbus import _messages, _notes
from commitbus._compiled.event_bus import EXTENSION_TYPES, AbstractEventBus
from commitbus._context import SharedSideEffectContext, live
from commitbus._context import running_now as _running_now
from commitbus._interfaces import iterate


cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident()

cdef object RUNNING_NOW = _running_now


@cython.final
@cython.freelist(8)
cdef class Run:
    """As in `commitbus._context`."""

    cdef readonly object context, commit, outer
    cdef readonly unsigned long thread
    # That of the outermost apply of the bus, where this is not it; made when somebody asks for them.
    cdef object around
    cdef dict entered_in_it, values_in_it
    cdef public object stack
    cdef public Py_ssize_t depth
    cdef public bint over

    @property
    def outermost(self):
        return self if self.around is None else self.around

    @property
    def entered(self):
        if self.entered_in_it is None:
            self.entered_in_it = {}
        return self.entered_in_it

    @property
    def values(self):
        if self.values_in_it is None:
            self.values_in_it = {}
        return self.values_in_it

    def enter(self):
        """Have `SharedSideEffectContext.current` find it."""
        PyContextVar_Set(RUNNING_NOW, self)

    def leave(self, error):
        """Close what was entered, then restore the context; true if that swallowed the error."""
        try:
            if self.stack is None:
                return False
            kind = None if error is None else type(error)
            return bool(self.stack.__exit__(kind, error, None if error is None else error.__traceback__))
        finally:
            self.over = True
            self.entered_in_it = self.values_in_it = None
            PyContextVar_Set(RUNNING_NOW, self.outer)


cdef Run begin(object context, object commit):
    cdef Run run = Run.__new__(Run)
    cdef PyObject* found = NULL
    PyContextVar_Get(RUNNING_NOW, NULL, &found)
    outer = <object>found
    Py_DECREF(outer)
    if outer is not None:
        outer = live(outer)
        within = context._run()
        if within is not None:
            run.around = within.outermost
    run.context = context
    run.commit = commit
    run.outer = outer
    run.thread = PyThread_get_thread_ident()
    return run


cdef class SharedStore(EventStore):
    # The same object for the whole life of the bus.
    cdef object shared

    def __cinit__(self, *args, **kwargs):
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

    cdef object scope(self, object commit):
        return begin(self.shared, commit)

    cdef bint surrounds(self) noexcept:
        return True

    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1:
        if how.method and how.hook == <PyObject*>CALL_SHARED:
            return call_events(batch, at, how)
        return call_handler(self, how, batch, at)

    def publish(self, event):
        """Add a side-effect call, in constant time; nothing happens to it until it is applied."""
        self.add(event)

    def _apply_event(self, event, commit):
        """Call the event, within the shared context."""
        if self.shared._run() is not None:
            call_event(event, commit)
            return
        # Somebody called what collect() gave: that call is the outermost apply.
        run = begin(self.shared, commit)
        try:
            run.enter()
            call_event(event, commit)
        except BaseException as error:
            if run.leave(error):
                return
            raise
        else:
            try:
                run.leave(None)
            except BaseException as error:
                _notes.note_left(error, self)
                raise
        finally:
            run.over = True


EXTENSION_TYPES.add(SharedStore)
cdef object CALL_SHARED = SharedStore._apply_event


# The public class: a Python class, since an extension type cannot inherit from an abstract one


class SharedSideEffectsEventBus(SharedStore, AbstractEventBus[SideEffectCall]):
    """A bus of side-effect calls that share a `SharedSideEffectContext`."""

    __module__ = "commitbus.shared_side_effects"
