from commitbus._compiled.batch cimport Source


cdef enum:
    PUBLISH_IS_OURS = 1
    COLLECT_IS_OURS = 2
    APPLY_IS_OURS = 4
    IS_PLAIN = 8  # neither an outbox, nor for a rollback, nor a multi bus
    IS_AWAITED = 16
    IS_GROUPED = 32  # awaited, and not one event after another


# Without the GIL, these are touched in a critical section of the object that has them, and nowhere else. In a section
# is nothing that may block, run Python code, or enter the section of another object: that would give the first one up.
#
# | of           | attributes               | what the section protects                                               |
# | ------------ | ------------------------ | ----------------------------------------------------------------------- |
# | EventStore   | pending, left, head      | an event is in one place: append, extend, take (which looks for marks   |
# |              |                          | in the same section), put_back, items, cut, bring_back                  |
# | EventStore   | owner, wrapper           | who takes the owner registers: register, link, hold                     |
# | EventStore   | marks, cover             | written with `commitbus._lock.lock` held as well; read by take          |
# | MultiStore   | running, others          | which batches run: begin, finish, _commitbus_running                    |
# | DelayedStore | owner, linked, collected | let_go, link, hold, register; `collected` is set once                   |
# | Surrounding  | stack                    | which middleware there is, read once an apply                           |
#
# With the GIL a section is nothing, and what protects is that no Python code runs between: the same rule.
cdef class EventStore(Source):
    # What was published, and nothing else: None while that is nothing. In a critical section it is appended
    # to or swapped for another; whoever swapped it out owns it.
    cdef list pending
    # What an apply put back, before `pending`; or None. The events before `head` are done, and None.
    cdef list left
    cdef Py_ssize_t head
    # Once a multi bus let go of this bus: that multi bus, and the delayed bus around this one, by weak
    # references, as nobody else could apply them. The next event registers the one with the other.
    cdef object owner
    cdef object wrapper
    # The marks of the savepoints that are open, in a tuple: see `commitbus.savepoint`. Mostly None. And what covers it
    # without one, so far: a `Cover`, or None. Who looks at `_commitbus_marks` has marks made of that.
    cdef tuple marks
    cdef object cover
    # For `commitbus.integrations.sqlalchemy`: the buses of the session that has wrapped it, by a weak reference.
    cdef public object _commitbus_claim
    cdef object __weakref__

    cdef int add(self, object event) except -1
    cdef int append(self, object event) except -1
    cdef int append_first(self, object event) except -1
    cdef int append_all(self, list events) except -1
    cdef int extend(self, list events) except -1
    cdef int add_all(self, object events) except -1
    # Takes all, to the end of a list that the caller has.
    cdef int take_into(self, list items) except -1
    # Takes all, within a critical section of the caller's.
    cdef list remove(self, Py_ssize_t* head)
    # Takes all, and sets the marks where a savepoint is open.
    cdef list take_within(self, Py_ssize_t* head, tuple marks)
    # Makes the pairs of a batch.
    cdef int pair_up(self, list batch, object collect_event, bint method, object commit, list pairs) except -1
    # Puts back what could not be collected, of which some pairs were made, and makes the note.
    cdef int uncollected(self, list items, Py_ssize_t head, list pairs, object error) except -1
    cdef int forget_again(self, list tried) except -1
    cdef bint holds_any(self) noexcept
    cdef list items(self)
    cdef list look(self, list items)
    cdef bint is_multi(self) noexcept
    cdef bint keeps_events(self) noexcept


cdef class CallableStore(EventStore):
    # Never used. Python takes the C methods of the base whose memory differs from the others', and of the first
    # base where none does: a mixin of `AbstractEventBus`, before this one, would bring those of `EventStore`.
    cdef bint differs


cdef inline bint is_covered(EventStore bus) noexcept:
    """Whether a savepoint covers a bus."""
    return bus.marks is not None or bus.cover is not None


cdef int class_flags(object bus) except -1
cdef bint collects_itself(EventStore bus) except -1
cdef bint collects_plainly(EventStore bus) except -1
cdef object collected(EventStore bus, object event)
cdef object make(object cls)
