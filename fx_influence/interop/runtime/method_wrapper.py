"""Replace a method on one instance, in a way that can be undone in any order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class MethodWrapper:
    """Stand in for a method of one instance until ``undo``.

    Args:
        owner: the instance; other instances of its class keep the method.
        name: the method's name.
        call: called as ``call(original, *args, **kwargs)`` in place of ``original(*args, **kwargs)``.

    Example:
        >>> class Greeter:
        ...     def greet(self): return "hello"
        >>> greeter = Greeter()
        >>> wrapper = MethodWrapper(greeter, "greet", lambda original: original().upper())
        >>> greeter.greet()
        'HELLO'
        >>> wrapper.undo()
        >>> greeter.greet()
        'hello'
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        functools.update_wrapper(self, original)
        # Set after update_wrapper, which would copy these attributes from a wrapper below.
        self._owner, self._name, self._original = owner, name, original
        self._replaced = vars(owner).get(name)
        self._call: Callable[..., Any] | None = call
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs) if self._call is None else self._call(self._original, *args, **kwargs)

    def undo(self) -> None:
        """Pass calls on unchanged from now on, and take this and other undone wrappers off the top of the instance.

        A wrapper that was put on later stays, and this one below it until the other is undone too.
        """
        self._call = None
        attributes = vars(self._owner)
        while isinstance(top := attributes.get(self._name), MethodWrapper) and top._call is None:
            if top._replaced is None:
                del attributes[self._name]
            else:
                attributes[self._name] = top._replaced
