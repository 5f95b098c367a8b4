"""A method of one's own: a plain function of pairs, written in a notebook, that travels as its source text.

A run is kept under a key of all that it depends on, and is computed in other processes. So the text of the function
goes with the run, and it may read nothing but its arguments, torch and math.
"""

import ast
import builtins
import functools
import inspect
import math
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import registry
from .base import Method, Pairs

KNOWN = {"torch": torch, "F": F, "math": math, "Pairs": Pairs}  # what the function finds by name
IMPORTS = ("torch", "math")


def _check_names(name: str, source: str) -> None:
    """Raise ValueError for an import, or a name from outside, that would not be there in another process."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [f"{'.' * node.level}{node.module or ''}"] if isinstance(node, ast.ImportFrom) else []
        if foreign := [module for module in modules if module.split(".")[0] not in IMPORTS]:
            raise ValueError(f"{name}: imports {foreign[0]}; allowed: {', '.join(IMPORTS)}")
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | {name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    read = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    if unknown := sorted(set(read) - bound - KNOWN.keys() - set(dir(builtins))):
        raise ValueError(
            f"{name}: reads {', '.join(unknown)} from outside of the function, where it would not be found: make a "
            f"number a setting with a default, as in def {name}(pairs, *, tau=1.0), write a function inside, and take "
            f"operations from what is known: {', '.join(KNOWN)} (no numpy: a loss needs its gradient)"
        )


def _settings(name: str, loss: Callable) -> dict[str, float]:
    """The settings of a loss, its keyword arguments with their defaults. Raises ValueError for another signature."""
    first, *others = inspect.signature(loss).parameters.values() or [None]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if first is None or first.kind not in positional or first.default is not first.empty:
        raise ValueError(f"{name}: its first argument is the pairs, as in def {name}(pairs, *, tau=1.0)")
    for other in others:
        if isinstance(other.default, bool) or not isinstance(other.default, int | float):
            raise ValueError(f"{name}: its setting {other.name!r} needs a number as its default")
    return {other.name: float(other.default) for other in others}


def _tried(method: Method) -> None:
    """Raise ValueError if the loss of two tiny pairs is not two finite numbers that depend on the policy."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    chosen, rejected = (torch.log(torch.rand(2, 3, generator=rng)).mul(mask).requires_grad_() for _ in range(2))
    pairs = Pairs(chosen, rejected, mask, mask, chosen.detach().sum(-1), rejected.detach().sum(-1))
    try:
        found = method.loss(pairs, **method.settings)
    except Exception as error:
        raise ValueError(
            f"{method.name}: fails on two pairs ({type(error).__name__}: {error}); a loss is made of torch's operations"
        ) from error
    if not isinstance(found, torch.Tensor) or found.shape != (2,):
        given = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(
            f"{method.name}: gives {given} for 2 pairs; a tensor of one loss a pair is needed, [2], not a mean or sum"
        )
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{method.name}: the loss of two pairs is {found.tolist()}, and has to be finite")
    if not found.requires_grad:
        raise ValueError(
            f"{method.name}: its loss does not depend on the policy's log-probs; detach() and numpy cut the gradient"
        )


@functools.lru_cache(maxsize=32)
def read(name: str, code: str) -> Method:
    """The method that a function's source text makes. The text is run: it is the user's own, of this session or run.

    Raises ValueError if the function reads what it does not hold, has another signature, or gives no loss a pair.
    """
    _check_names(name, code)
    space: dict[str, Any] = dict(KNOWN)
    exec(compile(code, f"<method {name}>", "exec"), space)
    loss = space[name]
    settings = _settings(name, loss)
    method = Method(
        name=name,
        title=name,
        source="one's own",
        takes="pairs",
        formula=r"w = -\partial \bar L / \partial \log \pi",
        curves="nobody has said",
        loss=loss,
        settings=settings,
        meaning=dict.fromkeys(settings, "as its function says"),
        code=code,
    )
    _tried(method)
    return method


def from_function(loss: Callable) -> Method:
    """The method of a loss, (Pairs, *, settings with defaults) -> one loss a pair, [B], written with `def`.

    Raises ValueError for a function whose text cannot be had, that has the name of a method, or as `read`.
    """
    name = getattr(loss, "__name__", "")
    if not inspect.isfunction(loss) or not name.isidentifier():
        raise ValueError(
            f"method={name or type(loss).__name__}: a loss of one's own is a function with a name, written with def"
        )
    if name in registry.names():
        raise ValueError(f"method={name}: there is a method of this name; give the function another")
    try:
        code = textwrap.dedent(inspect.getsource(loss))
    except (OSError, TypeError) as error:
        raise ValueError(f"method={name}: its text cannot be had ({error}); write it in a cell or a file") from error
    return read(name, code)
