"""Memory: a limit as people write it, what a pass needs, how many rows fit, and fewer of them where too many did not.

What a pass over n rows of one length needs is a + b n: a for what does not depend on rows (tangents of the parameters,
say), b for the activations of a row. Two small measurements give both.
"""

import contextlib
import ctypes
import gc
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

UNITS = {"B": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}}
UNITS |= {f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)}
SAFETY = 0.1  # part of a limit that is left free: for rows longer than measured, for what an allocator cannot reuse
CLEAR = 8 * 10**6  # bytes of growth between two measurements that pages and work spaces of kernels do not hide
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class DoesNotFit(ValueError):
    """Not even one row fits; the message says what was tried, how much it needs and how much there is."""


def parse(text: str) -> int:
    """Bytes of a text like "20GB", "512 MB" or "1.5GiB"; KB to TB are powers of 1000, KiB to TiB of 1024.

    Raises ValueError for anything else, a number without a unit included.
    """
    known = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    size = float(known[1]) * UNITS.get(known[2].upper(), 0) if known else 0
    if size < 1:
        raise ValueError(
            f"memory={text!r}: must be a positive number and a unit, such as 20GB or 512MiB; units: B, KB, MB, GB, TB "
            "(powers of 1000), KiB, MiB, GiB, TiB (of 1024)"
        )
    return int(size)


def readable(size: float) -> str:
    """Bytes as "1.2 GB", in the largest power of 1000 that leaves at least 1."""
    power = min(int(math.log10(abs(size)) // 3), 4) if abs(size) >= 1 else 0
    return f"{size / 1000**power:.1f} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


def _cuda(device: torch.device | str | None) -> bool:
    """Whether a GPU's memory is meant: where no device is named, whether this process uses one."""
    return torch.cuda.is_initialized() if device is None else torch.device(device).type == "cuda"


def _status(key: str) -> int | None:
    """Bytes of resident memory by /proc: now ("VmRSS") or at its peak ("VmHWM"); None where it does not say."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def _most_resident() -> int:
    """The peak of resident memory since the process began, by getrusage."""
    import resource  # not on every system, and only here needed

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held(device: torch.device | str | None = None) -> int:
    """Bytes that this process holds now: tensors on a GPU, or resident memory.

    device: None for the current GPU if this process uses one, else the CPU.
    """
    if _cuda(device):
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _most_resident()


def _free() -> None:
    """Give back what nothing uses any more: cycles, cached blocks of GPUs, free pages of the C library."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def peak(function: Callable[[], object], device: torch.device | str | None = None) -> int:
    """Bytes by which memory in use rose above its start while `function` ran.

    On a GPU of torch's tensors (`torch.cuda.max_memory_allocated`), without what its allocator sets aside or other
    processes use. On a CPU of resident memory, work spaces of kernels included, where Linux lets a process reset its
    own peak; elsewhere of getrusage's, which rises only above all that came before: then a bound from below.
    """
    _free()
    if _cuda(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    try:
        _CLEAR_REFS.write_text("5")  # sets the peak to what is resident now
    except OSError:
        before = _most_resident()
        function()
        return _most_resident() - before
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


@dataclass(frozen=True)
class Rows:
    """How many rows a pass may have within a limit, and why: `fixed` + `each` * rows bytes were measured.

    measured: bytes by number of rows. safety: the part of `limit` that was to be left free; one row alone may go into
    it. Prints as a sentence.
    """

    rows: int
    limit: int
    safety: float
    fixed: float
    each: float
    measured: dict[int, int]

    @property
    def expected(self) -> float:
        """Bytes that a pass of `rows` rows needs by the fit."""
        return self.fixed + self.each * self.rows

    def __str__(self) -> str:
        seen = ", ".join(f"{readable(size)} at {n}" for n, size in self.measured.items())
        return (
            f"{self.rows} rows a pass, expected to need {readable(self.expected)} of {readable(self.limit)} "
            f"({self.safety:.0%} is left free; measured: {seen})"
        )


def rows_within(limit: int, cost: Callable[[int], object], most: int, device: torch.device | str | None = None) -> Rows:
    """The largest number of rows, `most` at most, with which a pass stays within `limit` bytes, SAFETY of it left free.

    Args: limit, bytes above what is held now (`held`): of a limit on everything, subtract that first. cost, makes one
    pass over the given number of rows; of the longest ones, since memory grows with length too. device, see `peak`.
    The pass is made over one row, twice, since the first one loads code, and over a few: two if four might pass the
    limit, and four times as many until what a row adds can be told from noise. Fits a line through the first and the
    last. Returns at least 1. Raises DoesNotFit if one row needs more than the limit, and ValueError for a limit or
    `most` below 1.
    """
    if limit < 1 or most < 1:
        raise ValueError(f"rows_within: limit={limit}, most={most}: must be at least 1 each")
    try:
        cost(1)
        measured = {1: peak(lambda: cost(1), device)}
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise DoesNotFit(f"one row does not fit: out of memory ({_first_line(error)})") from error
    one = measured[1]
    if one > limit:
        raise DoesNotFit(
            f"one row needs {readable(one)}, and the limit is {readable(limit)}: allow more memory, or shorter rows"
        )
    usable, each = (1 - SAFETY) * limit, 0.0
    few = min(4 if 4 * one <= limit else 2, most)
    while few > max(measured):
        try:
            measured[few] = peak(lambda few=few: cost(few), device)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            return Rows(1, limit, SAFETY, one, 0.0, measured)
        each = max(0.0, (measured[few] - one) / (few - 1))
        if measured[few] - one < CLEAR and 4 * measured[few] <= usable:
            few = min(4 * few, most)
    fixed = one - each
    rows = math.floor((usable - fixed) / each) if each else most if max(measured.values()) <= usable else 1
    return Rows(max(1, min(rows, most)), limit, SAFETY, fixed, each, measured)


# What torch says where it raises a plain RuntimeError: its CPU allocator on Linux and elsewhere, and libraries of GPUs.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def fitting(function: Callable[[int], T], rows: int) -> tuple[T, int]:
    """What `function(rows)` returns, and with how many rows it did: half as many each time that memory ran out.

    Raises ValueError for rows below 1, DoesNotFit that names what was tried if memory runs out with one row too, and
    whatever else the function raises.
    """
    if rows < 1:
        raise ValueError(f"rows={rows}: must be at least 1")
    tried: list[int] = []
    while True:
        try:
            return function(rows), rows
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            tried.append(rows)
            said = _first_line(error)
        # only here, behind the handler, is the error gone, and with it the frames that hold tensors
        _free()
        if rows == 1:
            raise DoesNotFit(f"out of memory with {' rows, then '.join(map(str, tried))} row a pass: {said}")
        rows //= 2
