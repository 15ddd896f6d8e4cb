from commitbus._compiled.event_bus cimport EventStore


cdef class PairStore(EventStore):
    # The bus whose events these are; None until it is set.
    cdef EventStore wraps
    # The delayed bus that collected them, by a weak reference; None for a copy.
    cdef object collector
    # Whether there ever was a `Pair` among them: set before it goes in, read after a batch was taken.
    cdef bint mixed

    cdef EventStore wrapped(self)
    cdef tuple pair_of(self, object item)
