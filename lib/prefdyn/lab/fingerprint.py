"""What code a run depends on: all that its module reaches, as it is written and as it is loaded."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel

OPEN = ("world", "worlds")  # modules that a reader may be tempted to change by more than a constant


class RunError(ValueError):
    """Why runs cannot be kept or told apart, and what to do about it."""


# By its text, so that what changes is parsed again and what does not, once: every kind of run reaches most modules.
_parsed = functools.cache(ast.parse)


@functools.cache
def _shape(source: str) -> str:
    """Code without comments, layout and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return ast.dump(tree)


@functools.cache
def _imported(module: str, source: str) -> frozenset[str]:
    """Full names of the modules that `module` imports from its own package: `from . import a`, `from ..b.c import d`.

    Imports under `if TYPE_CHECKING:` do not count: nothing runs through them. Nor does what a package's __init__ does,
    which is to list names.
    """
    tree = _parsed(source)
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typing_only = {id(n) for guard in guards for statement in guard.body for n in ast.walk(statement)}
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level and id(n) not in typing_only]
    found = set()
    for node in nodes:
        home = ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])
        for alias in node.names:
            part = f"{home}.{alias.name}"
            found.add(part if _is_module(part) else home)  # a module of a package, or a name in a module
    return frozenset(found)


ROOT = Path(__file__).resolve().parents[1]  # of the package that this module is part of
# Read when the code is loaded, not when it is first asked for: an edit in between belongs to the next process.
_LOADED = {
    ".".join([ROOT.name, *path.relative_to(ROOT).with_suffix("").parts]): path.read_text(encoding="utf-8")
    for path in ROOT.rglob("*.py")
}


def _is_module(name: str) -> bool:
    if name.startswith(f"{ROOT.name}."):
        return name in _LOADED
    holder = importlib.util.find_spec(name.rpartition(".")[0])
    return holder.submodule_search_locations is not None and importlib.util.find_spec(name) is not None


def _source(module: str) -> str:
    """Source of a module, for our own package as it was when this process started."""
    if module in _LOADED:
        return _LOADED[module]
    return Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")


def _reached(module: str) -> dict[str, str]:
    """The source of `module`, by its full name, and of all modules of its package that it reaches by imports."""
    sources: dict[str, str] = {}
    todo = {module}
    while todo:
        name = todo.pop()
        sources[name] = _source(name)
        todo |= _imported(name, sources[name]) - sources.keys()
    return dict(sorted(sources.items()))


@functools.cache
def code_fingerprint(*modules: str) -> str:
    """Hash of the code that `modules` reach. Comments, layout and docstrings do not count."""
    digest = hashlib.sha256()
    sources = {name: source for module in modules for name, source in _reached(module).items()}
    for name, source in sorted(sources.items()):
        digest.update(f"{name}\n{_shape(source)}\n".encode())
    return digest.hexdigest()


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """What a module's code assigns to names of its own, at the top: name to expression."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                else:
                    pairs = [(target, node.value)]
                found |= {name.id: value for name, value in pairs if isinstance(name, ast.Name)}
    return found


@functools.cache
def _literals(module: str) -> dict[tuple[str, str], str]:
    """Constants that the code of `module` reaches and that are stated as literals: (module, name) to how it is shown.

    Shown, because equality forgives what is no detail to a result: the order of a table, 1 for True.
    """
    found = {}
    for name, source in _reached(module).items():
        for constant, value in _constants(_parsed(source)).items():
            with contextlib.suppress(ValueError, TypeError):
                found[name, constant] = repr(ast.literal_eval(value))
    return found


def _shown(value: Any) -> str:
    """How a value is shown: of an instance of the OPEN modules also what it holds and its fields do not yield."""
    shown, kind = repr(value), type(value)
    if kind.__module__.rpartition(".")[2] in OPEN and dataclasses.is_dataclass(kind):
        with contextlib.suppress(Exception):  # fields that yield nothing are themselves not as they were
            again = dataclasses.replace(value)
            held = {name for name, own in vars(value).items() if repr(own) != repr(getattr(again, name, None))}
            shown += "".join(sorted(held))
    return shown


@functools.cache
def _derived(module: str) -> dict[tuple[str, str], str]:
    """The same for constants that are computed, e.g. from literals: computed again, as long as these are unchanged.

    Not those whose look tells nothing of their value, such as functions.
    """
    found = {}
    for path, source in _reached(module).items():
        if path not in sys.modules:
            continue
        names = dict(vars(sys.modules[path]))
        for constant, value in _constants(_parsed(source)).items():
            with contextlib.suppress(Exception):  # what cannot be computed again is no constant
                again = eval(compile(ast.Expression(value), path, "eval"), names)
                if " at 0x" not in (shown := _shown(again)):
                    found[path, constant] = shown
                    names[constant] = again  # for those that are computed from it, whatever the module has by now
    return {constant: shown for constant, shown in found.items() if constant not in _literals(module)}


def _differing(constants: Mapping[tuple[str, str], str]) -> set[tuple[str, str]]:
    """Which constants are shown otherwise by the modules as they are loaded."""
    loaded = {path: sys.modules.get(path) for path, _ in constants}
    return {
        (path, name)
        for (path, name), shown in constants.items()
        if loaded[path] and _shown(getattr(loaded[path], name, None)) != shown
    }


def _is_own(module: ModuleType, name: str, node: ast.stmt) -> bool:
    """Whether a module's function, class or method, e.g. "World.reward", is the one that its code defines."""
    holder, _, own = name.rpartition(".")
    value = inspect.getattr_static(getattr(module, holder, None) if holder else module, own, None)
    if isinstance(node, ast.ClassDef):
        return isinstance(value, type) and (value.__module__, value.__qualname__) == (module.__name__, name)
    if node.decorator_list:  # what a property, a cached one, a static method or a wrapper has within
        value = getattr(value, "fget", getattr(value, "func", inspect.unwrap(value)))
    code = getattr(value, "__code__", None)
    return code is not None and (code.co_filename, code.co_name) == (module.__file__, own)


@functools.cache
def _definitions(module: str) -> list[tuple[str, str, ast.stmt]]:
    """Functions, classes and their methods in the OPEN modules that `module` reaches: (module, name, definition)."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    opened = {name: source for name, source in _reached(module).items() if name.rpartition(".")[2] in OPEN}
    found = [
        (name, node.name, node)
        for name, source in opened.items()
        for node in _parsed(source).body
        if isinstance(node, kinds)
    ]
    return found + [
        (name, f"{holder}.{node.name}", node)
        for name, holder, definition in found
        if isinstance(definition, ast.ClassDef)
        for node in definition.body
        if isinstance(node, kinds)
    ]


def _stated_changes(module: str) -> set[tuple[str, str]]:
    """What a notebook has changed of the literals and definitions that `module` reaches, as loaded: (module, name)."""
    loaded = [(path, name, node) for path, name, node in _definitions(module) if path in sys.modules]
    replaced = {(path, name) for path, name, node in loaded if not _is_own(sys.modules[path], name, node)}
    return _differing(_literals(module)) | replaced


def _computed_changes(module: str) -> set[tuple[str, str]]:
    """The same of what is computed. Asked where nothing that is stated is changed, which would change it too."""
    return _differing(_derived(module))


def _models(value: Any) -> Iterator[BaseModel]:
    """All models in a value, itself included."""
    if isinstance(value, BaseModel):
        yield value
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _models(part)


def modules_of(spec: BaseModel) -> list[str]:
    """The modules that a spec's results depend on: its own, and those that it or a part of it names by `reaches()`.

    The latter are found at run time, such as that of a method by its name; no import leads to them.
    """
    found = {module for model in _models(spec) for module in getattr(model, "reaches", list)()}
    return [type(spec).__module__, *sorted(found)]


def _carried(spec: BaseModel) -> set[str]:
    """What a spec carries of the library's values, in itself and in its parents, e.g. {"world.SKILLS"}."""
    own = {name for model in _models(spec) for name in getattr(type(model), "carries", ())}
    return own.union(*map(_carried, spec.parents()))


def _named(changed: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The files of changed names, by how a spec that carries one calls it, e.g. {"world.SKILLS": ...}."""
    return {f"{path.rpartition('.')[2]}.{name}": sys.modules[path].__file__ for path, name in sorted(changed)}


def as_written(module: str, carried: Collection[str]) -> bool:
    """Whether the code that `module` reaches is loaded as it is written, but for the values that are `carried`."""
    return not any(_named(changes(module)).keys() - set(carried) for changes in (_stated_changes, _computed_changes))


def refuse_changes(spec: BaseModel) -> None:
    """Raise RunError if the code that a spec reaches is not loaded as it is written, but for what the spec carries."""
    module = type(spec).__module__
    if "." not in module:
        raise RunError(
            f"{type(spec).__name__}: is defined in a notebook, which no key can name; put it into a module of a package"
        )
    if torch.get_default_dtype() != torch.float32:
        raise RunError(
            f"torch's default dtype is {torch.get_default_dtype()}, and runs are kept as of float32: call "
            "torch.set_default_dtype(torch.float32)"
        )
    for changes in (_stated_changes, _computed_changes):
        changed = set().union(*map(changes, modules_of(spec)))
        files = _named(changed)
        if changed and (names := sorted(files.keys() - _carried(spec))):
            where = ", ".join(sorted({Path(files[name]).name for name in names}))
            raise RunError(
                f"{', '.join(names)}: not as the library's code has it. Runs are kept under that code, and other "
                f"processes compute with it: set it back, or change it in {where} and restart the kernel"
            )
