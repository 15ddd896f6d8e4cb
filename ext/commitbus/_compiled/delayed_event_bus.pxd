from commitbus._compiled.batch cimport Source
from commitbus._compiled.event_bus cimport EventStore
from commitbus._compiled.side_effects_bus cimport PairStore


cdef class DelayedStore(Source):
    # None until __init__.
    cdef EventStore actual
    # Whether the class of `actual` leaves `publish` as it is.
    cdef bint direct
    # The multi bus that let go of this bus last, by a weak reference, as nobody else could apply it: the next
    # event registers this bus there. None while it is registered.
    cdef object owner
    # Whether the wrapped bus was told of `owner`. Once only: another may let go of it later, and is then its owner.
    cdef bint linked
    # What was collected: None until something was.
    cdef PairStore collected
    # For `MultiStore.put_back`, within one call: whether it is among those that failed.
    cdef bint failed
    # The number of the savepoint, plus one, whose `Cover` has covered it last.
    cdef size_t cover_number
    cdef object __weakref__

    cdef int enclose(self, EventStore actual) except -1
    cdef EventStore wrapped(self)
    cdef PairStore collecting(self)
    cdef int keep_first(self, PairStore made) except -1
    cdef list collect(self, object commit)
    cdef list collect_with_care(self, object commit)
    cdef list collect_overridden(self, object commit)
    cdef list store(self, object collecting, list items, list events)
    # Gives 1 where what failed in it is left.
    cdef int turn(self, object ref, object commit, object failures, list out) except -1
    cdef list take_turn(self, object ref, object commit, Py_ssize_t* head, bint* mixed)
    cdef int let_go(self, object owner) except -1
    cdef bint is_shared(self) noexcept
    cdef int after_turn(self) except -1
    cdef int link(self) except -1
    cdef int hold(self) except -1
