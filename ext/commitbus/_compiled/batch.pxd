from cpython.object cimport PyObject


cdef struct Progress:
    # How far an apply came in its batch: the position of the first event that is not finished, and of the first.
    Py_ssize_t done
    Py_ssize_t begin
    # The events from `done` on that are tried together, and fail together; and how many they were at first. One,
    # but on a `BatchEventBus`.
    Py_ssize_t width
    Py_ssize_t span


cdef struct Handling:
    # What carries an event out, and whether that is the function of a method; what it is given; and the list that
    # gathers the events that multi buses apply, or None. Borrowed from `carry_out`, which has them as long as this.
    PyObject* hook
    PyObject* commit
    PyObject* out
    bint method


cdef class Source:
    """Where an apply takes its batch from, and puts back what is left of it."""

    # What carries an event out: looked up once an apply, before anything is taken. Where `method` is set, it is
    # the function of a method, to be called with its bus first: binding it for each apply is a tenth of a request.
    cdef object hook(self, bint* method)
    # Gives a hook that runs the middleware around that one.
    cdef object surrounded(self, object hook, bint* method, object stack)
    # Takes all that is pending, of which the events before `head` are done and None; None when there is none.
    cdef list take(self, Py_ssize_t* head)
    # Runs a batch from `at.done` on, up to the first event that fails. Gives 0 at the end; 1 after a bus that has
    # added its errors to `failures`, where its position is then, too.
    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1
    # Puts a batch back, from `head` on. `begun` is how many of these were tried: they come first.
    cdef int put_back(self, list batch, Py_ssize_t head, Py_ssize_t begun) except -1
    # Registers again with the multi bus that let go of it last.
    cdef int register(self) except -1
    # What surrounds the handlers, or None; and whether anything ever does.
    cdef object scope(self, object commit)
    cdef bint surrounds(self) noexcept
    # Whether there may be anything to apply in another round.
    cdef bint goes_on(self) noexcept
    # Whether what is applied are buses, whose own failures count.
    cdef bint holds_buses(self) noexcept


cdef class Pair:
    """An event in a list of collected ones whose callable is not the default one."""

    # The event and its callable. A bare event stands for itself and the default one.
    cdef tuple pair


cdef int put_back(Source source, list batch, Py_ssize_t begin, Py_ssize_t done, object failures) except -1
cdef list applied_of(list batch, Progress* at, object positions)
cdef object event_of(object item)
cdef object event_at(list batch, Py_ssize_t position)
cdef list events_of(list items)
cdef object explicit(tuple pair)
