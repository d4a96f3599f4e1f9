"""Hooks and attributes that an attached recipe puts on modules; copies and pickles of the model come without them.

Python asks an object for its state through `__getstate__`, looked up on the instance, when it copies or pickles it. A
module that carries something of ours has one of its own, which leaves that out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

GETSTATE = "__getstate__"
HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
"""Where a module keeps its forward hooks, and what it knows of them, by number of the hook."""
_MISSING = object()


class Handle(Protocol):
    """What takes one hook or attribute off again."""

    def remove(self) -> None: ...


class Traces:
    """What stands on one module; as the `__getstate__` of that instance, it tells the module's state without.

    Args:
        module: that carries them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.__dict__.get(GETSTATE)
        """A `__getstate__` that the instance had already."""
        self.hooks: set[int] = set()
        """Numbers of the hooks."""
        self.shadowed: dict[str, list[Any]] = {}
        """What the instance had under the name of each attribute, before the first, the second, … of ours stood there;
        `_MISSING` where nothing."""

    def __call__(self) -> Any:
        """The state of the module as if nothing of ours were on it."""
        state = type(self.module).__getstate__(self.module) if self.before is None else self.before()
        if not isinstance(state, dict):
            return state
        state = {name: value for name, value in state.items() if name not in {*self.shadowed, GETSTATE}}
        if self.before is not None:
            state[GETSTATE] = self.before
        state |= {name: before[0] for name, before in self.shadowed.items() if before[0] is not _MISSING}
        for name in HOOKS:
            if name in state:
                state[name] = OrderedDict((n, hook) for n, hook in state[name].items() if n not in self.hooks)
        return state


class _Hook:
    """One hook."""

    def __init__(self, module: nn.Module, handle: Any) -> None:
        self.module = module
        self.handle = handle
        _on(module).hooks.add(handle.id)

    def remove(self) -> None:
        self.handle.remove()
        _on(self.module).hooks.discard(self.handle.id)
        _forget_if_empty(self.module)


class _Attribute:
    """One attribute of an instance, which stands before that of its class."""

    def __init__(self, module: Any, name: str, value: Any) -> None:
        self.module = module
        self.name = name
        _on(module).shadowed.setdefault(name, []).append(module.__dict__.get(name, _MISSING))
        setattr(module, name, value)

    def remove(self) -> None:
        shadowed = _on(self.module).shadowed
        before = shadowed[self.name].pop()
        if not shadowed[self.name]:
            del shadowed[self.name]
        self.module.__dict__.pop(self.name, None)
        if before is not _MISSING:
            setattr(self.module, self.name, before)
        _forget_if_empty(self.module)


def pre_hook(module: Any, hook: Callable[..., Any], *, prepend: bool = False) -> Handle:
    """Call ``hook(module, args, kwargs)`` before each forward of `module`, until what is returned is removed."""
    return _Hook(module, module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend))


def post_hook(module: Any, hook: Callable[..., Any], *, always_call: bool = False, prepend: bool = False) -> Handle:
    """Call ``hook(module, args, output)`` after each forward of `module`, until what is returned is removed.

    Args:
        module: on which.
        hook: what to call.
        always_call: also behind a forward that raised, with None for its output.
        prepend: before the hooks that are there.
    """
    return _Hook(module, module.register_forward_hook(hook, always_call=always_call, prepend=prepend))


def shadow(module: Any, name: str, value: Any) -> Handle:
    """Let the attribute `name` of this one `module` be `value`, until what is returned is removed.

    Of several under one name, the last comes off first.
    """
    return _Attribute(module, name, value)


def _on(module: nn.Module) -> Traces:
    """The traces on `module`, which then has some."""
    found = module.__dict__.get(GETSTATE)
    if not isinstance(found, Traces):
        found = module.__dict__[GETSTATE] = Traces(module)
    return found


def _forget_if_empty(module: nn.Module) -> None:
    found = _on(module)
    if not found.hooks and not found.shadowed:
        del module.__dict__[GETSTATE]
        if found.before is not None:
            module.__dict__[GETSTATE] = found.before
