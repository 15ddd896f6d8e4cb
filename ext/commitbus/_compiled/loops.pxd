from commitbus._compiled.batch cimport Handling, Progress


cdef int failed() except -1
cdef int check(object function, object result) except -1
cdef object look_up(object bus, str name, bint* method)
cdef int call_event(object event, object commit) except -1
cdef int call_events(list batch, Progress* at, Handling* how) except -1
cdef int call_handler(object bus, Handling* how, list batch, Progress* at) except -1
cdef object middleware_now()
cdef object surround(tuple stack, object bus, object handler)
