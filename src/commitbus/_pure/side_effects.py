"""`SideEffectCall`."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, cast, final

from commitbus import _messages, _naming, _state

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")


class MutableCall:
    """What a `SideEffectCall` is while it is made."""

    __slots__ = (
        "__weakref__",
        "_commitbus_args",
        "_commitbus_conditional",
        "_commitbus_function",
        "_commitbus_kwargs",
    )
    _commitbus_conditional: bool  # whether `if_committed` made it
    _commitbus_function: Callable[..., object]
    _commitbus_args: tuple[Any, ...]
    _commitbus_kwargs: dict[str, Any]


@final
class SideEffectCall(MutableCall):
    """A function with its arguments, to be called with a ``commit`` of its own later.

    It is immutable, equal to another of the same function and arguments, hashable when these are,
    and picklable when these are.

    Parameters
    ----------
    function : callable
        What to call. A reference is kept, as to all arguments.
    *args, **kwargs : object
        What to call it with. ``commit`` is not among them: `apply` hands it over.

    Raises
    ------
    TypeError
        When `function` cannot be called, when `kwargs` has ``commit``, or a keyword that is no string.

    Examples
    --------
    >>> from commitbus import SideEffectCall
    >>> def send(address: str, *, subject: str, commit: bool) -> None:
    ...     print(address, subject, commit)
    >>> call = SideEffectCall(send, "ada@example.org", subject="Welcome")
    >>> call(commit=True)
    ada@example.org Welcome True
    >>> call == SideEffectCall(send, "ada@example.org", subject="Welcome")
    True
    """

    __module__ = "commitbus.side_effects"
    __slots__ = ()

    def __new__(cls, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> SideEffectCall:
        """Make a call."""
        if not callable(function):
            raise _messages.not_a_function("SideEffectCall", function)
        if "commit" in kwargs:
            raise _messages.commit_keyword()
        self: Any = object.__new__(MutableCall)
        self._commitbus_function = function
        self._commitbus_args = args
        self._commitbus_kwargs = kwargs
        self._commitbus_conditional = False
        self.__class__ = cls
        return cast("SideEffectCall", self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse to be subclassed, like the compiled twin."""
        raise TypeError("type 'commitbus.side_effects.SideEffectCall' is not an acceptable base type")

    def __call__(self, *, commit: bool) -> object:
        """Call the function with its arguments and ``commit``.

        Parameters
        ----------
        commit : bool
            Passed on, unchanged.

        Returns
        -------
        object
            What the function returned.

        Raises
        ------
        Exception
            Whatever the function raises.
        """
        if self._commitbus_conditional:
            return self._commitbus_function(*self._commitbus_args, **self._commitbus_kwargs) if commit else None
        return self._commitbus_function(*self._commitbus_args, **self._commitbus_kwargs, commit=commit)

    @property
    def function(self) -> Callable[..., object]:
        """The function."""
        return self._commitbus_function

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return self._commitbus_args

    @property
    def kwargs(self) -> MappingProxyType[str, Any]:
        """The keyword arguments, read only."""
        return MappingProxyType(self._commitbus_kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: it is immutable."""
        raise _messages.immutable(name)

    def __delattr__(self, name: str) -> None:
        """Refuse: it is immutable."""
        raise _messages.immutable(name)

    def _commitbus_key(self) -> tuple[Any, ...]:
        """Give what a call is compared and hashed by, beside its keywords."""
        return (self._commitbus_function, *self._commitbus_args)

    def __eq__(self, other: object) -> bool:
        """Compare by function and arguments."""
        if not isinstance(other, SideEffectCall):
            return NotImplemented
        return (
            self._commitbus_conditional == other._commitbus_conditional
            and self._commitbus_key() == other._commitbus_key()
            and self._commitbus_kwargs == other._commitbus_kwargs
        )

    def __hash__(self) -> int:
        """Hash by function and arguments.

        Raises
        ------
        TypeError
            When an argument is not hashable.
        """
        return hash((self._commitbus_key(), frozenset(self._commitbus_kwargs.items()), self._commitbus_conditional))

    def __repr__(self) -> str:
        """Show the function and the arguments as they were passed."""
        return _messages.call_repr(self._commitbus_function, self.args, self.kwargs, self._commitbus_conditional)

    def __copy__(self) -> SideEffectCall:
        """Return itself: it is immutable."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the call apart for `pickle`."""
        cls = "if_committed" if self._commitbus_conditional else _state.reference(SideEffectCall)
        return _state.call, (cls, self._commitbus_function, self.args, dict(self.kwargs))


def if_committed(function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> SideEffectCall:
    """Make a side effect of a function that knows nothing of ``commit``.

    With a true ``commit`` it calls the function, with a false one nothing: for ``task.delay``,
    ``background.add_task``, ``cache.delete`` and the like.

    Parameters
    ----------
    function : callable
        What to call. A reference is kept, as to all arguments.
    *args, **kwargs : object
        What to call it with, checked by type checkers. ``commit`` among them is the function's own.

    Returns
    -------
    SideEffectCall
        It differs from one that hands ``commit`` on.

    Raises
    ------
    TypeError
        When `function` cannot be called.

    Examples
    --------
    >>> from commitbus import BasicEventBus, if_committed
    >>> bus = BasicEventBus()
    >>> bus.publish(if_committed(print, "deleted", "the old picture"))
    >>> _ = bus.apply(commit=False)
    >>> bus.publish(if_committed(print, "deleted", "the old picture"))
    >>> _ = bus.apply(commit=True)
    deleted the old picture
    """
    if not callable(function):
        raise _messages.not_a_function("if_committed", function)
    self: Any = object.__new__(MutableCall)
    self._commitbus_function = function
    self._commitbus_args = args
    self._commitbus_kwargs = kwargs
    self._commitbus_conditional = True
    self.__class__ = SideEffectCall
    return cast("SideEffectCall", self)


if_committed.__module__ = "commitbus.side_effects"
_naming.see_through(SideEffectCall, SideEffectCall.function.__get__)
