# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""A batch: where it comes from, and how what is left of it goes back when an apply is stopped.

A batch is a list that an apply took out of a bus: nobody else has it, so each event in it is applied by that apply or
put back. `Progress` says how far it came.
"""

cimport cython
from cpython.object cimport PyObject

from commitbus import _messages
from commitbus._batch import GONE as _GONE
from commitbus._batch import SPARSE as _SPARSE


cdef extern from "Python.h":
    # No checks of type or index; borrowed.
    PyObject* PyList_GET_ITEM(object list, Py_ssize_t index)
    Py_ssize_t PyList_GET_SIZE(object list)
    # How many an iterator has left: of a list's own, without any Python code.
    Py_ssize_t PyObject_LengthHint(object iterator, Py_ssize_t otherwise) except -1

cdef object GONE = _GONE, SPARSE = _SPARSE


# Where a batch comes from


cdef class Source:
    cdef object hook(self, bint* method):
        raise NotImplementedError

    cdef object surrounded(self, object hook, bint* method, object stack):
        raise NotImplementedError

    cdef list take(self, Py_ssize_t* head):
        raise NotImplementedError

    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1:
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


# What is left


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


cdef list applied_of(list batch, Progress* at, object positions):
    """List those of a batch's events that are done."""
    failed = set(positions)
    return [batch[i] for i in range(at.begin, min(at.done, len(batch))) if i not in failed]


cdef object event_at(list batch, Py_ssize_t position):
    """Give the event at a position, or None where there is none."""
    return event_of(<object>PyList_GET_ITEM(batch, position)) if position < PyList_GET_SIZE(batch) else None


@cython.final
cdef class Pair:
    pass


cdef object event_of(object item):
    return (<Pair>item).pair[0] if type(item) is Pair else item


cdef list events_of(list items):
    # A loop, as wherever a list is made of what is made here: the list comprehension of Cython 3.3 lets go of such an
    # item twice where the list cannot grow. `tests/test_build.py` looks for it.
    cdef list events = []
    for item in items:
        events.append(event_of(item))
    return events


cdef object explicit(tuple pair):
    cdef Pair item = Pair.__new__(Pair)
    item.pair = pair
    return item
