"""Reference results: numbers of an edition with their seeds, its verdicts, and how another run compares with them."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from .claims import VERDICTS
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


def verdicts(folder: Path) -> dict[str, str]:
    """The verdicts that executed chapters left in `folder`, as {"chapter:name": one of `claims.VERDICTS`}."""
    kept = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    found = {f"{chapter}:{name}": one.get("value") for chapter, values in kept.items() for name, one in values.items()}
    return {name: value for name, value in found.items() if isinstance(value, str) and value in VERDICTS}


Intervals = dict[str, dict[str, Any]]  # of rules, as `firmness.intervals` has them


def path(root: Path, profile: str, second: bool = False) -> Path:
    """Where the reference results of a profile are, or those of a second machine."""
    return root / "data" / "reference" / f"{profile}{'-second' if second else ''}.json"


def intervals(folder: Path, chapter: str, names: Iterable[str]) -> Intervals:
    """The intervals of rules that an executed chapter left in `folder`, as `firmness.intervals` has them."""
    path = folder / f"{chapter}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        name: {"mean": one["value"], "low": one["interval"][0], "high": one["interval"][1], "n": one["n"]}
        | {"values": one.get("seeds", [])}
        for name, one in ((name, kept.get(name, {})) for name in names)
        if "interval" in one
    }


def turned(reference: dict[str, str], now: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Verdicts that are not those of the reference, by name: (then, now); "missing" where there is none now."""
    return {name: (then, now.get(name, "missing")) for name, then in reference.items() if now.get(name) != then}


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
    """Reference results: profile, versions, numbers and verdicts. Raises ReferenceError if the file holds none."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        for name, kept in known["numbers"].items():
            if not (isinstance(kept["value"], int | float) and len(kept["seeds"]) > 1):
                raise ReferenceError(f"{path.name}: {name} needs a value and at least two seeds")
        for name, verdict in known["verdicts"].items():
            if verdict not in VERDICTS:
                raise ReferenceError(f"{path.name}: {name} is {verdict!r}; a verdict is one of {', '.join(VERDICTS)}")
    except FileNotFoundError as error:
        raise ReferenceError(f"there are no reference results {path.name} in {path.parent.name}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ReferenceError):
            raise
        raise ReferenceError(f"{path.name} holds no reference results ({type(error).__name__}: {error})") from error
    return known
