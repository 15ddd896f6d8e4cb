# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`BatchEventBus`: documented in `commitbus._pure.batch_event_bus`."""

cimport cython

from commitbus._compiled.batch cimport Handling, Progress
from commitbus._compiled.loops cimport call_handler, check, look_up, surround
from commitbus._compiled.event_bus cimport EventStore

from abc import abstractmethod

from commitbus import _messages, _notes
from commitbus._compiled.event_bus import EXTENSION_TYPES, AbstractEventBus
from commitbus._interfaces import PartlyApplied, T


cdef extern from "Python.h":
    Py_ssize_t PyList_GET_SIZE(object list)


@cython.final
cdef class Batches:
    """The hook of a bus that takes its events many at a time."""

    cdef object function
    # How many at most; 0 for all.
    cdef Py_ssize_t size


cdef Batches batches(object function, Py_ssize_t size):
    cdef Batches made = Batches.__new__(Batches)
    made.function = function
    made.size = size
    return made


cdef class BatchStore(EventStore):
    cdef bint differs  # as in `CallableStore`

    batch_size = None

    cdef object hook(self, bint* method):
        hook = look_up(self, "_apply_event", method)
        if not (method[0] and hook is APPLY_ONE):
            return hook
        method[0] = False
        return batches(self._apply_events, _messages.checked_batch_size(self, self.batch_size))

    cdef object surrounded(self, object hook, bint* method, object stack):
        if type(hook) is Batches:
            return batches(surround(stack, self, (<Batches>hook).function), (<Batches>hook).size)
        return EventStore.surrounded(self, hook, method, stack)

    cdef int run(self, Handling* how, list batch, Progress* at, object failures) except -1:
        cdef Py_ssize_t end
        cdef Py_ssize_t size
        hook, commit = <object>how.hook, <object>how.commit
        if type(hook) is not Batches:
            return call_handler(self, how, batch, at)
        function, size = (<Batches>hook).function, (<Batches>hook).size
        while at.done < PyList_GET_SIZE(batch):
            end = PyList_GET_SIZE(batch)
            if size and end - at.done > size:
                end = at.done + size
            at.width = at.span = end - at.done
            try:
                check(function, function(batch[at.done:end], commit))
            except PartlyApplied as error:
                group, ordered, at.width = _notes.partly_applied(self, error, batch[at.done:end])
                batch[at.done:end] = ordered
                at.done = end - at.width
                raise group from None
            at.done = end
            at.width = at.span = 1
        return 0

    def _apply_event(self, event, commit):
        """Apply a batch of one event."""
        try:
            check(self._apply_events, self._apply_events([event], commit))
        except PartlyApplied as error:
            raise _notes.partly_applied(self, error, [event])[0] from None


EXTENSION_TYPES.add(BatchStore)
cdef object APPLY_ONE = BatchStore._apply_event


# The public class: a Python class, since an extension type cannot inherit from an abstract one


class BatchEventBus(BatchStore, AbstractEventBus[T]):
    """A bus that applies many events at a time: subclass it and implement ``_apply_events``."""

    __module__ = "commitbus.batch_event_bus"
    __slots__ = ()

    @abstractmethod
    @cython.embedsignature(False)
    def _apply_events(self, events, commit):
        """Carry a batch of events out, or only pretend to."""
