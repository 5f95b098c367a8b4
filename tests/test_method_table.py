"""The table of all methods, for the book: written by this test from their records (PREFDYN_WRITE=1) and compared."""

import csv
import os
from pathlib import Path

import pytest
from prefdyn.methods import registry

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "data" / "methods.csv"
COLUMNS = ("method", "takes", "weights of tokens", "settings", "source")


def row(name: str) -> dict[str, str]:
    """What a reader wants to know of a method at a glance."""
    method = registry.find(name)
    settings = "; ".join(f"{key} = {value:g}: {method.meaning[key]}" for key, value in method.settings.items())
    return {
        "method": f"`{name}`: {method.title}",
        "takes": method.takes,
        "weights of tokens": f"${method.formula}$",
        "settings": settings or "none",
        "source": method.source,
    }


def test_the_table_of_methods_is_what_their_files_say():
    table = [row(name) for name in registry.names()]
    if os.environ.get("PREFDYN_WRITE"):
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    with TABLE.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == table, "PREFDYN_WRITE=1 pytest tests/test_method_table.py writes it"


@pytest.mark.parametrize("name", registry.names())
def test_every_method_says_what_its_curves_should_look_like_and_what_its_settings_mean(name):
    method = registry.find(name)
    assert len(method.curves) > 40 and method.strength and set(method.settings) <= set(method.meaning)
    assert method.title and method.source and "w" in method.formula
