# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: auto_pickle=False, freethreading_compatible=True, boundscheck=False, wraparound=False
"""Applying: takes a batch out of a bus, runs it, and puts back what is not done of it."""

from cpython.object cimport PyObject

from commitbus._compiled.batch cimport Handling, Progress, Source, applied_of, event_at, put_back
from commitbus._compiled.loops cimport middleware_now

from commitbus import _notes
from commitbus._failures import Failures
from commitbus._rounds import check_rounds, in_rounds, leave


cdef extern from "Python.h":
    # No check of the type.
    Py_ssize_t PyList_GET_SIZE(object list)


cdef list carry_out(Source source, object bus, object commit, object failures, list out):
    """Apply what is pending in a source: the one path behind every apply.

    `bus` is named in notes. `failures` is None, or the `Failures` that a robust apply fills, or an empty list to which
    these are added once something has failed. `out` gathers the events that multi buses apply. Returns the events that
    were applied.
    """
    cdef Handling how
    cdef Progress at
    cdef Py_ssize_t before = 0
    cdef bint owned = True  # whether the batch is this apply's own: not once it was put back
    cdef list applied = None
    how.method = False
    hook = source.hook(&how.method)
    stack = middleware_now()
    if stack is not None:
        hook = source.surrounded(hook, &how.method, stack)
    how.hook, how.commit, how.out = <PyObject*>hook, <PyObject*>commit, <PyObject*>out
    at.begin = 0
    cdef list batch = source.take(&at.begin)
    if batch is None:
        return []
    at.done = at.begin
    at.width = at.span = 1
    scope = None
    try:
        scope = source.scope(commit)
        if scope is not None:
            scope.enter()
        if failures is None:
            source.run(&how, batch, &at, None)
        elif type(failures) is list:
            failures = run_first(source, &how, bus, batch, &at, failures)
        else:
            before = len(failures.errors)
            run_robustly(source, &how, bus, batch, &at, failures)
        if failures is not None and failures.positions:
            applied = applied_of(batch, &at, failures.positions)
            failures.set_aside(bus, batch)
            owned = False
            put_back(source, batch, at.begin, at.done, failures)
        if applied is None:
            applied = batch if at.begin == 0 else batch[at.begin:]
        owned = False
        if scope is not None:
            if failures is None and scope.stack is None:
                scope.leave(None)  # nothing was entered
            elif leave(scope, bus, failures, before):
                del failures.errors[before:]
        return applied
    except BaseException as error:
        if owned:
            if type(failures) is list:
                failures = failures[0] if failures else None
            applied = None if scope is None else applied_before(batch, &at, failures)
            stopped(source, bus, batch, &at, failures, error)
        if scope is not None and not scope.over and scope.leave(error):
            return applied
        raise error  # and not only `raise`, which would bring back the frames that were dropped
    finally:
        if scope is not None:
            scope.over = True


cdef list apply_all(Source source, object bus, object commit, object robust, object rounds, list out):
    """Apply what is pending, robustly or in several rounds; raises what failed."""
    cdef list failures = None
    cdef list applied
    if rounds != 1:
        check_rounds(rounds)
        if robust or source.surrounds():
            return apply_in_rounds(source, bus, commit, robust, rounds, out)
    else:
        # Of a bus of events, nothing is made before something fails.
        failures = [Failures()] if source.holds_buses() else []
    try:
        applied = carry_out(source, bus, commit, failures[0] if failures else failures, out)
    except BaseException as error:
        _notes.drop_own_frames(error)
        raise error
    if failures is None:
        if applied and source.goes_on():
            applied += apply_in_rounds(source, bus, commit, robust, rounds - 1, out)
    elif failures and failures[0].errors:
        raise failures[0].end(bus)
    return applied


cdef list apply_in_rounds(Source source, object bus, object commit, object robust, object rounds, list out):
    # Not where it is called from: a function with a closure in it takes a tenth longer for one event.
    scope = source.scope(commit)
    return in_rounds(bus, rounds, robust, scope, lambda failures: carry_out(source, bus, commit, failures, out))


cdef object run_first(
    Source source, Handling* how, object bus, list batch, Progress* at, list made
):
    """Run a batch as long as nothing fails; then go on robustly, and give the `Failures`, which are added to `made`."""
    try:
        source.run(how, batch, at, None)
        return None
    except Exception as error:
        failures = Failures()
        failures.start(bus, batch, at.begin, event_at(batch, at.begin))
        made.append(failures)
        failed_at(bus, batch, at, failures, error)
    run_robustly(source, how, bus, batch, at, failures)
    return failures


cdef int run_robustly(
    Source source, Handling* how, object bus, list batch, Progress* at, object failures
) except -1:
    """Run a batch to its end, whatever `Exception` its events raise."""
    if at.done == at.begin:
        at.done += failures.start(bus, batch, at.begin, event_at(batch, at.begin))
    while True:
        known = len(failures.errors)
        try:
            if source.run(how, batch, at, failures) == 0:
                return 0
            note_failed(bus, batch, at, failures, at.done - 1, known)
        except Exception as error:
            failed_at(bus, batch, at, failures, error)


cdef int failed_at(object bus, list batch, Progress* at, object failures, object error) except -1:
    """Count the events that have failed with an error, and note it."""
    cdef Py_ssize_t first = at.done
    failures.positions.extend(range(first, first + at.width))
    at.done += at.width
    failures.errors.append(error)
    return note_failed(bus, batch, at, failures, first, len(failures.errors) - 1)


cdef int note_failed(
    object bus, list batch, Progress* at, object failures, Py_ssize_t first, Py_ssize_t known
) except -1:
    try:
        for error in failures.errors[known:]:
            _notes.drop_own_frames(error)
        failures.note(known, bus, event_at(batch, first), first, at.width, at.span)
    except Exception:
        pass  # where there is no stack left, that costs a note
    at.width = at.span = 1
    return 0


cdef list applied_before(list batch, Progress* at, object failures):
    """List what is done of a batch that was stopped, before it is put back."""
    try:
        return applied_of(batch, at, () if failures is None else failures.positions)
    except MemoryError:
        return []


cdef int stopped(
    Source source, object bus, list batch, Progress* at, object failures, object error
) except -1:
    """Put back what was not applied, then make the note."""
    cdef Py_ssize_t count = PyList_GET_SIZE(batch) - at.begin
    cdef bint left = at.done < PyList_GET_SIZE(batch)
    event = event_at(batch, at.done)
    # First of all: whatever raises from here on costs a note, but no event.
    put_back(source, batch, at.begin, at.done, failures)
    try:
        _notes.drop_own_frames(error)
        if left:
            earlier = 0 if failures is None else len(failures.positions)
            place = (at.done - at.begin, at.width, at.span, count)
            _notes.note_stopped(error, bus, event, place, earlier)
        if failures is not None and not isinstance(error, Exception):
            failures.chain(error, bus)
    except Exception:
        pass
    return 0
