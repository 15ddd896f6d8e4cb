# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""A batch: what one apply took out of a bus, how it is run, and what is left of it when it is stopped.

A batch is a list that an apply took out of a bus: nobody else has it, so each event in it is applied by
that apply or put back. `Progress` says how far it came. C code is not interrupted between a
handler's return and the count.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF

from commitbus._compiled.side_effects cimport SideEffectCall

from commitbus import _messages, _notes
from commitbus._batch import GONE as _GONE
from commitbus._batch import SPARSE as _SPARSE
from commitbus._failures import Failures
from commitbus._rounds import check_rounds, in_rounds, leave
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
    # How many an iterator has left: of a list's own, without any Python code.
    Py_ssize_t PyObject_LengthHint(object iterator, Py_ssize_t otherwise) except -1

cdef extern from *:
    """
    /* What CPython itself looks methods up with, exported by every version, but in no public header. */
    PyAPI_FUNC(int) _PyObject_GetMethod(PyObject *, PyObject *, PyObject **);
    """
    # Looks up an attribute. Stores a new reference and gives 1 where it is a method's function that is not bound
    # yet, else 0; stores NULL with an exception set where there is none.
    int _PyObject_GetMethod(PyObject* instance, PyObject* name, PyObject** found)

cdef tuple COMMIT = ("commit",)
cdef object GONE = _GONE, SPARSE = _SPARSE


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


cdef int call_events(list batch, Progress* at, object commit) except -1:
    """Call the events of a batch that are not done."""
    # The size is read each time: somebody may find the list by the garbage collector, and clear it.
    while at.done < PyList_GET_SIZE(batch):
        event = <object>PyList_GET_ITEM(batch, at.done)
        call_event_inline(event, commit)
        at.done += 1
    return 0


cdef int call_handler(object bus, object handler, bint method, list batch, Progress* at, object commit) except -1:
    """Call ``handler(event, commit)`` for the events of a batch that are not done; a method's with its bus first."""
    cdef PyObject* stack[4]
    cdef PyObject** arguments = stack + 1
    cdef PyObject* function = <PyObject*>handler
    cdef size_t count = 2
    cdef vectorcallfunc vectorcall
    if method:
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
    stack[count] = <PyObject*>commit
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


# Where a batch comes from


cdef class Source:
    cdef object hook(self, bint* method):
        raise NotImplementedError

    cdef object surrounded(self, object hook, bint* method, object stack):
        raise NotImplementedError

    cdef list take(self, Py_ssize_t* head):
        raise NotImplementedError

    cdef int run(
        self, object hook, bint method, list batch, Progress* at, object commit, object failures, list out
    ) except -1:
        raise NotImplementedError

    cdef int put_back(self, list batch, Py_ssize_t head, Py_ssize_t begun) except -1:
        raise NotImplementedError

    cdef int register(self) except -1:
        raise NotImplementedError

    cdef object scope(self, object commit):
        return None

    cdef bint surrounds(self) noexcept:
        return False

    cdef bint goes_on(self) noexcept:
        return True

    cdef bint holds_buses(self) noexcept:
        return True

    # For `commitbus.aio`, whose loops are coroutines: what they leave is assigned here. See `commitbus._batch`.

    @property
    def _commitbus_left(self):
        return None

    @_commitbus_left.setter
    def _commitbus_left(self, batch):
        cdef list events = batch.events
        cdef Py_ssize_t begun = 0, count = PyList_GET_SIZE(events), i, kept = 0
        if batch.iterator is SPARSE:
            begun = batch.event
            done = 0
            for i in range(count):
                if PyList_GET_ITEM(events, i) == <PyObject*>GONE:
                    if i < begun:
                        done += 1
                else:
                    events[kept] = events[i]
                    kept += 1
            batch.event = None
            if kept < count:
                del events[kept:]
            if kept:
                self.put_back(events, 0, begun - done)
            return
        begun = count - PyObject_LengthHint(batch.iterator, 0)
        done = begun
        if done > 0 and (batch.event is not None or PyList_GET_ITEM(events, done - 1) == <PyObject*>None):
            done -= 1
        # What `_commitbus_settle` gives, which comes when the list is in order already.
        batch.event = (<object>PyList_GET_ITEM(events, done) if done < count else None, done, count, begun > done)
        put_back(self, events, 0, done, None)

    def _commitbus_settle(self, batch):
        """See to a batch that `commitbus.aio` has put back; give its event, position, of how many, and if tried."""
        return batch.event or (None, 0, 0, False)


# Making a bus or a delayed one


cdef extern from "Python.h":
    ctypedef struct PyTypeObject
    ctypedef object (*newfunc)(PyTypeObject*, object, PyObject*)
    ctypedef struct PyTypeObject:
        # Returns a new reference, or NULL with an exception set.
        newfunc tp_new
        void* tp_init
    Py_ssize_t PyTuple_GET_SIZE(object tuple)

cdef extern from *:
    """
    #if PY_VERSION_HEX >= 0x030C0000 && PY_VERSION_HEX < 0x030D0000
    /* 3.12 makes room for an instance's attributes in object.__new__ alone, which Cython passes over; without it, the
       interpreter specialises no look-up on the instance. So the allocation, which comes first of all, is led there. */
    static PyObject *allocate_as_object(PyTypeObject *cls, Py_ssize_t items) {
        static PyObject *no_arguments = NULL;
        cls->tp_alloc = PyType_GenericAlloc;
        if (no_arguments == NULL && (no_arguments = PyTuple_New(0)) == NULL) return NULL;
        return PyBaseObject_Type.tp_new(cls, no_arguments, NULL);
    }
    static PyObject *call_new(newfunc function, PyTypeObject *cls, PyObject *args, PyObject *kwargs) {
        PyObject *made;
        if (cls->tp_alloc == PyType_GenericAlloc) cls->tp_alloc = allocate_as_object;
        made = function(cls, args, kwargs);
        if (cls->tp_alloc == allocate_as_object) cls->tp_alloc = PyType_GenericAlloc;  /* an abstract class */
        return made;
    }
    #else
    #define call_new(function, cls, args, kwargs) function(cls, args, kwargs)
    #endif
    """
    object call_new(newfunc function, PyTypeObject* cls, object args, PyObject* kwargs)


cdef newfunc new_unchecked = (<PyTypeObject*>Source).tp_new


cdef object new(PyTypeObject* cls, object args, PyObject* kwargs):
    """Make an instance of a class below `Source`; refuse arguments that no __init__ takes.

    Here, since ``__cinit__(self, *args, **kwargs)`` would make a dict for each bus: a thirtieth of a request.
    """
    if PyTuple_GET_SIZE(args) or (kwargs is not NULL and <dict>kwargs):
        if cls.tp_init == (<PyTypeObject*>object).tp_init:
            raise _messages.no_arguments(<object>cls)
    return call_new(new_unchecked, cls, args, kwargs)


(<PyTypeObject*>Source).tp_new = new


# Applying


cdef list carry_out(Source source, object bus, object commit, object failures, list out):
    """Apply what is pending in a source: the one path behind every apply.

    `bus` is named in notes. `failures` is None, or the `Failures` that a robust apply fills, or an empty list to which
    these are added once something has failed. `out` gathers the events that multi buses apply. Returns the events that
    were applied.
    """
    cdef Py_ssize_t begin = 0
    cdef Progress at
    cdef Py_ssize_t before = 0
    cdef bint owned = True  # whether the batch is this apply's own: not once it was put back
    cdef list applied = None
    cdef bint method = False
    hook = source.hook(&method)
    if surrounded:
        with cython.critical_section(surrounding):  # read once: another thread may take it away
            stack = surrounding.stack
        if stack is not None:
            hook = source.surrounded(hook, &method, stack)
    cdef list batch = source.take(&begin)
    if batch is None:
        return []
    at.done = begin
    at.width = at.span = 1
    scope = None
    try:
        scope = source.scope(commit)
        if scope is not None:
            scope.enter()
        if failures is None:
            source.run(hook, method, batch, &at, commit, None, out)
        elif type(failures) is list:
            failures = run_first(source, hook, method, bus, batch, begin, &at, commit, failures, out)
        else:
            before = len(failures.errors)
            run_robustly(source, hook, method, bus, batch, begin, &at, commit, failures, out)
        if failures is not None:
            if failures.positions:
                applied = applied_of(batch, begin, at.done, failures.positions)
                if failures.rounds is not None:
                    failures.set_aside(bus, batch)
                owned = False
                put_back(source, batch, begin, at.done, failures)
        if applied is None:
            applied = batch if begin == 0 else batch[begin:]
        owned = False
        if scope is not None:
            if failures is None and scope.stack is None:
                scope.leave(None)  # nothing was entered
            elif leave(scope, bus, failures, before):
                del failures.errors[before:]
        return applied
    except BaseException as error:
        if owned:
            if type(failures) is list:
                failures = failures[0] if failures else None
            applied = stopped(source, bus, batch, begin, &at, failures, error, scope is not None)
        if scope is not None and not scope.over and scope.leave(error):
            return applied
        raise error  # and not only `raise`, which would bring back the frames that were dropped
    finally:
        if scope is not None:
            scope.over = True


cdef list apply_all(Source source, object bus, object commit, object robust, object rounds, list out):
    """Apply what is pending, robustly or in several rounds; raises what failed."""
    cdef list failures = None
    cdef list applied
    if rounds != 1:
        check_rounds(rounds)
        if robust or source.surrounds():
            return apply_in_rounds(source, bus, commit, robust, rounds, out)
    else:
        # Of a bus of events, nothing is made before something fails.
        failures = [Failures()] if source.holds_buses() else []
    try:
        applied = carry_out(source, bus, commit, failures[0] if failures else failures, out)
    except BaseException as error:
        _notes.drop_own_frames(error)
        raise error
    if failures is None:
        if applied and source.goes_on():
            applied += apply_in_rounds(source, bus, commit, robust, rounds - 1, out)
    elif failures and failures[0].errors:
        raise failures[0].end(bus)
    return applied


cdef list apply_in_rounds(Source source, object bus, object commit, object robust, object rounds, list out):
    # Not where it is called from: a function with a closure in it takes a tenth longer for one event.
    scope = source.scope(commit)
    return in_rounds(bus, rounds, robust, scope, lambda failures: carry_out(source, bus, commit, failures, out))


cdef object run_first(
    Source source,
    object hook,
    bint method,
    object bus,
    list batch,
    Py_ssize_t begin,
    Progress* at,
    object commit,
    list made,
    list out,
):
    """Run a batch as long as nothing fails; then go on robustly, and give the `Failures`, which are added to `made`."""
    try:
        source.run(hook, method, batch, at, commit, None, out)
        return None
    except Exception as error:
        failures = Failures()
        failures.start(bus, batch, begin, event_at(batch, begin))
        made.append(failures)
        failed_at(bus, batch, at, failures, error)
    run_robustly(source, hook, method, bus, batch, begin, at, commit, failures, out)
    return failures


cdef int run_robustly(
    Source source,
    object hook,
    bint method,
    object bus,
    list batch,
    Py_ssize_t begin,
    Progress* at,
    object commit,
    object failures,
    list out,
) except -1:
    """Run a batch to its end, whatever `Exception` its events raise."""
    if at.done == begin:
        at.done += failures.start(bus, batch, begin, event_at(batch, begin))
    while True:
        known = len(failures.errors)
        try:
            if source.run(hook, method, batch, at, commit, failures, out) == 0:
                return 0
            note_failed(bus, batch, at, failures, at.done - 1, known)
        except Exception as error:
            failed_at(bus, batch, at, failures, error)


cdef int failed_at(object bus, list batch, Progress* at, object failures, object error) except -1:
    """Count the events that have failed with an error, and note it."""
    cdef Py_ssize_t first = at.done
    failures.positions.extend(range(first, first + at.width))
    at.done += at.width
    failures.errors.append(error)
    return note_failed(bus, batch, at, failures, first, len(failures.errors) - 1)


cdef int note_failed(
    object bus, list batch, Progress* at, object failures, Py_ssize_t first, Py_ssize_t known
) except -1:
    try:
        for error in failures.errors[known:]:
            _notes.drop_own_frames(error)
        failures.note(known, bus, event_at(batch, first), first, at.width, at.span)
    except Exception:
        pass  # where there is no stack left, that costs a note
    at.width = at.span = 1
    return 0


cdef list stopped(
    Source source,
    object bus,
    list batch,
    Py_ssize_t begin,
    Progress* at,
    object failures,
    object error,
    bint swallowing,
):
    """Put back what was not applied, then make the note. Gives what was applied, if that may be asked for."""
    cdef Py_ssize_t count = PyList_GET_SIZE(batch) - begin
    cdef bint left = at.done < PyList_GET_SIZE(batch)
    cdef list applied = None
    event = event_at(batch, at.done)
    if swallowing:
        try:
            applied = applied_of(batch, begin, at.done, () if failures is None else failures.positions)
        except MemoryError:
            applied = []
    # First of all: whatever raises from here on costs a note, but no event.
    put_back(source, batch, begin, at.done, failures)
    try:
        _notes.drop_own_frames(error)
        if left:
            earlier = 0 if failures is None else len(failures.positions)
            place = (at.done - begin, at.width, at.span, count)
            _notes.note_stopped(error, bus, event, place, earlier)
        if failures is not None and not isinstance(error, Exception):
            failures.chain(error, bus)
    except Exception:
        pass
    return applied


cdef int put_back(Source source, list batch, Py_ssize_t begin, Py_ssize_t done, object failures) except -1:
    """Put back what failed, then what was not tried; drop the references to what was applied.

    Nothing is copied, and no memory is needed: an apply that is resumed after each of many failures would
    otherwise take time by the square of their number.
    """
    cdef Py_ssize_t size = PyList_GET_SIZE(batch)
    cdef Py_ssize_t head, begun, position
    head = done = min(done, size)
    if failures is not None:
        for position in reversed(failures.positions):
            if position < done:  # else something was raised between its failure and the count
                head -= 1
                batch[head] = batch[position]
    begun = done - head + (1 if done < size else 0)
    # What goes now may run a finalizer, and that may find the list, and clear it.
    position = begin
    while position < head and position < PyList_GET_SIZE(batch):
        batch[position] = None
        position += 1
    if head > size // 2:
        try:
            del batch[:head]
            head = 0
        except MemoryError:
            pass
    if head < PyList_GET_SIZE(batch):
        source.put_back(batch, head, begun)
    return 0


cdef list applied_of(list batch, Py_ssize_t begin, Py_ssize_t done, object positions):
    failed = set(positions)
    return [batch[i] for i in range(begin, min(done, len(batch))) if i not in failed]


cdef object event_at(list batch, Py_ssize_t position):
    """Give the event at a position, or None where there is none."""
    return event_of(<object>PyList_GET_ITEM(batch, position)) if position < PyList_GET_SIZE(batch) else None


@cython.final
cdef class Pair:
    pass


cdef object event_of(object item):
    return (<Pair>item).pair[0] if type(item) is Pair else item


cdef list events_of(list items):
    return [event_of(item) for item in items]


cdef object explicit(tuple pair):
    cdef Pair item = Pair.__new__(Pair)
    item.pair = pair
    return item
