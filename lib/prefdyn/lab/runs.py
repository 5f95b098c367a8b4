"""The run store: every result is computed once, kept under a hash of what it depends on, and checked when read.

A run is described by a spec: a frozen pydantic model with a `kind`, `parents()` (specs that it reads), `work()`
(rough cost, in sequences) and `compute(folder, store, tick)`, which writes files into `folder`. Its key hashes the
spec, the code that `compute` can reach, and the versions of the packages that shape numbers. A changed config or
code therefore never finds an old result, and an unchanged one is never computed twice. What a notebook changes in the
loaded library is in none of these: it is refused, but for values that a spec carries (its class names them in
`carries`, e.g. {"world.SKILLS"}).
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, SoftFileLock
from pydantic import BaseModel
from tqdm import tqdm

from .fingerprint import RunError, code_fingerprint, modules_of, refuse_changes

NUMERIC_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
MANIFEST = "manifest.json"
WORTH_A_PROCESS = 40_000  # sequences; below, starting another process takes longer than it saves
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
LEAST_ROOM = 2**20  # bytes; with less, whatever fails to be written fails for want of room


def project_root() -> Path:
    """The folder of the book that holds the current folder, or else the current folder."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "lib" / "prefdyn").is_dir()), here)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say in a line why nothing can be kept in a folder."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            raise RunError(
                f"{folder}: this file system has no locks; set PREFDYN_RUNS to a folder on one that has"
            ) from error
        raise RunError(
            f"{folder}: runs cannot be kept here ({error.strerror or error}); set PREFDYN_RUNS to a folder with room "
            "that you may write to"
        ) from error


@contextlib.contextmanager
def _computing(folder: Path) -> Iterator[None]:
    """Say in a line if a run failed because nothing more can be written, which libraries say in ways of their own."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        told = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EDQUOT, errno.ENOSPC)
        if told or shutil.disk_usage(folder).free < LEAST_ROOM:
            raise RunError(
                f"{folder}: there is no room to keep runs ({error}); make some, or set PREFDYN_RUNS to another folder. "
                "Runs that were finished are kept."
            ) from error
        raise


@contextlib.contextmanager
def _threads(work: float) -> Iterator[None]:
    """One thread for what is not worth a process: its bits then do not depend on who asks for it, and it is faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < WORTH_A_PROCESS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that shape numbers."""
    return {name: importlib.metadata.version(name) for name in NUMERIC_PACKAGES}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """A finished run: a folder whose files are known to be whole."""

    key: str
    folder: Path

    def frame(self, name: str) -> pd.DataFrame:
        """A table of the run, e.g. "checkpoints"."""
        return pd.read_parquet(self.folder / f"{name}.parquet")

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))


class RunStore:
    """Runs in a folder, by default data/runs of the project (or the environment variable PREFDYN_RUNS)."""

    def __init__(self, root: str | Path | None = None, say: Callable[[str], None] | None = None):
        self.root = Path(root or os.environ.get("PREFDYN_RUNS") or project_root() / "data" / "runs")
        self.say = say or (lambda text: print(text, file=sys.stderr))
        self._whole: set[str] = set()

    def key(self, spec: BaseModel) -> str:
        """Name of the run: its kind and a hash of spec, code and package versions.

        Raises RunError if the code is not loaded as it is written: no key would tell.
        """
        refuse_changes(spec)
        identity = {
            "spec": spec.model_dump(mode="json", context="identity"),  # without where files are that it hashes
            "code": code_fingerprint(*modules_of(spec)),
            "versions": versions(),
        }
        return f"{spec.kind}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}"

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a run's folder, or None."""
        try:
            listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if not listed:
                return f"{MANIFEST} is empty"
            for name, digest in listed.items():
                if not (folder / name).is_file():
                    return f"{name} is missing"
                if file_hash(folder / name) != digest:
                    return f"{name} has changed since it was written"
        except (OSError, ValueError, AttributeError) as error:
            return f"{MANIFEST} cannot be read ({type(error).__name__})"
        return None

    def find(self, spec: BaseModel) -> Run | None:
        """The finished run of `spec`, or None. A damaged one is set aside, said aloud, and counts as missing."""
        key = self.key(spec)
        folder = self.root / key
        if not folder.is_dir():
            return None
        if key not in self._whole:
            problem = self._damage(folder)
            if problem:
                aside = self.root / f"{key}.damaged-{time.time_ns()}"
                with _writing(self.root):
                    try:
                        folder.rename(aside)
                    except FileNotFoundError:  # another process has just set it aside
                        return None
                self.say(f"run {key} is damaged: {problem}; set aside as {aside.name}, will be computed again")
                return None
            self._whole.add(key)
        return Run(key, folder)

    def get(self, spec: BaseModel, tick: Callable[[float], None] = lambda work: None) -> Run:
        """The run of `spec`, computed now if it is missing, continued if it was interrupted."""
        found = self.find(spec)
        if found:
            return found
        for parent in spec.parents():
            self.get(parent, tick)
        key = self.key(spec)
        partial, final = self.root / f"{key}.partial", self.root / key
        with contextlib.ExitStack() as held:
            with _writing(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(FileLock(self.root / f"{key}.lock"))
                if isinstance(lock, SoftFileLock):  # a mere file, which a run that is cut off would leave behind
                    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            found = self.find(spec)  # another process may have finished it while we waited
            if found:
                return found
            if partial.is_dir():
                self.say(f"run {key} was interrupted: continuing it")
            with _writing(self.root):
                partial.mkdir(exist_ok=True)
            started = time.perf_counter()
            with _computing(self.root), _threads(spec.work()):
                spec.compute(partial, self, tick)
                self._finish(spec, partial, time.perf_counter() - started)
                partial.rename(final)
        (self.root / f"{key}.lock").unlink(missing_ok=True)
        self._whole.add(key)
        return Run(key, final)

    def _finish(self, spec: BaseModel, folder: Path, seconds: float) -> None:
        """Write the spec, the provenance and, last, the manifest that makes the run valid."""
        _write_json(folder / "spec.json", spec.model_dump(mode="json"))
        _write_json(
            folder / "provenance.json",
            {
                "code": code_fingerprint(*modules_of(spec)),
                "versions": versions() | {"python": platform.python_version()},
                "hardware": {
                    "system": platform.system(),
                    "machine": platform.machine(),
                    "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(),
                    "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                },
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(seconds, 3),
            },
        )
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        _write_json(folder / MANIFEST, {p.relative_to(folder).as_posix(): file_hash(p) for p in files})

    def ensure(self, specs: Iterable[BaseModel], workers: int | None = None) -> list[Run]:
        """All runs of `specs`, in order; missing ones (and their parents) are computed side by side.

        workers: processes, by default one a core, or one where there is an accelerator. Progress is shown with the
        time left on a terminal or where PREFDYN_PROGRESS is set. If one run fails, the others that do not depend on
        it are finished and kept, then the first error is raised.
        """
        specs = list(specs)
        todo = self._missing(specs)
        if todo:
            cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
            total = sum(spec.work() for spec in todo.values())
            count = max(1, min(workers or cores, len(todo), 1 + int(total / WORTH_A_PROCESS)))
            threads = 1 if total < WORTH_A_PROCESS else max(1, cores // count)
            hidden = None if not os.environ.get("PREFDYN_PROGRESS") else False
            layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed} spent, {remaining} left"
            with tqdm(total=total, desc=f"{len(todo)} runs", disable=hidden, leave=False, bar_format=layout) as bar:
                self._compute_all(todo, count, threads, bar)
        return [self.get(spec) for spec in specs]

    def gather(self, specs: Mapping[int, BaseModel], name: str) -> pd.DataFrame:
        """One table of several runs, {seed: spec}, under each other, with the column `seed`."""
        return pd.concat(
            [self.get(spec).frame(name).assign(seed=seed) for seed, spec in specs.items()], ignore_index=True
        )

    def _missing(self, specs: list[BaseModel]) -> dict[str, BaseModel]:
        todo: dict[str, BaseModel] = {}

        def visit(spec: BaseModel) -> None:
            if self.key(spec) not in todo and self.find(spec) is None:
                for parent in spec.parents():
                    visit(parent)
                todo[self.key(spec)] = spec

        for spec in specs:
            visit(spec)
        return todo

    def _compute_all(self, todo: dict[str, BaseModel], count: int, threads: int, bar: tqdm) -> None:
        """Compute runs in `count` processes (here, if it is one), each as soon as its parents are there."""
        needs = {key: {self.key(p) for p in spec.parents()} & todo.keys() for key, spec in todo.items()}
        waiting, done, errors = dict(todo), set(), []

        def ready() -> list[str]:
            return [key for key in waiting if needs[key] <= done]

        def settle(key: str, outcome: Callable[[], Any]) -> None:
            try:
                outcome()
                done.add(key)
            except Exception as error:
                error.add_note(f"in run {key}")
                errors.append(error)

        if count == 1:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            while keys := ready():
                settle(keys[0], functools.partial(self.get, waiting.pop(keys[0]), bar.update))
            torch.set_num_threads(before)
        else:
            context = _workers({type(spec).__module__ for spec in todo.values()})
            done_work = context.Value("d", 0.0)
            running: dict[Future, str] = {}
            with ProcessPoolExecutor(count, context, _start_worker, (threads, done_work, str(self.root))) as pool:
                while running or ready():
                    running |= {pool.submit(_work, waiting.pop(key)): key for key in ready()}
                    for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                        settle(running.pop(future), lambda future=future: [self.say(line) for line in future.result()])
                    bar.n = min(done_work.value, bar.total)
                    bar.refresh()
        if errors:
            errors[0].add_note(f"{len(done)} other runs are finished and kept; {len(waiting)} were not started")
            raise errors[0]

    def list(self) -> list[dict]:
        """One dict for each finished run: key, kind, seconds, finished, megabytes; the oldest first."""
        rows = []
        for folder in sorted(self.root.glob("*-*")):
            if not (folder / MANIFEST).is_file() or "." in folder.name:
                continue
            try:
                provenance = Run(folder.name, folder).json("provenance")
            except (OSError, ValueError):
                provenance = {"seconds": math.nan, "finished": "damaged"}
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            rows.append(
                {
                    "key": folder.name,
                    "kind": folder.name.rpartition("-")[0],
                    "seconds": provenance["seconds"],
                    "finished": provenance["finished"],
                    "megabytes": round(size / 1e6, 2),
                }
            )
        return sorted(rows, key=lambda row: row["finished"])

    def named(self, key: str) -> Run:
        """The run with this key, or a unique beginning of it. Raises KeyError with what there is."""
        keys = [row["key"] for row in self.list()]
        matches = [k for k in keys if k.startswith(key)]
        if len(matches) != 1:
            what = f"{len(matches)} runs begin like that" if matches else f"no such run among {len(keys)}"
            raise KeyError(f"{key!r}: {what}")
        return Run(matches[0], self.root / matches[0])

    def remove(self, key: str) -> None:
        """Delete one finished run. Raises KeyError as `named`."""
        run = self.named(key)
        with _writing(self.root):
            shutil.rmtree(run.folder)
        self._whole.discard(run.key)


_worker: dict[str, Any] = {}


def _workers(modules: Iterable[str]) -> multiprocessing.context.BaseContext:
    """How processes are made: copies of one that has imported `modules`, which takes seconds, once for all; where the
    system cannot, each imports them anew. A plain fork would copy a process that computes, with all its threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted(modules))
    return context


def _end_with_parent() -> None:
    """Stop when the process that wanted the results is gone; what was interrupted is continued next time."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _start_worker(threads: int, done_work, root: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker.update(done_work=done_work, root=root)


def _work(spec: BaseModel) -> list[str]:
    """Compute one run in a worker process; returns what it had to say."""
    said: list[str] = []

    def tick(work: float) -> None:
        with _worker["done_work"].get_lock():
            _worker["done_work"].value += work

    RunStore(_worker["root"], said.append).get(spec, tick)
    return said
