from cpython.object cimport PyObject


cdef class SideEffectCall:
    # The function, then the positional arguments, then the values of the keyword arguments.
    cdef tuple values
    # The names of the keyword arguments, then "commit".
    cdef tuple names
    # How many of `values` are not keyword arguments.
    cdef Py_ssize_t positional
    # Whether it was made by `if_committed`: then the names are without "commit".
    cdef bint conditional
    cdef object __weakref__

    # Calls the function. Returns a new reference, or NULL with an exception set.
    cdef PyObject* call(self, PyObject* commit) except? NULL
    cdef tuple key(self)
    cdef dict keywords(self)
