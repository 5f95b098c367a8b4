"""Which methods there are: every module of this package that defines METHOD, found by looking."""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping

from .base import Method


def _found() -> dict[str, Method]:
    """The methods of this package by name. Raises ValueError if two share one."""
    methods: dict[str, Method] = {}
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        method = getattr(importlib.import_module(f"{__package__}.{module.name}"), "METHOD", None)
        if method is None:
            continue
        if method.name in methods:
            raise ValueError(f"method {method.name!r} is defined twice, the second time in {module.name}.py")
        methods[method.name] = method
    return methods


def names(takes: str | None = None) -> tuple[str, ...]:
    """Names of all methods, or of those that take one kind of data, sorted."""
    return tuple(sorted(name for name, method in _found().items() if takes in (None, method.takes)))


def comparable() -> tuple[str, ...]:
    """Names of the methods that start from a policy and change it: of pairs, then of rollouts."""
    return names("pairs") + names("rollouts")


def find(name: str | Method) -> Method:
    """The method of a name; a `Method`, such as a reader's own, is returned as it is.

    Raises ValueError for a name that is none, with the nearest one and all that there are.
    """
    if isinstance(name, Method):
        return name
    methods = _found()
    if name not in methods:
        near = difflib.get_close_matches(str(name), methods, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method={name!r}: no such method.{hint} There are: {', '.join(sorted(methods))}")
    return methods[name]


def module_of(name: str) -> str:
    """The full name of the module that defines a method: what it does depends on this module. Raises ValueError."""
    method = find(name)
    rooms = pkgutil.iter_modules(importlib.import_module(__package__).__path__, f"{__package__}.")
    return next(r.name for r in rooms if getattr(importlib.import_module(r.name), "METHOD", None) is method)


def settings(name: str | Method, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """All settings of a method by name, sorted, with the values that are given and its own for the others.

    Raises ValueError for a setting that it does not have.
    """
    method = find(name)
    known = method.settings
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{method.name}: no such setting: {', '.join(unknown)}; there are: {', '.join(known) or 'none'}"
        )
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{method.name}: {key}: given {value!r} ({type(value).__name__}); allowed: a number")
    return tuple(sorted({**known, **given}.items()))
