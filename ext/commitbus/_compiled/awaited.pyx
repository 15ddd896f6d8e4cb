# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""The loops of `commitbus.aio`: what they do, and why, is documented in `commitbus._pure.awaited`."""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from cpython.weakref cimport PyWeakref_NewRef

from commitbus._compiled.applying cimport stopped
from commitbus._compiled.batch cimport Progress, Source, event_at, events_of
from commitbus._compiled.loops cimport check, failed, look_up
from commitbus._compiled.delayed_event_bus cimport DelayedStore
from commitbus._compiled.event_bus cimport IS_AWAITED, IS_GROUPED, IS_PLAIN, EventStore, class_flags
from commitbus._compiled.multi_event_bus cimport MultiStore
from commitbus._compiled.side_effects_bus cimport PairStore

from inspect import isawaitable

from commitbus._steps import wait_for
from commitbus._compiled.delayed_event_bus import DelayedEventBus


cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject* instance)
    # No checks of type or index; borrowed.
    PyObject* PyList_GET_ITEM(object list, Py_ssize_t index)
    Py_ssize_t PyList_GET_SIZE(object list)
    const size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    # Returns a new reference, or NULL with an exception set.
    PyObject* PyObject_Vectorcall(PyObject* function, PyObject* const* args, size_t count, PyObject* names)
    # The vectorcall function of an object, or NULL: then it is called in another way.
    ctypedef PyObject* (*vectorcallfunc)(PyObject*, PyObject* const*, size_t, PyObject*)
    vectorcallfunc PyVectorcall_Function(PyObject* function)

cdef extern from *:
    """
    static int is_coroutine(PyObject *object) { return PyCoro_CheckExact(object); }
    /* Gives 0 where it has returned, and 1 where it waits; -1 with an exception set. */
    static int take_step(PyObject *coroutine, PyObject **out) {
        PySendResult result = PyIter_Send(coroutine, Py_None, out);
        return result == PYGEN_ERROR ? -1 : result == PYGEN_NEXT;
    }
    """
    bint is_coroutine(object instance) noexcept
    # Stores a new reference: what it has returned, or what it waits for.
    int take_step(object coroutine, PyObject** out) except -1

cdef tuple COMMIT = ("commit",)
cdef object DELAYED = DelayedEventBus
# `BasicAsyncEventBus._apply_event_async`: where that is the hook, the loop calls the events itself.
cdef object CALL_AWAITED = None


def use_call(function):
    """Call the events directly where this function would."""
    global CALL_AWAITED
    CALL_AWAITED = function


@cython.final
@cython.freelist(8)
cdef class Waiting:
    """Goes on with a coroutine that has taken its first step, and waits for something."""

    cdef object coroutine, first
    cdef bint begun

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        if self.begun:
            return self.coroutine.send(value)
        self.begun = True
        first, self.first = self.first, None
        return first

    def throw(self, *args):
        self.begun = True
        self.first = None
        return self.coroutine.throw(*args)

    def close(self):
        self.coroutine.close()


@cython.final
@cython.freelist(8)
cdef class Loop:
    """One apply of one bus: its batch, and how far it came."""

    # The bus or, in its turn, the delayed bus around it: where what is left goes. No reference to the bus in that:
    # `let_go` sees by their number whether anybody else has it.
    cdef Source home
    cdef bint delayed
    # What is applied.
    cdef list batch
    cdef Progress at
    # Whether some of the batch may have callables of their own.
    cdef bint mixed
    # Looked up once; where `method` is set, to be called with its bus first. With `calls`, the events are called.
    cdef object handler, commit
    cdef bint method, calls

    cdef object step(self):
        """Run handlers until one has to be waited for, and give what to await; None at the end."""
        cdef PyObject* out = NULL
        cdef Waiting waiting
        cdef int waits
        if self.batch is None:
            return None
        while self.at.done < PyList_GET_SIZE(self.batch):
            result = self.call(<object>PyList_GET_ITEM(self.batch, self.at.done))
            if result is not None and not (is_coroutine(result) and Py_REFCNT(<PyObject*>result) == 1):
                # Among others a coroutine that somebody else has, too, and may await already: Python refuses that.
                if isawaitable(result):
                    result = wait_for(result)
            if is_coroutine(result):
                # The first step is taken here. Mostly it is the last: that leaves out what an `await` makes.
                waits = take_step(result, &out)
                given = <object>out
                Py_DECREF(given)
                if waits:
                    waiting = Waiting.__new__(Waiting)
                    waiting.coroutine = result
                    waiting.first = given
                    return waiting
                result = given
            self.finish(result)
        return None

    cdef object call(self, object item):
        cdef PyObject* stack[4]
        cdef PyObject* result
        cdef PyObject* names = NULL
        cdef PyObject* function = <PyObject*>self.handler
        cdef PyObject** arguments = stack + 2
        cdef vectorcallfunc vectorcall
        cdef size_t count = 2
        cdef EventStore bus = self.actual()
        if self.mixed:
            return own_callable((<DelayedStore>self.home).collected, item)(commit=self.commit)
        stack[0] = NULL
        stack[1] = <PyObject*>bus
        stack[2] = <PyObject*>item
        stack[3] = <PyObject*>self.commit
        if self.calls:
            function = <PyObject*>item
            arguments = stack + 3
            count = 0
            names = <PyObject*>COMMIT
        elif self.method:
            arguments = stack + 1
            count = 3
        # As in `call_handler`.
        vectorcall = PyVectorcall_Function(function)
        if vectorcall is NULL:
            vectorcall = PyObject_Vectorcall
        result = vectorcall(function, arguments, count | PY_VECTORCALL_ARGUMENTS_OFFSET, names)
        if result is NULL:
            failed()
        given = <object>result
        Py_DECREF(given)
        return given

    cdef int finish(self, object result) except -1:
        """Count an event as done; what its handler returned is mostly None."""
        if result is not None:
            check(event_at(self.batch, self.at.done), result)
        self.at.done += 1
        return 0

    cdef list applied(self):
        if self.batch is None:
            return []
        batch = self.batch if self.at.begin == 0 else self.batch[self.at.begin:]
        return events_of(batch) if self.mixed else batch

    cdef int stop(self, object error) except -1:
        """Put back what is not done, and note where it stopped."""
        batch, self.batch = self.batch, None  # the traceback keeps the coroutine, and must keep no event
        if batch is not None:
            stopped(self.home, self.actual(), batch, &self.at, None, error)
        return 0

    cdef EventStore actual(self):
        return (<DelayedStore>self.home).actual if self.delayed else <EventStore>self.home


cdef object own_callable(PairStore collected, object item):
    ((_, function),) = collected.look([item])
    return function


cdef Loop begin(Source home, bint delayed, object commit, object owner):
    """Take what is to be applied: of a bus or, where `owner` lets go of it, in the turn of a delayed bus."""
    cdef Loop loop = Loop.__new__(Loop)
    cdef bint method = False
    loop.home = home
    loop.delayed = delayed
    loop.commit = commit
    loop.handler = look_up(loop.actual(), "_apply_event_async", &method)
    loop.method = method
    loop.calls = method and loop.handler is CALL_AWAITED
    loop.at.width = loop.at.span = 1
    if delayed:
        loop.batch = (<DelayedStore>home).take_turn(owner, commit, &loop.at.begin, &loop.mixed)
    else:
        loop.batch = home.take(&loop.at.begin)
    loop.at.done = loop.at.begin
    return loop


async def run(Source home, EventStore bus, object commit):
    """Apply what is pending, one event after another."""
    cdef Loop loop = begin(bus, False, commit, None)
    try:
        waiting = loop.step()
        while waiting is not None:
            loop.finish(await waiting)
            waiting = loop.step()
        return loop.applied()
    except BaseException as error:
        waiting = None
        loop.stop(error)
        raise error  # and not only `raise`, which would bring back the frames that were dropped


async def run_buses(object root, MultiStore multi, object commit, list out):
    """Apply the buses that are registered with a multi bus, one after another."""
    cdef Loop turns = Loop.__new__(Loop)
    cdef Loop loop = None
    cdef DelayedStore delayed
    owner = PyWeakref_NewRef(multi, None)
    cdef list buses = []
    turns.home = multi
    turns.batch = buses
    turns.at.width = turns.at.span = 1
    try:
        # A savepoint that a handler opens covers those whose turn is still to come.
        multi.begin(buses)
        multi.take_into(buses)
        while turns.at.done < PyList_GET_SIZE(buses):
            delayed = <DelayedStore>PyList_GET_ITEM(buses, turns.at.done)
            if (
                type(delayed) is DELAYED
                and delayed.actual is not None
                and class_flags(delayed.actual) & (IS_AWAITED | IS_PLAIN | IS_GROUPED) == IS_AWAITED | IS_PLAIN
            ):
                loop = begin(delayed, True, commit, owner)
                waiting = loop.step()
                while waiting is not None:
                    loop.finish(await waiting)
                    waiting = loop.step()
                out.extend(loop.applied())
                loop = None
                delayed.after_turn()
            else:
                await root._take_turn(multi, delayed, commit, out)
            turns.at.done += 1
        return buses
    except BaseException as error:
        waiting = None
        try:
            if loop is not None:
                loop.stop(error)
                delayed.after_turn()
        finally:
            delayed = None
            turns.stop(error)
        raise error
    finally:
        multi.finish(buses)
        buses = None
