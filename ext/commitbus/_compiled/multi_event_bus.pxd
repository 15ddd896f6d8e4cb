from commitbus._compiled.delayed_event_bus cimport DelayedStore
from commitbus._compiled.event_bus cimport EventStore


cdef class MultiStore(EventStore):
    # The batches of buses that applies have taken and not finished: None while there was none.
    cdef list running

    # Gives 1 where the bus keeps what failed in it.
    cdef int turn(self, DelayedStore delayed, object ref, object commit, object failures, list out) except -1
