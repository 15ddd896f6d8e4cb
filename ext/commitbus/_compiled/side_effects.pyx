# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`SideEffectCall`."""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.string cimport memcpy

from types import MappingProxyType

from commitbus import _messages, _naming, _state


cdef extern from "Python.h":
    const size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    # Returns a new reference, or NULL with an exception set. The arguments stay the caller's. With
    # the offset flag the callee may use args[-1] for a while, which saves it a copy.
    PyObject* PyObject_Vectorcall(PyObject* function, PyObject* const* args, size_t count, PyObject* names)
    ctypedef PyObject* (*vectorcallfunc)(PyObject*, PyObject* const*, size_t, PyObject*)
    ctypedef struct PyTypeObject
    ctypedef object (*newfunc)(PyTypeObject*, object, PyObject*)
    ctypedef struct PyTypeObject:
        const char* tp_name
        # These return a new reference, or NULL with an exception set.
        newfunc tp_new
        vectorcallfunc tp_vectorcall
    ctypedef struct PyTupleObject:
        PyObject* ob_item[1]
    Py_ssize_t PyTuple_GET_SIZE(object tuple)
    int PyObject_IsTrue(PyObject* value) except -1
    ctypedef PyObject* (*PyCFunction)(PyObject*, PyObject*)
    ctypedef struct PyMethodDef:
        const char* ml_name
        PyCFunction ml_meth
        int ml_flags
        const char* ml_doc
    int METH_FASTCALL
    int METH_KEYWORDS
    object PyCFunction_NewEx(PyMethodDef* method, PyObject* self, object module)
    # Returns 1 with an exception set when the stack is too deep.
    int Py_EnterRecursiveCall(const char* where) except 1
    void Py_LeaveRecursiveCall()

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #define WITH_GIL 0
    #else
    #define WITH_GIL 1
    #endif
    """
    bint WITH_GIL

cdef extern from *:
    """
    #ifndef COMMITBUS_VERSION
    #define COMMITBUS_VERSION ""
    #endif
    """
    const char* COMMITBUS_VERSION

# That of the Python files that this was built with, or nothing: see `commitbus._compiled`.
version = COMMITBUS_VERSION.decode()

cdef enum:
    FEW = 10  # arguments that need no memory of their own

cdef tuple COMMIT = ("commit",)
cdef tuple EMPTY = ()
# What stands for an argument that was not given.
cdef object MISSING = _messages.MISSING


@cython.final
@cython.freelist(2000)
cdef class SideEffectCall:
    # The signature, then the text.
    "SideEffectCall(function, /, *args, **kwargs)\n--\n\n\
A function with its arguments, to be called with a ``commit`` of its own later."

    cdef PyObject* call(self, PyObject* commit) except? NULL:
        """Call the function; returns a new reference."""
        cdef PyObject* few[FEW]
        cdef PyObject** stack = few
        cdef Py_ssize_t count = PyTuple_GET_SIZE(self.values)
        cdef PyObject* names = <PyObject*>self.names
        cdef PyObject* result
        if self.conditional:
            if not PyObject_IsTrue(commit):
                Py_INCREF(None)
                return <PyObject*>None
            if PyTuple_GET_SIZE(self.names) == 0:
                names = NULL
        if count >= FEW:
            stack = <PyObject**>PyMem_Malloc((count + 1) * sizeof(PyObject*))
            if stack is NULL:
                raise MemoryError
        # `self` keeps what is in `values`, and whoever calls this keeps `self`. The function's own place
        # is the one that the offset flag lends.
        memcpy(stack, &(<PyTupleObject*>self.values).ob_item[0], count * sizeof(PyObject*))
        stack[count] = commit  # beyond the end of a conditional one
        result = PyObject_Vectorcall(
            stack[0], stack + 1, (self.positional - 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, names
        )
        if stack != few:
            PyMem_Free(stack)
        return result

    def __call__(self, *, commit=MISSING):
        """Call the function with its arguments and ``commit``."""
        if commit is MISSING:
            raise _messages.missing_arguments("SideEffectCall.__call__", "commit", kind="keyword-only")
        cdef PyObject* result = self.call(<PyObject*>commit)
        taken = <object>result
        Py_DECREF(taken)
        return taken

    @property
    def function(self):
        """The function."""
        return self.values[0]

    @property
    def args(self):
        """The positional arguments."""
        return self.values[1:self.positional]

    cdef dict keywords(self):
        return dict(zip(self.names, self.values[self.positional:]))

    @property
    def kwargs(self):
        """The keyword arguments, read only."""
        return MappingProxyType(self.keywords())

    def __setattr__(self, name, value):
        """Refuse: it is immutable."""
        raise _messages.immutable(name)

    def __delattr__(self, name):
        """Refuse: it is immutable."""
        raise _messages.immutable(name)

    cdef tuple key(self):
        """Give what a call is compared and hashed by, beside its keywords."""
        return self.values[:self.positional]

    def __eq__(self, other):
        """Compare by function and arguments."""
        if type(other) is not SideEffectCall:
            return NotImplemented
        cdef SideEffectCall call = other
        return self.conditional == call.conditional and self.key() == call.key() and self.keywords() == call.keywords()

    def __hash__(self):
        """Hash by function and arguments."""
        # CPython guards comparing and showing against calls that are nested too deeply, but not hashing.
        Py_EnterRecursiveCall(" while hashing a SideEffectCall")
        try:
            return hash((self.key(), frozenset(self.keywords().items()), self.conditional))
        finally:
            Py_LeaveRecursiveCall()

    def __repr__(self):
        """Show the function and the arguments as they were passed."""
        return _messages.call_repr(self.values[0], self.args, self.keywords(), self.conditional)

    def __copy__(self):
        """Return itself: it is immutable."""
        return self

    def __reduce__(self):
        """Take the call apart for `pickle`."""
        cls = "if_committed" if self.conditional else _state.reference(SideEffectCall)
        return _state.call, (cls, self.values[0], self.args, self.keywords())


# How a SideEffectCall is made: from a vector of arguments, as the interpreter has them. By way of a
# __cinit__, with a tuple and a dict, it took four times as long.

cdef newfunc allocate_call = (<PyTypeObject*>SideEffectCall).tp_new
# The names that were used last, and what was made of them: those of one place in the code are one tuple.
cdef tuple last_keywords = None
cdef tuple last_names = None


cdef SideEffectCall build_call(tuple values, Py_ssize_t positional, tuple keywords, bint conditional):
    global last_keywords, last_names
    cdef SideEffectCall call
    cdef tuple names = COMMIT
    if positional == 0:
        raise _messages.no_function("if_committed" if conditional else "SideEffectCall.__new__")
    if not callable(values[0]):
        raise _messages.not_a_function("if_committed" if conditional else "SideEffectCall", values[0])
    if conditional:
        names = EMPTY if keywords is None else keywords
    elif keywords is not None:
        if WITH_GIL and keywords is last_keywords:
            names = last_names
        else:
            if COMMIT[0] in keywords:
                raise _messages.commit_keyword()
            names = keywords + COMMIT
            if WITH_GIL:
                last_keywords = keywords
                last_names = names
    call = allocate_call(<PyTypeObject*>SideEffectCall, EMPTY, NULL)
    call.values = values
    call.names = names
    call.positional = positional
    call.conditional = conditional
    return call


cdef object new_call(PyObject* const* args, Py_ssize_t positional, PyObject* keywords, bint conditional):
    cdef Py_ssize_t count = positional
    cdef Py_ssize_t i
    if keywords is not NULL:
        count += PyTuple_GET_SIZE(<object>keywords)
    values = PyTuple_New(count)
    for i in range(count):
        # The tuple takes over a reference, and the caller keeps its own.
        Py_INCREF(<object>args[i])
        PyTuple_SET_ITEM(values, i, <object>args[i])
    return build_call(values, positional, None if keywords is NULL else <tuple>keywords, conditional)


cdef object vectorcall_new_call(PyObject* cls, PyObject* const* args, size_t nargsf, PyObject* keywords):
    return new_call(args, nargsf & ~PY_VECTORCALL_ARGUMENTS_OFFSET, keywords, False)


cdef object fastcall_if_committed(PyObject* self, PyObject* const* args, Py_ssize_t positional, PyObject* keywords):
    return new_call(args, positional, keywords, True)


cdef object tuple_new_call(PyTypeObject* cls, object args, PyObject* kwargs):
    cdef dict keywords = {} if kwargs is NULL else <dict>kwargs
    for name in keywords:
        if not isinstance(name, str):
            raise _messages.keyword_is_no_string()
    return build_call((*args, *keywords.values()), len(args), tuple(keywords) or None, False)


(<PyTypeObject*>SideEffectCall).tp_new = tuple_new_call
(<PyTypeObject*>SideEffectCall).tp_vectorcall = <vectorcallfunc>vectorcall_new_call

# An extension type takes its module from its name, and the name cannot be given in Cython.
(<PyTypeObject*>SideEffectCall).tp_name = "commitbus.side_effects.SideEffectCall"
_naming.see_through(SideEffectCall, SideEffectCall.function.__get__)

# As fast as a SideEffectCall: what `def` makes of *args and **kwargs takes twice as long.
cdef bytes if_committed_doc = \
    b"if_committed(function, /, *args, **kwargs)\n--\n\n\
Make a side effect of a function that knows nothing of ``commit``."
cdef PyMethodDef if_committed_method
if_committed_method.ml_name = b"if_committed"
if_committed_method.ml_meth = <PyCFunction><void*>fastcall_if_committed
if_committed_method.ml_flags = METH_FASTCALL | METH_KEYWORDS
if_committed_method.ml_doc = if_committed_doc
if_committed = PyCFunction_NewEx(&if_committed_method, NULL, "commitbus.side_effects")
