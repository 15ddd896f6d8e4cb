# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""What a savepoint covers of a multi bus in one pass: `commitbus._opened` has what a mark is, and when it is made."""

cimport cython
from cpython.object cimport PyObject
from libc.stdlib cimport free, malloc

from commitbus._compiled.delayed_event_bus cimport DelayedStore
from commitbus._compiled.event_bus cimport IS_PLAIN, EventStore, class_flags
from commitbus._compiled.multi_event_bus cimport MultiStore

from commitbus import _lock
from commitbus._compiled.event_bus import use_covers
from commitbus._compiled.multi_event_bus import use_cover
from commitbus._marks import Mark


cdef extern from "Python.h":
    # No checks of type or index; borrowed.
    PyObject* PyList_GET_ITEM(object list, Py_ssize_t index)
    Py_ssize_t PyList_GET_SIZE(object list)


cdef enum:
    MADE = -1  # into a mark
    DROPPED = -2


@cython.final
cdef class Cover:
    """What a savepoint covers of a multi bus: its plain buses, in one pass, and without an object for each.

    Where anything but publishing comes to one of them, a mark is made for it first, as all others have from the
    beginning: see `commitbus.savepoint`. What is here is called in the lock of the savepoints.
    """

    cdef object savepoint
    cdef MultiStore multi
    # How many of these had been made, this one included.
    cdef size_t number
    # The delayed buses that were registered; what covered the bus in each before, or None where nothing did; and where
    # what was published on that since begins, or what became of it.
    cdef Py_ssize_t count
    cdef list delayed, below
    cdef Py_ssize_t* starts

    def __dealloc__(self):
        free(self.starts)

    cdef list begin(self, size_t number):
        """Cover the plain ones of the delayed buses, and give the rest."""
        cdef Py_ssize_t i
        cdef DelayedStore delayed
        cdef EventStore actual
        cdef list rest = []
        for i in range(PyList_GET_SIZE(self.delayed)):
            delayed = <DelayedStore>PyList_GET_ITEM(self.delayed, i)
            actual = delayed.actual
            self.starts[i] = MADE
            if actual is None or actual.marks is not None or delayed.collected is not None:
                rest.append(delayed)
            elif not class_flags(actual) & IS_PLAIN:
                rest.append(delayed)
            elif delayed.cover_number != number:  # else it is registered twice
                delayed.cover_number = number
                if actual.cover is not None:
                    if self.below is None:
                        self.below = [None] * PyList_GET_SIZE(self.delayed)
                    self.below[i] = actual.cover
                with cython.critical_section(actual):
                    self.starts[i] = 0 if actual.pending is None else PyList_GET_SIZE(actual.pending)
                    actual.cover = self
            self.count += 1
        return rest

    def holds(self, DelayedStore delayed):
        """Whether it covers what a delayed bus wraps through that."""
        cdef Py_ssize_t i
        for i in range(PyList_GET_SIZE(self.delayed)):
            if PyList_GET_ITEM(self.delayed, i) == <PyObject*>delayed:
                return True
        return False

    def new_in(self, MultiStore multi):
        """List what was registered with a multi bus since or, where it covers another one, all of that."""
        cdef list now
        if multi is not self.multi or not self.count:
            return multi.items()
        # Mostly nothing but registering has come.
        now = multi.items_from(self.count) if self.is_beginning() else multi.items()
        if not now:
            return now
        known = {id(delayed) for delayed in self.delayed} if PyList_GET_SIZE(now) > 16 else None
        return [new for new in now if not (self.holds(new) if known is None else id(new) in known)]

    cdef bint is_beginning(self):
        """Whether what is registered begins with what was then."""
        cdef MultiStore multi = self.multi
        cdef Py_ssize_t j, left = 0, pending = 0
        with cython.critical_section(multi):
            if multi.left is not None:
                left = PyList_GET_SIZE(multi.left) - multi.head
            if multi.pending is not None:
                pending = PyList_GET_SIZE(multi.pending)
            if left + pending < self.count:
                return False
            for j in range(min(left, self.count)):
                if PyList_GET_ITEM(multi.left, multi.head + j) != PyList_GET_ITEM(self.delayed, j):
                    return False
            for j in range(left, self.count):
                if PyList_GET_ITEM(multi.pending, j - left) != PyList_GET_ITEM(self.delayed, j):
                    return False
        return True

    def later(self):
        """Give the savepoint that was opened last, if it covers one of the buses and is open; or None."""
        cdef Py_ssize_t i = 0
        cdef EventStore actual
        cdef Cover other
        last = None
        while i < self.count and covers_made != self.number:
            actual = (<DelayedStore>PyList_GET_ITEM(self.delayed, i)).actual
            if self.starts[i] != MADE and actual.cover is not self:
                other = actual.cover
                if other.savepoint._bus is None:
                    other.end()  # an interrupt has kept it from that
                    continue
                if last is None or other.savepoint._number > last._number:
                    last = other.savepoint
            i += 1
        return last

    def end(self):
        """Cover nothing any more."""
        cdef Py_ssize_t i
        cdef EventStore actual
        cdef list above = []
        for i in reversed(range(self.count)):
            if self.starts[i] != MADE:
                actual = (<DelayedStore>PyList_GET_ITEM(self.delayed, i)).actual
                if actual.cover is self:
                    with cython.critical_section(actual):
                        actual.cover = self.before(i)
                    self.starts[i] = MADE
                else:
                    above.append(actual)
        for actual in above:  # by one that an interrupt has left; what has ended is left out of marks
            make_marks(actual)
        self.count = 0
        self.delayed, self.below = [], None

    cdef object before(self, Py_ssize_t i):
        """Give what covered a bus before."""
        return None if self.below is None else <object>PyList_GET_ITEM(self.below, i)

    def drop(self):
        """Drop what was published since, and give it."""
        cdef Py_ssize_t i
        cdef list dropped = []
        cdef EventStore actual
        for i in range(self.count):
            if self.starts[i] >= 0:
                actual = (<DelayedStore>PyList_GET_ITEM(self.delayed, i)).actual
                if actual.pending is not None and PyList_GET_SIZE(actual.pending) > self.starts[i]:
                    dropped += actual._commitbus_cut(self.starts[i], ())
                if self.starts[i] != MADE:  # by a finalizer, meanwhile
                    self.starts[i] = DROPPED
        return dropped

    def make_marks(self):
        """Make marks for all."""
        cdef Py_ssize_t i
        for i in range(self.count):
            if self.starts[i] != MADE:
                make_marks((<DelayedStore>PyList_GET_ITEM(self.delayed, i)).actual)


cdef size_t covers_made = 0


def cover_plain(MultiStore multi, savepoint):
    """Cover the plain buses that are registered, and give the others, and those whose turn is under way."""
    global covers_made
    cdef Cover cover = Cover.__new__(Cover)
    cdef list rest
    if savepoint._covered is not None:  # that of the outer multi bus
        return [*multi.items(), *(delayed for batch in multi._commitbus_running() for delayed in batch)]
    covers_made += 1
    cover.number = covers_made
    cover.savepoint = savepoint
    cover.multi = multi
    # What is registered from here on, by a finalizer say, is newer.
    cover.delayed = multi.items()
    cover.starts = <Py_ssize_t*>malloc(max(PyList_GET_SIZE(cover.delayed), 1) * sizeof(Py_ssize_t))
    if cover.starts is NULL:
        raise MemoryError
    savepoint._covered = cover  # who ends that ends this, however far it comes
    rest = cover.begin(savepoint._number + 1)  # a delayed bus that was never covered has 0
    for batch in multi._commitbus_running():
        rest += batch
    return rest


def make_marks(EventStore bus):
    """Make marks of all that covers a bus."""
    cdef Cover cover
    cdef Py_ssize_t i
    cdef list found = [], marks = []
    cdef tuple made
    with _lock.lock:
        top = bus.cover
        cover = top
        while cover is not None:
            below = None
            for i in reversed(range(cover.count)):
                if cover.starts[i] != MADE and (<DelayedStore>PyList_GET_ITEM(cover.delayed, i)).actual is bus:
                    found.append((cover, i))
                    below = cover.before(i)
            cover = below
        for cover, i in reversed(found):
            if cover.savepoint._bus is not None:
                delayed = cover.delayed[i]
                dropped = cover.starts[i] == DROPPED
                marks.append(Mark(cover.savepoint, delayed, 0 if dropped else cover.starts[i]))
                cover.savepoint._adopt(cover.multi, delayed, dropped)
        made = (bus.marks or ()) + tuple(marks)
        if bus.cover is not top:  # a finalizer has come here meanwhile
            return
        for cover, i in found:
            cover.starts[i] = MADE
        with cython.critical_section(bus):
            bus.marks = made or None
            bus.cover = None


use_covers(make_marks)
use_cover(cover_plain)
