# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""`SharedSideEffectsEventBus`: documented in `commitbus._pure.shared_side_effects`."""

from commitbus._compiled.batch cimport Progress, call_event, call_events, call_handler
from commitbus._compiled.event_bus cimport EventStore
from commitbus._compiled.side_effects cimport SideEffectCall

from commitbus import _messages
from commitbus._compiled.event_bus import EXTENSION_TYPES, AbstractEventBus
from commitbus._context import Run, SharedSideEffectContext
from commitbus._interfaces import iterate


cdef class SharedStore(EventStore):
    # The same object for the whole life of the bus.
    cdef object shared

    def __cinit__(self, *args, **kwargs):
        self.shared = SharedSideEffectContext()

    @property
    def context(self):
        """What the side effects share: the same object for the whole life of the bus."""
        return self.shared

    cdef int add(self, object event) except -1:
        if type(event) is not SideEffectCall:
            raise _messages.not_a_call(event)
        return self.append(event)

    cdef int add_all(self, object events) except -1:
        for event in iterate(events):
            self.add(event)
        return 0

    cdef object scope(self, object commit):
        return Run(self.shared, commit)

    cdef int run(
        self, object hook, bint method, list batch, Progress* at, object commit, object failures, list out
    ) except -1:
        if method and hook is CALL_SHARED:
            return call_events(batch, at, commit)
        return call_handler(self, hook, method, batch, at, commit)

    def publish(self, event):
        """Add a side-effect call, in constant time; nothing happens to it until it is applied."""
        self.add(event)

    def _apply_event(self, event, commit):
        """Call the event, within the shared context."""
        if self.shared._run() is not None:
            call_event(event, commit)
            return
        # Somebody called what collect() gave: that call is the outermost apply.
        run = Run(self.shared, commit)
        try:
            run.enter()
            call_event(event, commit)
        except BaseException as error:
            if run.leave(error):
                return
            raise
        else:
            try:
                run.leave(None)
            except BaseException as error:
                _messages.note_left(error, self)
                raise
        finally:
            run.over = True


EXTENSION_TYPES.add(SharedStore)
cdef object CALL_SHARED = SharedStore._apply_event


# The public class: a Python class, since an extension type cannot inherit from an abstract one


class SharedSideEffectsEventBus(SharedStore, AbstractEventBus[SideEffectCall]):
    """A bus of side-effect calls that share a `SharedSideEffectContext`."""

    __module__ = "commitbus.shared_side_effects"
