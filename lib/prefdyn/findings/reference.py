"""Reference results: the numbers of an edition with their seeds, and how another run of it compares with them."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from .stats import mean_interval

ROUNDING = 1e-9  # relative: up to here two numbers are the same
AGREES = ("identical", "agrees")


class ReferenceError(ValueError):
    """Reference results that cannot be read or used; the message says why."""


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """The numbers over seeds that executed chapters left in `folder`, as {"chapter:name": {value, seeds}}.

    Of numbers whose value is the mean of their seeds. Raises ReferenceError if no chapter has left any.
    """
    found, single = {}, 0
    for path in sorted(folder.glob("*.json")):
        for name, kept in json.loads(path.read_text(encoding="utf-8")).items():
            seeds = kept.get("seeds", [])
            single += len(seeds) == 1
            if len(seeds) > 1 and all(map(math.isfinite, seeds)) and _is_mean(kept["value"], seeds):
                found[f"{path.stem}:{name}"] = {"value": kept["value"], "seeds": seeds}
    if not found and single:
        raise ReferenceError("the executed chapters have one seed, and a reference needs the spread of several")
    if not found:
        raise ReferenceError(f"no executed chapter has left numbers in {folder.name}; `make book` executes them")
    return found


def _is_mean(value: float, seeds: list[float]) -> bool:
    return abs(value - sum(seeds) / len(seeds)) <= 1e-6 * max(1.0, abs(value))


def tolerance(seeds: list[float]) -> float:
    """How far another run may be: the half-width of the 95% interval over the reference's seeds."""
    interval = mean_interval(seeds)
    return max((interval.high - interval.low) / 2, ROUNDING * abs(interval.mean))


def _status(reference: dict[str, Any], now: float | None) -> str:
    value, seeds = reference["value"], reference["seeds"]
    if not _is_mean(value, seeds):
        return "edited"  # the value is not the mean of its seeds: the file is not as it was written
    if now is None:
        return "missing"
    if abs(now - value) <= ROUNDING * max(1.0, abs(value)):
        return "identical"
    return "agrees" if abs(now - value) <= tolerance(seeds) else "differs"


def compare(reference: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """A row for each number of the reference: number, reference, now, tolerance and status.

    status: identical; agrees (within the tolerance); differs; missing (not among the numbers now); edited (the value
    is not the mean of its seeds).
    """
    return pd.DataFrame(
        {
            "number": name,
            "reference": kept["value"],
            "now": now[name]["value"] if name in now else math.nan,
            "tolerance": tolerance(kept["seeds"]),
            "status": _status(kept, now[name]["value"] if name in now else None),
        }
        for name, kept in reference.items()
    )


def read(path: Path) -> dict[str, Any]:
    """Reference results: profile, versions and numbers. Raises ReferenceError if the file is not one of them."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        for name, kept in known["numbers"].items():
            if not (isinstance(kept["value"], int | float) and len(kept["seeds"]) > 1):
                raise ReferenceError(f"{path.name}: {name} needs a value and at least two seeds")
    except FileNotFoundError as error:
        raise ReferenceError(f"there are no reference results {path.name} in {path.parent.name}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ReferenceError):
            raise
        raise ReferenceError(f"{path.name} holds no reference results ({type(error).__name__}: {error})") from error
    return known
