# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""The loops: they call a handler for each event of a batch, and count how far they came.

C code is not interrupted between a handler's return and the count.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF

from commitbus._compiled.batch cimport Handling, Progress
from commitbus._compiled.side_effects cimport SideEffectCall

from commitbus import _messages, _notes
from commitbus.middleware import tell_changes


cdef extern from "Python.h":
    const size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    # Returns a new reference, or NULL with an exception set. The arguments stay the caller's. With
    # the offset flag the callee may use args[-1] for a while, which saves it a copy.
    PyObject* PyObject_Vectorcall(PyObject* function, PyObject* const* args, size_t count, PyObject* names)
    # The vectorcall function of an object, or NULL: then it is called in another way.
    ctypedef PyObject* (*vectorcallfunc)(PyObject*, PyObject* const*, size_t, PyObject*)
    vectorcallfunc PyVectorcall_Function(PyObject* function)
    # A Python method in its two parts: borrowed references, good as long as the method is.
    bint PyMethod_Check(object method)
    PyObject* PyMethod_GET_FUNCTION(object method)
    PyObject* PyMethod_GET_SELF(object method)
    # Borrowed; NULL where no exception is set.
    PyObject* PyErr_Occurred()
    # No checks of type or index; borrowed.
    PyObject* PyList_GET_ITEM(object list, Py_ssize_t index)
    Py_ssize_t PyList_GET_SIZE(object list)

cdef extern from *:
    """
    /* What CPython itself looks methods up with, exported by every version, but in no public header. */
    PyAPI_FUNC(int) _PyObject_GetMethod(PyObject *, PyObject *, PyObject **);
    """
    # Looks up an attribute. Stores a new reference and gives 1 where it is a method's function that is not bound
    # yet, else 0; stores NULL with an exception set where there is none.
    int _PyObject_GetMethod(PyObject* instance, PyObject* name, PyObject** found)

cdef tuple COMMIT = ("commit",)


# Calling


cdef int failed() except -1:
    """Raise the exception that is set."""
    if PyErr_Occurred() is NULL:  # CPython forgets the error where memory runs out in a frame
        raise SystemError("a handler failed without an exception")
    return -1


cdef object look_up(object bus, str name, bint* method):
    """Look a hook up as a call would do it: a function that is a method's is not bound."""
    cdef PyObject* found = NULL
    method[0] = _PyObject_GetMethod(<PyObject*>bus, <PyObject*>name, &found)
    if found is NULL:
        failed()
    hook = <object>found
    Py_DECREF(hook)
    return hook


cdef int check(object function, object result) except -1:
    """Refuse what a handler returned, if it would only act when it is run."""
    if result is not None:
        _notes.refuse_coroutine(function, result)
    return 0


cdef inline int finish(object function, PyObject* result) except -1:
    """Take over what a call gave: NULL and an exception, None, or anything else."""
    if result == <PyObject*>None:
        Py_DECREF(None)
        return 0
    if result is NULL:
        return failed()
    taken = <object>result
    Py_DECREF(taken)
    return check(function, taken)


cdef inline int call_event_inline(object event, object commit) except -1:
    cdef PyObject* stack[2]
    cdef vectorcallfunc vectorcall
    if type(event) is SideEffectCall:
        return finish(event, (<SideEffectCall>event).call(<PyObject*>commit))
    stack[0] = NULL
    stack[1] = <PyObject*>commit
    # Directly: PyObject_Vectorcall also looks up the thread's state and checks the result, which takes a fifth
    # longer for a plain function.
    vectorcall = PyVectorcall_Function(<PyObject*>event)
    if vectorcall is NULL:
        vectorcall = PyObject_Vectorcall
    return finish(event, vectorcall(<PyObject*>event, stack + 1, PY_VECTORCALL_ARGUMENTS_OFFSET, <PyObject*>COMMIT))


cdef int call_event(object event, object commit) except -1:
    """Call an event as ``event(commit=commit)``."""
    return call_event_inline(event, commit)


cdef int call_events(list batch, Progress* at, Handling* how) except -1:
    """Call the events of a batch that are not done."""
    commit = <object>how.commit
    # The size is read each time: somebody may find the list by the garbage collector, and clear it.
    while at.done < PyList_GET_SIZE(batch):
        event = <object>PyList_GET_ITEM(batch, at.done)
        call_event_inline(event, commit)
        at.done += 1
    return 0


cdef int call_handler(object bus, Handling* how, list batch, Progress* at) except -1:
    """Call ``hook(event, commit)`` for the events of a batch that are not done; a method's with its bus first."""
    cdef PyObject* stack[4]
    cdef PyObject** arguments = stack + 1
    cdef PyObject* function = how.hook
    cdef size_t count = 2
    cdef vectorcallfunc vectorcall
    handler = <object>function
    if how.method:
        stack[1] = <PyObject*>bus
        count = 3
    elif PyMethod_Check(handler):
        # Unpacked once here, not once for each event: `handler` keeps both alive.
        function = PyMethod_GET_FUNCTION(handler)
        stack[1] = PyMethod_GET_SELF(handler)
        count = 3
    # Looked up once: PyObject_Vectorcall would look it up, with the thread's state, for each event, which is
    # a tenth of the time of a call.
    vectorcall = PyVectorcall_Function(function)
    if vectorcall is NULL:
        vectorcall = PyObject_Vectorcall
    stack[0] = NULL
    stack[count] = how.commit
    while at.done < PyList_GET_SIZE(batch):
        event = <object>PyList_GET_ITEM(batch, at.done)
        stack[count - 1] = <PyObject*>event
        finish(handler, vectorcall(function, arguments, count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL))
        at.done += 1
    return 0


# Middleware


@cython.final
cdef class Surrounding:
    """What runs around every event, in a tuple; None where nothing does. An object, as that has a critical section."""

    cdef object stack


cdef Surrounding surrounding = Surrounding()
# Whether anything does: looked at for each apply without a section.
cdef bint surrounded = False


def use_middleware(stack):
    """Run these around every event from the next apply on."""
    global surrounded
    with cython.critical_section(surrounding):
        surrounding.stack = stack
        surrounded = stack is not None


tell_changes(use_middleware)


cdef object middleware_now():
    """Give what runs around every event, or None; read once, as another thread may take it away."""
    if not surrounded:
        return None
    with cython.critical_section(surrounding):
        return surrounding.stack


@cython.final
@cython.freelist(16)
cdef class Call:
    """As in `commitbus.middleware`."""

    # None once it was called, or the middleware that it was given to has returned.
    cdef tuple stack
    # Of the next one.
    cdef Py_ssize_t number
    cdef object handler, bus, event, commit

    def __call__(self):
        """Go on, once."""
        cdef tuple stack = self.stack
        self.stack = None
        if stack is None:
            raise _messages.called_again()
        go_on(stack, self.number, self.handler, self.bus, self.event, self.commit)


cdef int go_on(tuple stack, Py_ssize_t number, object handler, object bus, object event, object commit) except -1:
    """Run a middleware, with the next ones and the handler within it; after the last one, the handler."""
    cdef Call rest
    if number == len(stack):
        return check(handler, handler(event, commit))
    rest = Call.__new__(Call)
    rest.stack = stack
    rest.number = number + 1
    rest.handler = handler
    rest.bus = bus
    rest.event = event
    rest.commit = commit
    function = stack[number]
    try:
        result = function(rest, bus, event, commit)
    finally:
        rest.stack = None
    if result is not None:
        _notes.refuse_coroutine(function, result, _notes.ASYNC_MIDDLEWARE)
        raise _messages.middleware_returned(function, result)
    return 0


@cython.final
cdef class Surrounded:
    """A handler with the middleware around it."""

    cdef tuple stack
    cdef object bus, handler

    def __call__(self, event, commit):
        go_on(self.stack, 0, self.handler, self.bus, event, commit)


cdef object surround(tuple stack, object bus, object handler):
    """Make of a handler one that runs the middleware around it."""
    cdef Surrounded made = Surrounded.__new__(Surrounded)
    made.stack = stack
    made.bus = bus
    made.handler = handler
    return made
