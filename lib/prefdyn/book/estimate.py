"""What will it cost: time, memory and disk of a chapter, of a study or of the lens, before anything is computed.

Which runs a chapter needs is read from the notebook: of its cells only those statements are executed that lead to a
`store.ensure(...)`, with a store that writes down what it is asked for. How long a run takes is known from runs of the
same shape in the store, or else measured here: a run of the same kind, cut down to a few updates and checkpoints, is
made and thrown away, its steps are timed, and the rest is multiplication. While that is measured, as many processes
are kept busy as there will be.
"""

import ast
import contextlib
import dataclasses
import dis
import functools
import heapq
import itertools
import json
import linecache
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Annotated, Any

import nbformat
import pandas as pd
import torch
import typer
from IPython.core.inputtransformer2 import TransformerManager
from transformers import AutoConfig, PreTrainedModel

from ..findings import afterwards
from ..findings import asked as asking
from ..findings.measure import TOKENS_OF
from ..findings.tuning import ValidationRun
from ..lab import folders, recipes
from ..lab.runs import MANIFEST, WORTH_A_PROCESS, Run, RunStore
from ..lens import alignment
from ..lens.batch import Batch, concatenate
from ..lens.likelihood import sequence_logps
from ..lens.memory import readable
from . import params, studies

# Which runs a chapter needs


class _NotThere(Exception):
    """A chapter reads a run that is not computed yet."""


class _AsIfChosen(Run):
    """In the place of what learning rates earn, where that is not known yet: all the same."""

    def frame(self, name: str) -> pd.DataFrame:
        return pd.DataFrame({"step": [0], "reward": [0.0]})


class Looking(RunStore):
    """A store that is looked at: nothing in it is computed, checked byte by byte, or set aside."""

    def __init__(self, root: str | Path | None = None, say: Callable[[str], None] | None = None):
        super().__init__(root, say)
        self.key = studies.memo(self.key)

    def find(self, spec: recipes.Spec) -> Run | None:
        key = self.key(spec)
        return Run(key, self.root / key) if (self.root / key / MANIFEST).is_file() else None

    def get(self, spec: recipes.Spec, tick: Callable[[float], None] = lambda work: None) -> Run:
        found = self.find(spec)
        if found is None:
            raise _NotThere(self.key(spec))
        return found


class _Asked(Looking):
    """Writes down what a chapter asks for."""

    def __init__(self, groups: list[list[recipes.Spec]], guessed: set[str], root=None, say=None):
        super().__init__(root, say)
        self._groups, self._guessed = groups, guessed

    def ensure(self, specs: Iterable[recipes.Spec], workers: int | None = None) -> list[Run | None]:
        specs = list(specs)
        if specs not in self._groups:  # what leads to a later question may ask an earlier one again
            self._groups.append(specs)
        return [self.find(spec) for spec in specs]

    def get(self, spec: recipes.Spec, tick: Callable[[float], None] = lambda work: None) -> Run:
        if isinstance(spec, ValidationRun) and self.find(spec) is None:
            self._guessed.add(spec.kind)
            return _AsIfChosen(self.key(spec), self.root)
        return super().get(spec, tick)


@dataclass(frozen=True)
class Asked:
    """What a chapter asks for: the runs of each `store.ensure`, in order, and what was supposed to tell them."""

    groups: tuple[tuple[recipes.Spec, ...], ...]
    notes: tuple[str, ...]
    cells: int  # of code


@dataclass(frozen=True)
class _Statement:
    """A statement of a cell, the names that it binds or changes, and those that it reads."""

    node: ast.stmt
    file: str
    binds: frozenset[str]
    changes: frozenset[str]
    reads: frozenset[str]

    @property
    def asks(self) -> bool:
        """Whether it has runs computed: by `store.ensure`, or by `comparison.tuned`, which does."""
        calls = (n.func for n in ast.walk(self.node) if isinstance(n, ast.Call))
        return any(isinstance(f, ast.Attribute) and f.attr in ("ensure", "tuned") for f in calls)


def _names(code: CodeType, *kinds: str) -> Iterator[str]:
    """The global names that byte code handles by instructions of these kinds, functions and comprehensions included."""
    for step in dis.get_instructions(code):
        if step.opname in kinds:
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner, *kinds)


def _root(node: ast.expr) -> str | None:
    """The name at the left end of x.y[z]."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


class _HereAndNow(ast.NodeTransformer):
    """Parameters are those given, and a store is one that writes down what it is asked for."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "params.read":
            return ast.copy_location(ast.Name("_parameters", ast.Load()), node)
        if isinstance(node.func, ast.Name | ast.Attribute) and ast.unparse(node.func).split(".")[-1] == "RunStore":
            node.func = ast.copy_location(ast.Name("_store", ast.Load()), node.func)
        return node


def _statements(cells: Sequence[str], name: str) -> list[_Statement]:
    """All statements of a notebook's code cells, in order. Raises SyntaxError."""
    found, modules = [], set()
    for number, source in enumerate(cells):
        file, text = f"<{name}, code cell {number}>", TransformerManager().transform_cell(source)
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)  # a loss of one's own shows its source
        for node in ast.parse(text, file).body:
            node = ast.fix_missing_locations(_HereAndNow().visit(node))
            code = compile(ast.Module([node], []), file, "exec")
            binds = frozenset(_names(code, "STORE_NAME", "STORE_GLOBAL"))
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules |= binds
            written = {_root(n) for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store | ast.Del)}
            asked = (n.value for n in ast.walk(node) if isinstance(n, ast.Expr))
            called = {_root(n.func) for n in asked if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
            changes = frozenset((written | called) - {None} - modules - binds)
            reads = frozenset(_names(code, "LOAD_NAME", "LOAD_GLOBAL"))
            found.append(_Statement(node, file, binds, changes, reads))
    return found


def _leading_to(statements: Sequence[_Statement], last: int) -> list[_Statement]:
    """The statements that number `last` depends on, and itself, in order; of imports the names that are read."""
    needed, kept = set(statements[last].reads), [statements[last]]
    for one in reversed(statements[:last]):
        if one.binds.isdisjoint(needed) and one.changes.isdisjoint(needed):
            continue
        if isinstance(one.node, ast.Import | ast.ImportFrom):
            names = [a for a in one.node.names if (a.asname or a.name.split(".")[0]) in needed or a.name == "*"]
            one = dataclasses.replace(one, node=ast.copy_location(_only(one.node, names), one.node))
        kept.append(one)
        if isinstance(one.node, ast.Assign | ast.AnnAssign | ast.Import | ast.ImportFrom | ast.FunctionDef):
            needed -= one.binds
        needed |= one.reads
    return kept[::-1]


def _only(node: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> ast.stmt:
    return ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, node.level)


def asked_for(source: Path, given: Mapping[str, Any], root: str | Path | None = None) -> Asked:
    """The runs that a chapter has computed with these parameters; nothing is computed.

    Args: source, the notebook. given, parameters by name. root, of the run store, by default the book's.
    Raises ParameterError as executing it does, and CommandError for a file that is no notebook.
    """
    from . import cli  # which has this module's command

    defaults = cli.known_parameters(source)
    params.check(defaults | dict(given), list(defaults))
    code = [cell for cell in nbformat.read(source, as_version=4).cells if cell.cell_type == "code"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in code:
        if "parameters" in cell.metadata.get("tags", []):
            exec(compile(cell.source, f"<{source.stem}, parameters>", "exec"), namespace)
            break
    values = {name: namespace[name] for name in defaults} | dict(given)
    groups: list[list[recipes.Spec]] = []
    guessed: set[str] = set()
    namespace |= values | {"_parameters": params.check(values, list(defaults))}
    namespace["_store"] = functools.partial(_Asked, groups, guessed)
    statements, notes = _statements([cell.source for cell in code], source.stem), []
    for number, one in enumerate(statements):
        if not one.asks:
            continue
        try:
            for step in _leading_to(statements, number):
                exec(compile(ast.fix_missing_locations(ast.Module([step.node], [])), step.file, "exec"), namespace)
        except _NotThere as missing:
            notes.append(f"What is asked for after {missing} depends on what it finds, and is not in the estimate.")
            break
    if guessed:
        notes.append("Learning rates are not chosen yet; whichever are, what is trained with them costs the same.")
    return Asked(tuple(map(tuple, groups)), tuple(notes), len(code))


# What a run costs

# Fields that do not change what a run costs, or hardly.
_FREE = {"seed", "lr", "value_lr", "settings", "control", "label_noise", "skills", "today", "content", "temperature"}
_FREE |= {"clip", "value_clip", "kl_coefficient", "kl_estimator", "gamma", "lam", "whiten", "schedule", "reduction"}
_FREE |= {"decoding", "prompts_of", "turned", "warmup", "weight_decay"}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stripped(v) for k, v in value.items() if k not in _FREE}
    return [_stripped(v) for v in value] if isinstance(value, list | tuple) else value


def shape(spec: recipes.Spec) -> str:
    """What runs that cost the same have in common: kind, model, lengths and amounts; of a measured run what it takes.

    Which method of pairs a measured run was trained by does not matter to what measuring it costs.
    """
    known = _stripped(spec.model_dump(mode="json"))
    run = getattr(spec, "run", None)
    if run is not None:
        known["run"].pop("method", None)
        known["run"].pop("optimisation", None)
        known["run"] |= {"takes": run.takes, "checkpoints": len(run.steps()), "updates": run.takes == "rollouts"}
    return json.dumps([spec.kind, known], sort_keys=True)


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes on disk of one run, and how that is known."""

    seconds: float
    disk: float
    how: str


def _hardware(provenance: Mapping[str, Any]) -> tuple:
    known = provenance["hardware"]
    return known["system"], known["machine"], known["cores"], known["accelerator"]


def _this_machine() -> tuple:
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return platform.system(), platform.machine(), os.cpu_count(), accelerator


def history(store: RunStore, specs: Iterable[recipes.Spec]) -> dict[str, Cost]:
    """What runs of the same shape took that this machine has computed, by `shape`: medians over those in the store.

    Args: specs, those that are asked about.
    """
    wanted: dict[str, set[type[recipes.Spec]]] = {}
    for spec in specs:
        wanted.setdefault(spec.kind, set()).add(type(spec))
    asked = {shape(spec) for spec in specs}
    found: dict[str, list[tuple[float, float]]] = {}
    for folder in store.root.glob("*-*"):
        for kind in wanted.get(folder.name.rpartition("-")[0], ()):
            with contextlib.suppress(OSError, ValueError, KeyError):  # another version's, or being removed
                spec = kind.model_validate_json((folder / "spec.json").read_text(encoding="utf-8"))
                provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
                if (name := shape(spec)) in asked and _hardware(provenance) == _this_machine():
                    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                    found.setdefault(name, []).append((provenance["seconds"], size))
    return {
        name: Cost(
            statistics.median(s for s, _ in own),
            statistics.median(b for _, b in own),
            f"{len(own)} such in the store",
        )
        for name, own in found.items()
    }


UPDATES = {"pairs": 12, "demonstrations": 12, "rollouts": 5, "": 12}  # of a run that is cut down
FROM_SCRATCH = 60  # updates of SFT that a random model needs to end its replies, on whose length sampling's cost rests
CHECKPOINTS = 3  # the first, one on the way, the last
LONG = 60.0  # seconds after which a trial is broken off


class _Enough(Exception):
    """A trial has shown what it can."""


class _Beside(RunStore):
    """A store for trials, which times them: what the book's store has is not computed again."""

    def __init__(self, root: Path, known: RunStore):
        super().__init__(root, say=lambda text: None)
        self._known = known
        self.timed: dict[str, tuple[recipes.Spec, list[float], float | None]] = {}  # run, ticks, total if not cut off

    def find(self, spec: recipes.Spec) -> Run | None:
        return self._known.find(spec) or super().find(spec)

    def get(self, spec: recipes.Spec, tick: Callable[[float], None] = lambda work: None) -> Run:
        """The run of `spec`. Raises _Enough where it, or what it rests on, takes longer than LONG."""
        found, key = self.find(spec), self.key(spec)
        if found is not None:
            return found
        if key in self.timed:
            raise _Enough
        for parent in spec.parents():
            self.get(parent)
        ticks, began = [], time.perf_counter()

        def told(work: float) -> None:
            if work > 0:
                ticks.append(time.perf_counter() - began)
            if ticks and ticks[-1] > LONG:
                self.timed[key] = spec, ticks, None
                raise _Enough

        run = super().get(spec, told)
        self.timed[key] = spec, ticks, time.perf_counter() - began
        return run


def _reduced(spec: recipes.Spec, known: RunStore, top: bool = True) -> recipes.Spec:
    """The same run, cut down to a few updates and checkpoints; of what it rests on, SFT stays where it is there."""
    if spec.kind == "sft" and not top and known.find(spec) is not None:
        return spec
    fields = type(spec).model_fields
    changed = {
        name: _reduced(part, known, top=False)
        for name in fields
        if isinstance(part := getattr(spec, name), recipes.Spec) and hasattr(part, "kind")
    }
    if "optimisation" in fields:
        scratch = spec.kind == "sft" and spec.policy.model == "scratch"
        steps = min(spec.optimisation.steps, FROM_SCRATCH if scratch else UPDATES[getattr(spec, "takes", "")])
        changed["optimisation"] = dataclasses.replace(spec.optimisation, steps=steps)
    if "checkpoints" in fields:
        changed["checkpoints"] = min(spec.checkpoints, CHECKPOINTS)
    if "phases" in fields:
        changed["phases"] = min(spec.phases, 2)
    return spec.model_copy(update=changed)


@dataclass(frozen=True)
class Pace:
    """How long the parts of a run take, seconds: all that is done once, an update, a checkpoint.

    For what is no training, `update` is 0; a run that does all at once has nothing but `once`.
    """

    once: float
    update: float
    checkpoint: float

    def seconds(self, spec: recipes.Spec) -> float:
        updates = spec.optimisation.steps if hasattr(spec, "optimisation") else 0
        return self.once + self.update * updates + self.checkpoint * _checkpoints(spec)


def _checkpoints(spec: recipes.Spec) -> int:
    run = getattr(spec, "run", spec)
    return len(run.steps()) if hasattr(run, "steps") else 0


def pace(spec: recipes.Spec, ticks: Sequence[float], total: float | None) -> Pace:
    """The pace of a run from when it told of its progress.

    Args: spec, a run as it was made. ticks, seconds from its start to each update's end, or each checkpoint's.
    total, seconds it took, None for one that was broken off at its last tick.
    """
    end = ticks[-1] if total is None else total
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    if not gaps:
        return Pace(end, 0.0, 0.0)
    if not hasattr(spec, "optimisation"):
        each = statistics.fmean(gaps)
        return Pace(max(0.0, end - each * (1 + len(gaps))), 0.0, each)
    kept = spec.steps() if hasattr(spec, "steps") else []
    after = dict(enumerate(gaps, 1))  # the gap after so many updates
    update = statistics.fmean([gap for done, gap in after.items() if done not in kept] or gaps)
    between = [gap - update for done, gap in after.items() if done in kept]
    checkpoint = max(0.0, statistics.fmean(between)) if between else 0.0
    made = sum(step < len(ticks) for step in kept) + (len(kept) > 0 and total is not None)
    return Pace(max(0.0, end - update * len(ticks) - checkpoint * made), update, checkpoint)


def _size(folder: Path, made: recipes.Spec, spec: recipes.Spec) -> float:
    """Bytes that a run will have on disk, from those of the one that was cut down: files of checkpoints and tables
    grow with their number, the final policy does not."""
    more = _checkpoints(spec) / max(1, _checkpoints(made)) if _checkpoints(spec) else 1.0
    files = [p for p in folder.rglob("*") if p.is_file()]
    fixed = sum(p.stat().st_size for p in files if p.parent != folder or p.suffix == ".json" or p.stem == "model")
    return fixed + more * (sum(p.stat().st_size for p in files) - fixed)


def try_out(spec: recipes.Spec, trials: _Beside, known: RunStore) -> Cost:
    """Make a run cut down, and work out what the whole costs.

    A trial that takes longer than LONG is broken off. What then cannot be tried at all is taken to cost, for the work
    that it says it is, what the slowest of those broken off did.
    """
    made = _reduced(spec, known)
    with contextlib.suppress(_Enough):
        trials.get(made)
    if (key := trials.key(made)) in trials.timed:
        _, ticks, total = trials.timed[key]
        seconds = pace(made, ticks, total).seconds(spec)
        disk = weights(spec) if total is None else _size(trials.root / key, made, spec)
        return Cost(seconds, disk, "a trial" if total is not None else "a trial, broken off")
    slow = [(one, ticks) for one, ticks, total in trials.timed.values() if total is None]
    rate = max(pace(one, ticks, None).seconds(one) / one.work() for one, ticks in slow)
    return Cost(rate * spec.work(), weights(spec), "its work alone, as its parents' trial was broken off")


# What a process needs


@functools.lru_cache(maxsize=32)
def model_size(policy: recipes.PolicySpec, data: recipes.DataSpec) -> dict[str, int]:
    """Sizes of a policy: parameters, layers, width, heads and words."""
    if policy.model == "scratch":
        model = recipes.untrained(policy, data, 0)[0]
    else:
        from transformers import AutoModelForCausalLM

        config = AutoConfig.from_pretrained(policy.model, revision=policy.revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    config = model.config.get_text_config()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "words": config.vocab_size,
    }


def _sft(spec: recipes.Spec) -> recipes.SFTRun:
    while not isinstance(spec, recipes.SFTRun):
        spec = getattr(spec, "sft", None) or spec.run
    return spec


def weights(spec: recipes.Spec) -> float:
    """Bytes of the checkpoints of a training run and of its optimiser's moments; 0 for what keeps none."""
    if not hasattr(spec, "steps"):
        return 0.0
    sft = _sft(spec)
    count, files = _checkpoints(spec), 3 if hasattr(spec, "value_lr") else 2
    return 4.0 * model_size(sft.policy, sft.data)["parameters"] * (files * count + 1)


ROWS = 256  # of a pass that keeps no graph, as the lab has them
# Numbers that training holds for a token: of a layer, per unit of width and per head and position; of the output, per
# word. For GPT-NeoX, seen to be right within a quarter at 30 thousand to a million parameters.
PER_LAYER, PER_HEAD, PER_WORD = 17, 2, 4
LOADED = 100 * 10**6  # bytes that a process holds once it computes, beside libraries: code of kernels, texts, tables
COPIES = {"pairs": 6, "demonstrations": 5, "rollouts": 10}  # of the parameters: gradient, moments, reference, critic
MEASURING = 8  # those of a measurement: d, the gradient, both scaled, and the next checkpoint


def process_memory(spec: recipes.Spec, base: int) -> float:
    """Bytes that a process needs for a run, at most: libraries (`base`), model, optimiser and activations."""
    sft = _sft(spec)
    size, data = model_size(sft.policy, sft.data), spec.data if hasattr(spec, "data") else sft.data
    length = data.max_prompt + data.max_response
    if hasattr(spec, "optimisation"):
        pairs = 2 if getattr(spec, "takes", "pairs") == "pairs" else 1
        rows = spec.optimisation.micro_batch or pairs * spec.optimisation.batch_size
        copies = COPIES[getattr(spec, "takes", "pairs")]
    else:
        wanted = getattr(spec, "size", None)
        rows, copies = min(ROWS, ROWS if wanted is None else 2 * wanted), MEASURING
    graph = rows * length * size["layers"] * (PER_LAYER * size["width"] + PER_HEAD * size["heads"] * length)
    words = max(rows, min(ROWS, 2 * data.held_out)) * data.max_response * size["words"] * PER_WORD
    return base + LOADED + 4.0 * (copies * size["parameters"] + graph + words)


_PROCESS = """
import sys
import torch
from prefdyn.book import evidence
from prefdyn.lens import memory
torch.set_num_threads(1)
print(memory.held("cpu"), flush=True)
x = torch.randn(256, 64, requires_grad=True)
layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
while len(sys.argv) > 1:
    layers(x).logsumexp(-1).sum().backward()
"""


@dataclass(frozen=True)
class Process:
    """What a process costs before it computes anything: seconds to start, bytes that its libraries take."""

    start: float
    memory: int


@contextlib.contextmanager
def company(others: int) -> Iterator[Process]:
    """Measure what a process costs, and keep `others` of them busy inside, one thread each, as other runs would."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    began = time.perf_counter()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, *(["busy"] if others else [])], stdout=subprocess.PIPE, env=environment
        )
        for _ in range(max(1, others))
    ]
    try:
        told = [process.stdout.readline() for process in running]
        yield Process(time.perf_counter() - began, max(int(line or 0) for line in told))
    finally:
        for process in running:
            process.terminate()
            process.communicate()


# All together


@dataclass(frozen=True)
class Kind:
    """Runs of one kind: how many are missing, how many there, seconds of one process for the missing, how known."""

    missing: int
    there: int
    seconds: float
    how: str


@dataclass(frozen=True)
class Estimate:
    """What something will cost: wall time (s), memory of all processes and disk (bytes). Prints as a page of text.

    missing, there: runs. by_kind: the same by kind of run. how: sentences on what this rests on.
    """

    what: str
    seconds: float
    memory: float
    disk: float
    missing: int
    there: int
    processes: int
    by_kind: dict[str, Kind]
    how: tuple[str, ...]

    def __str__(self) -> str:
        lines = [self.what]
        if self.by_kind:
            lines.append(f"  {'runs of kind':18} {'missing':>7} {'there':>6} {'seconds':>8}  known from")
        for name, kind in self.by_kind.items():
            lines.append(f"  {name:18} {kind.missing:7} {kind.there:6} {kind.seconds:8.0f}  {kind.how}")
        if not self.missing:
            none = f"all {self.there} runs are there" if self.there else "no run is asked for"
            lines.append(f"Nothing is to be computed: {none}.")
        many = "1 process" if self.processes == 1 else f"{self.processes} processes"
        lines.append(
            f"Time: about {duration(self.seconds)} with {many}. Disk: {readable(self.disk)}. "
            f"Memory: up to {readable(self.memory)}."
        )
        return "\n".join([*lines, *self.how])


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def missing(store: RunStore, specs: Iterable[recipes.Spec], sure: Mapping[str, Any] = {}) -> tuple[dict, dict]:
    """Runs by key, parents first: those that are to be computed, and those that are there and asked for or read.

    sure: keys that will be there.
    """
    todo: dict[str, recipes.Spec] = {}
    there: dict[str, recipes.Spec] = {}

    def visit(spec: recipes.Spec) -> None:
        key = store.key(spec)
        if key in todo or key in there or key in sure:
            return
        if store.find(spec) is not None:
            there[key] = spec
            return
        for parent in spec.parents():
            visit(parent)
        todo[key] = spec

    for spec in specs:
        visit(spec)
    return todo, there


def processes(specs: Iterable[recipes.Spec], cores: int | None = None) -> int:
    """How many processes `RunStore.ensure` computes these missing runs in."""
    specs = list(specs)
    cores = cores or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    return max(1, min(cores, len(specs), 1 + int(sum(spec.work() for spec in specs) / WORTH_A_PROCESS)))


def wall(seconds: Mapping[str, float], needs: Mapping[str, set[str]], count: int) -> float:
    """Wall time of runs in `count` processes, each as soon as its parents are done and a process is free.

    Args: seconds, by key, in the order in which they are given out. needs, keys of parents, by key; those that are not
    in `seconds` are there.
    """
    waiting, now, done = list(seconds), 0.0, set()
    running: list[tuple[float, str]] = []
    while waiting or running:
        ready = [key for key in waiting if needs[key] & seconds.keys() <= done]
        for key in ready[: count - len(running)]:
            waiting.remove(key)
            heapq.heappush(running, (now + seconds[key], key))
        now, key = heapq.heappop(running)
        done.add(key)
    return now


PER_CELL = 0.35  # seconds of a code cell that computes no run, figures included; median over the book's chapters


def _costs(store: RunStore, todo: Mapping[str, recipes.Spec]) -> dict[str, Cost]:
    """What each of these runs costs, by key."""
    shapes = {shape(spec): spec for spec in reversed(todo.values())}
    costs = history(store, todo.values())
    with tempfile.TemporaryDirectory() as place:
        trials = _Beside(Path(place), store)
        for name, spec in shapes.items():
            if name not in costs:
                costs[name] = try_out(spec, trials, store)
    return {key: costs[shape(spec)] for key, spec in todo.items()}


def _by_kind(
    todo: Mapping[str, recipes.Spec], there: Mapping[str, recipes.Spec], costs: Mapping[str, Cost]
) -> dict[str, Kind]:
    kinds = dict.fromkeys(spec.kind for spec in (*todo.values(), *there.values()))
    found = {}
    for kind in kinds:
        own = [costs[key] for key, spec in todo.items() if spec.kind == kind]
        how = ", ".join(dict.fromkeys(cost.how for cost in own))
        count = sum(spec.kind == kind for spec in there.values())
        found[kind] = Kind(len(own), count, sum(cost.seconds for cost in own), how)
    return found


def of_runs(
    what: str,
    groups: Sequence[Iterable[recipes.Spec]],
    store: RunStore | None = None,
    *,
    workers: int | None = None,
    beside: Callable[[Process], float] = lambda process: 0.0,
    apart: bool = False,
    notes: Sequence[str] = (),
) -> Estimate:
    """What it costs to have runs computed, by one call of `RunStore.ensure` for each group.

    Args: what, a line that names it. workers, processes at most. beside, seconds that all else takes, of what a process
    costs. apart, whether each run has a process of its own. notes, sentences to add.
    """
    store = store or Looking()
    todo: dict[str, recipes.Spec] = {}
    there: dict[str, recipes.Spec] = {}
    parts = []
    for group in groups:
        new, known = missing(store, group, todo)
        todo, there = todo | new, there | known
        parts.append((new, processes(new.values(), workers) if new else 1))
    many = max((count for _, count in parts), default=1)
    if apart and todo:
        many = min(workers or os.cpu_count() or 1, len(todo))
        parts = [(todo, many)]
    with company(many - 1) as process, _one_thread():
        costs = _costs(store, todo) if todo else {}
    seconds, start = beside(process), process.start
    for new, count in parts:
        each = {key: costs[key].seconds + (start if apart else 0.0) for key in new}
        needs = {key: {store.key(p) for p in spec.parents()} for key, spec in new.items()}
        seconds += wall(each, needs, count) + (start if count > 1 and not apart else 0.0)
    most = max((process_memory(spec, 0) for spec in todo.values()), default=0.0)
    own = 0 if many == 1 else 1  # the process that waits for the others
    return Estimate(
        what=what,
        seconds=seconds,
        memory=(many + own) * process.memory + (many * most or LOADED),
        disk=sum(cost.disk for cost in costs.values()),
        missing=len(todo),
        there=len(there),
        processes=many,
        by_kind=_by_kind(todo, there, costs),
        how=tuple(notes),
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, unless there is an accelerator: what a run has where there are as many processes as cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if torch.cuda.is_available() else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _past(source: Path, profile: str) -> float | None:
    """Seconds that the cells of a chapter took that compute no run, the last time it was executed into the book."""
    executed = source.parent.parent / "book" / "notebooks" / source.name
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, nbformat.ValidationError):
        notebook = nbformat.read(executed, as_version=4)
        if notebook.metadata.papermill.parameters.get("profile", "reader") == profile:
            cells = [c for c in notebook.cells if c.cell_type == "code" and ".ensure(" not in c.source]
            return sum(cell.metadata.papermill.duration or 0.0 for cell in cells)
    return None


def estimate_chapter(source: Path, given: Mapping[str, Any], store: RunStore | None = None) -> Estimate:
    """What executing a chapter costs. Raises as `asked_for`."""
    store = store or Looking()
    asked = asked_for(source, given, store.root)
    own = _past(source, given.get("profile") or "reader")
    cells = PER_CELL * asked.cells if own is None else own
    return of_runs(
        f"{source.stem}: what executing it takes",
        asked.groups,
        store,
        beside=lambda process: process.start + cells,
        notes=asked.notes,
    )


def estimate_study(name: str, store: RunStore | None = None) -> Estimate:
    """What the cells of a study cost that are not in its table, on this machine. Raises StudyError."""
    store = store or Looking()
    study = studies.read(name)
    kept = studies.kept_rows(study)
    changed = studies.changes(study, kept, lambda number: studies.code_today(study, number))
    cells = [cell for number, cell in enumerate(study.cells) if changed.get(number) != ""]
    specs = [spec for cell in cells for spec in studies.specs(study, cell)]
    return of_runs(
        f"study {name}: {len(cells)} of {len(study.cells)} cells to do",
        [specs],
        store,
        workers=os.cpu_count() or 1,
        beside=lambda process: process.start * len(cells) / (os.cpu_count() or 1),
        apart=True,
    )


# The lens on a model of one's own


@dataclass(frozen=True)
class LensCost:
    """What the lens on checkpoints costs: seconds in all and of a checkpoint; memory and disk in bytes.

    memory: of weights and of what passes hold, without libraries.
    """

    seconds: float
    checkpoint: float
    memory: float
    disk: float

    def __str__(self) -> str:
        lines = (
            f"time    {duration(self.seconds)}, {duration(self.checkpoint)} a checkpoint; replies for D', which "
            "--targets final needs, and the report come on top",
            f"memory  {readable(int(self.memory))} beside the libraries",
            f"disk    {readable(int(self.disk))}",
        )
        return "\n".join(lines)


TOKEN = 40  # bytes of a row of `tokens` on disk
TRIED = 8  # rows of a pass that is timed


def _seconds(function: Callable[[], Any]) -> float:
    """Seconds of a call: the faster of two, since the first one loads code."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def lens_cost(
    model: PreTrainedModel,
    batch: Batch,
    checkpoints: int,
    *,
    targets: Batch | None = None,
    rows: int = TRIED,
    method: str = "forward",
    sides: int = 2,
    kept: int = 256,
) -> LensCost:
    """What measuring `checkpoints` of a model costs, from one pass of each sort over a few of the probe's own rows.

    At a checkpoint: d, a gradient over the targets; scores, a forward-mode pass over the probe; a gradient over each
    half of the objective, together one over the probe. Once: log-probs of the probe under the reference.

    Args: model, as it is loaded for the measurement. batch, the probe encoded, both sides of pairs. targets, D',
    by default as many rows as the probe has examples. rows, of a pass. method, as `alignment.token_scores`. sides,
    rows an example. kept, examples whose tokens are kept.
    Raises ValueError for no rows or no checkpoints.
    """
    if not len(batch) or checkpoints < 1 or rows < 1:
        raise ValueError(f"lens_cost: {len(batch)} rows, checkpoints={checkpoints}, rows={rows}: at least 1 of each")
    ordered = batch.attention.sum(-1).argsort()
    spread = torch.linspace(0, len(batch) - 1, min(rows, len(batch)), device=ordered.device).round().long()
    few = batch.rows(ordered[len(ordered) // 2 :][: len(spread)] if len(spread) < len(batch) else ordered)
    share = _padded(batch, rows) / few.ids.numel()
    drawn = _padded(targets, rows) / few.ids.numel() if targets is not None else share / sides
    w = few.response.to(torch.float32)
    direction = alignment.gradient(model, [(few, w)])
    backward = _seconds(lambda: alignment.gradient(model, [(few, w)]))
    forward = _seconds(lambda: alignment.token_scores(model, few, direction, method))
    plain = _seconds(lambda: sequence_logps(model, few))
    each = backward * (drawn + share) + forward * share
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    moving = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    config = model.config.get_text_config()
    length = int(batch.attention.sum(-1).max())
    graph = (
        length
        * config.num_hidden_layers
        * (PER_LAYER * config.hidden_size + PER_HEAD * config.num_attention_heads * length)
    )
    held = rows * (graph + PER_WORD * length * config.vocab_size) * model.dtype.itemsize
    shown = int(batch.response.sum()) * min(1.0, kept * sides / len(batch))
    return LensCost(
        seconds=checkpoints * each + plain * share,
        checkpoint=each,
        memory=size + 4 * moving + held,
        disk=checkpoints * shown * TOKEN,
    )


def _padded(batch: Batch, rows: int) -> int:
    """Positions that passes over rows of like length go through, padding included."""
    return sum(part.ids.numel() for _, part in batch.pieces(rows))


# The command


def estimate_lens(series: folders.Series, question: asking.Question) -> LensCost:
    """What `prefdyn lens` will take on checkpoints: one of them is read, and passes over some of its probe are timed.

    Raises what the measurement itself would of folders, pairs and methods that do not fit.
    """
    method = question.found()
    tokenizer, where = folders.tokenizer_of(series)
    probe = asking.draw(question, method, tokenizer, asking.context_of(series))
    model = folders.Loader(series, where, recipes.device(), asking.DTYPES[question.dtype]).model(series.checkpoints[-1])
    sides = [probe.batches[name] for name in ("chosen", "rejected")[: 2 if method.takes == "pairs" else 1]]
    batch = concatenate(sides).to(model.device)
    way = alignment.choose_method(model, tokenizer)
    return lens_cost(
        model, batch, len(series.checkpoints), rows=afterwards.ROWS, method=way, sides=len(sides), kept=TOKENS_OF
    )


def estimate(
    what: Annotated[str, typer.Argument(help="a chapter's name, number or path, study:NAME, or lens")],
    checkpoints: Annotated[list[Path], typer.Argument(help="of lens: folders that a trainer saved")] = [],  # noqa: B006
    parameter: Annotated[list[str], typer.Option("-p", "--parameter", help="name=value; repeat for more")] = [],  # noqa: B006
    pairs: Annotated[str | None, typer.Option(help="of lens: the preference file")] = None,
    method: Annotated[str, typer.Option(help="of lens: whose weights")] = "dpo",
    base: Annotated[str | None, typer.Option(help="of lens: the base model of adapters")] = None,
    probe: Annotated[int, typer.Option(help="of lens: pairs to measure on, at most")] = 64,
    max_prompt: Annotated[int | None, typer.Option(help="of lens: tokens of a prompt")] = None,
    max_response: Annotated[int | None, typer.Option(help="of lens: tokens of a response")] = None,
    dtype: Annotated[str, typer.Option(help="of lens: float32 or bfloat16")] = "float32",
) -> None:
    """Say what a chapter, a study or the lens on checkpoints will take - time, disk, memory - before anything runs."""
    from . import cli

    given = cli.parse_assignments(parameter)
    kind, colon, name = what.partition(":")
    if what != "lens" and (checkpoints or pairs is not None):
        raise params.ParameterError(f"{what!r}: checkpoints and --pairs are for 'lens' alone; allowed: -p name=value")
    if what == "lens":
        if not checkpoints or pairs is None or given:
            raise params.ParameterError("lens: needs folders of checkpoints and --pairs FILE, and takes no -p")
        limits = {"max_prompt": max_prompt, "max_response": max_response}
        question = asking.Question(pairs=pairs, method=method, probe=probe, dtype=dtype, **limits)
        typer.echo(estimate_lens(folders.read(checkpoints, base), question))
    elif colon and kind == "study":
        if given:
            raise params.ParameterError(f"-p {parameter[0]!r}: a study has no parameters; its file says them all")
        typer.echo(estimate_study(name))
    else:
        typer.echo(estimate_chapter(cli.chapter_path(what), given))
