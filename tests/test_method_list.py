"""The list of all methods, for the book: written by this test from their files (PREFDYN_WRITE=1) and compared."""

import os
import re
from pathlib import Path

import pytest
import yaml
from prefdyn.methods import registry

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "data" / "methods.md"
SOURCES = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"] + "/blob/main/"
TESTS = (
    "test_objectives",
    "test_pair_methods",
    "test_group_methods",
)  # where formulas are compared with published ones
KINDS = {
    "demonstrations": "Demonstrations",
    "pairs": "Preference pairs",
    "rollouts": "Fresh replies",
}


def link(path: str) -> str:
    """A file of the project, which has to be there."""
    assert (ROOT / path).is_file()
    return f"[`{path.rpartition('/')[2]}`]({SOURCES}{path})"


def proved_in(name: str) -> str:
    """The first file of tests that calls the method by its name."""
    module = registry.module_of(name).rpartition(".")[2]
    files = [f"tests/{test}.py" for test in TESTS]
    return next(f for f in files if re.search(rf"\b{module}\b", (ROOT / f).read_text(encoding="utf-8")))


def entry(name: str) -> str:
    """What a reader wants to know of a method."""
    method = registry.find(name)
    settings = "; ".join(f"`{key}` = {value:g}, {method.meaning[key]}" for key, value in method.settings.items())
    without = "" if method.reference or method.takes == "demonstrations" else " It reads no reference policy."
    formula = method.formula.replace(r", \quad ", ", \\\\\n")  # below each other, for a narrow screen
    file = f"lib/{registry.module_of(name).replace('.', '/')}.py"
    lines = [
        f"**{method.title}**, `{name}`. {method.source}.{without}",
        f"$$\n\\begin{{gathered}}\n{formula}\n\\end{{gathered}}\n$$",
        f"*Settings:* {settings or 'none'}. *Its reweighting acts on* {method.strength}. *Curves:* {method.curves} "
        f"*File and test:* {link(file)}, {link(proved_in(name))}.",
    ]
    return "\n\n".join(lines)


def written() -> str:
    """The whole list, a folded part for each kind of data."""
    parts = []
    for takes, title in KINDS.items():
        entries = "\n\n".join(map(entry, registry.names(takes)))
        parts.append(f"````{{dropdown}} {title}\n{entries}\n````\n")
    return "\n".join(parts)


def test_the_list_of_methods_is_what_their_files_say():
    assert {registry.find(name).takes for name in registry.names()} == KINDS.keys()
    if os.environ.get("PREFDYN_WRITE"):
        LIST.write_text(written(), encoding="utf-8")
    assert LIST.read_text(encoding="utf-8") == written(), "PREFDYN_WRITE=1 pytest tests/test_method_list.py writes it"


@pytest.mark.parametrize("name", registry.names())
def test_every_method_says_what_its_curves_should_look_like_and_what_its_settings_mean(name):
    method = registry.find(name)
    assert len(method.curves) > 40 and method.strength and set(method.settings) <= set(method.meaning)
    assert method.title and method.source and "w" in method.formula
