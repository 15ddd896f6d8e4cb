from commitbus._compiled.delayed_event_bus cimport DelayedStore
from commitbus._compiled.event_bus cimport EventStore


cdef class MultiStore(EventStore):
    # The batch of buses that an apply has taken and not finished, or None; and those of other applies at once.
    cdef list running
    cdef list others
    # Whether it was ever applied.
    cdef bint applied

    cdef list gather(self, object commit, object robust, object rounds)
    cdef bint is_plain(self, bint awaited) except -1
    cdef list items_from(self, Py_ssize_t position)
    cdef int begin(self, list batch) except -1
    cdef int finish(self, list batch) except -1
    # Gives 1 where the bus keeps what failed in it.
    cdef int turn(self, DelayedStore delayed, object ref, object commit, object failures, list out) except -1
