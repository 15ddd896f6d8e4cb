from commitbus._compiled.batch cimport Progress, Source


cdef list carry_out(Source source, object bus, object commit, object failures, list out)
cdef list apply_all(Source source, object bus, object commit, object robust, object rounds, list out)
cdef int stopped(Source source, object bus, list batch, Progress* at, object failures, object error) except -1
