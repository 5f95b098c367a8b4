"""The house is in order: one truth for dependencies, clean notebook sources, contents that exist."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def declared() -> list[str]:
    """Return the dependencies of pyproject.toml, those for development included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + extras["book"] + extras["dev"]


def locked() -> dict[str, list[Requirement]]:
    """Return the pins of the lock by package; a package may have several, one for each kind of machine."""
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pins


def toc_pages(node) -> list[str]:
    """Return the files that a part of the table of contents names."""
    if isinstance(node, list):
        return [page for item in node for page in toc_pages(item)]
    if not isinstance(node, dict):
        return []
    here = [node[key] for key in ("root", "file") if key in node]
    return here + [page for key in ("parts", "chapters", "sections") for page in toc_pages(node.get(key))]


def read_notebook(path: Path) -> dict:
    """Return a notebook as plain data."""
    return json.loads(path.read_text(encoding="utf-8"))


def version_of(pin: Requirement) -> str:
    """Return the version that a line of the lock pins; anything but one exact version is an error."""
    (spec,) = pin.specifier
    assert spec.operator == "==", f"not an exact pin: {pin}"
    return spec.version


def test_every_dependency_is_locked_within_its_range():
    pins = locked()
    for text in declared():
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        if name == "torch":
            continue  # installed before the lock, see the next test
        assert name in pins, f"{name} is missing from requirements.lock: make lock"
        for pin in pins[name]:
            assert wanted.specifier.contains(version_of(pin)), f"{pin} is outside of {wanted}: make lock"


def test_torch_is_installed_by_the_makefile_and_is_not_locked():
    default = re.search(r"^TORCH\s*\?=\s*(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    pin = Requirement(default.group(1))
    (wanted,) = [Requirement(text) for text in declared() if Requirement(text).name == "torch"]
    assert pin.name == "torch" and wanted.specifier.contains(version_of(pin))
    heavy = [name for name in locked() if re.match(r"torch$|triton|nvidia-|cuda-", name)]
    assert not heavy, "torch and what comes with its build do not belong in the lock"


def test_lock_holds_exact_pins_and_no_addresses():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text and " @ " not in text and "--" not in text
    assert all(version_of(pin) for pins in locked().values() for pin in pins)


def test_environment_yml_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    python = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert pip == [*declared(), "-e ."]
    assert conda == [f"python{python}", "pip"]


def test_contents_name_files_that_exist():
    pages = toc_pages(yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8")))
    chapters = [page for page in pages if page.startswith("notebooks/")]
    assert chapters, "the book has no chapters"
    sources = [f"{page}.ipynb" if page in chapters else f"book/{page}.md" for page in pages]
    missing = [source for source in sources if not (ROOT / source).is_file()]
    assert not missing, f"book/_toc.yml names what is not there: {missing}"
    forgotten = [path.stem for path in NOTEBOOKS if f"notebooks/{path.stem}" not in chapters]
    assert not forgotten, f"not in book/_toc.yml: {forgotten}"


@pytest.mark.parametrize("path", NOTEBOOKS or [None], ids=lambda path: path.stem if path else "none")
def test_notebook_source_is_clean(path):
    assert path is not None, "there is no notebook in notebooks/"
    notebook = read_notebook(path)
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not [cell["id"] for cell in code if cell["outputs"]], (
        "outputs are left: nbstripout --keep-id notebooks/*.ipynb"
    )
    assert not [cell["id"] for cell in code if cell["execution_count"] is not None], "execution counts are left"
    ids = [cell.get("id") for cell in cells]
    assert all(ids) and len(set(ids)) == len(ids), "every cell has an id of its own"
    assert "papermill" not in notebook["metadata"], "this is an executed copy"


@pytest.mark.parametrize("path", NOTEBOOKS or [None], ids=lambda path: path.stem if path else "none")
def test_notebook_has_one_parameters_cell_with_a_profile(path):
    assert path is not None, "there is no notebook in notebooks/"
    tagged = [cell for cell in read_notebook(path)["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, "exactly one cell carries the tag `parameters`"
    assert re.search(r"^profile\b[^=]*=\s*[\"']reader[\"']", "".join(tagged[0]["source"]), re.MULTILINE)


FLOORS = ("lens", "methods", "lab", "findings", "book")


def public(module) -> list:
    """The functions and classes that a module defines for others."""
    own = (getattr(module, name) for name in vars(module) if not name.startswith("_"))
    return [x for x in own if (inspect.isfunction(x) or inspect.isclass(x)) and x.__module__ == module.__name__]


@pytest.mark.parametrize("floor", FLOORS)
def test_every_room_of_a_floor_is_listed_and_says_what_it_is(floor):
    package = importlib.import_module(f"prefdyn.{floor}")
    rooms = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__"}
    listed = set(package.__all__)
    if floor == "methods":  # a method is found by what it defines
        rooms -= {name for name in rooms if hasattr(importlib.import_module(f"prefdyn.methods.{name}"), "METHOD")}
    if floor == "lens":  # for other people's code: names, not rooms
        assert all(inspect.getdoc(getattr(package, name)) for name in listed)
    else:
        assert listed == rooms and package.__all__ == sorted(listed)
    for name in (path.stem for path in Path(package.__path__[0]).glob("[!_]*.py")):
        room = importlib.import_module(f"prefdyn.{floor}.{name}")
        assert room.__doc__, f"{floor}/{name} does not say what it is"
        silent = [x.__qualname__ for x in public(room) if not inspect.getdoc(x)]
        assert not silent, f"{floor}/{name}: without a docstring: {silent}"


def test_the_library_imports_rooms_and_not_lists_of_names():
    """Else a run would depend on all that a floor lists, and the fingerprint of its code on nothing of it."""
    library = Path(importlib.import_module("prefdyn").__path__[0])
    for path in library.glob("*/*.py"):
        if path.stem == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module in (None, *FLOORS):
                home = path.parent if node.level == 1 else library / (node.module or "")
                assert all((home / f"{alias.name}.py").is_file() for alias in node.names), f"{path.name}: {node.module}"


def test_the_lens_alone_needs_no_other_package():
    """In a fresh interpreter: what `import prefdyn.lens` loads of the packages that chapters need."""
    heavy = ("pandas", "matplotlib", "seaborn", "papermill", "typer", "IPython", "nbformat")
    code = (
        "import sys, torch, transformers; before = set(sys.modules); import prefdyn.lens; "
        f"print([name for name in {heavy} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
