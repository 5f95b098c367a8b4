"""The command line `prefdyn`: list chapters, execute one with parameters, look after the run store."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import nbformat
import pandas as pd
import papermill
import typer
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient.exceptions import DeadKernelError
from traitlets import default

from ..findings import claims, firmness, reference
from ..lab.runs import RunStore, project_root, versions
from . import estimate as estimating
from . import lens_cli, outside_cli, page, params, studies, survey, workflow

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Execute chapters of the book and keep their runs.")
runs_app = typer.Typer(no_args_is_help=True, help="The results that are kept: list, show, remove.")
app.add_typer(runs_app, name="runs")
study_app = typer.Typer(no_args_is_help=True, help="Tables that need hours: compute their cells, check them again.")
app.add_typer(study_app, name="study")
for command in (estimating.estimate, lens_cli.lens, outside_cli.replies, outside_cli.judged):
    app.command()(command)


GIVEN = "parameters given"  # beside the values of a chapter: what it was executed with, but for the profile


class CommandError(Exception):
    """Something the user can mend; the message says what."""


class _Interpreter(KernelSpecManager):
    """Knows one kernel: the interpreter that runs this, whatever is installed as "python3" on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


class _Kernel(AsyncKernelManager):
    """Starts the kernel of `_Interpreter`."""

    @default("kernel_spec_manager")
    def _own_interpreter(self) -> _Interpreter:
        return _Interpreter(parent=self)


def book_folder() -> Path:
    """The folder of the book that holds the current folder. Raises CommandError outside of it."""
    folder = project_root()
    if not (folder / "lib" / "prefdyn").is_dir():
        raise CommandError(f"{folder}: no book is here or above; run this in the book's folder, which has notebooks/")
    return folder


def chapter_path(chapter: str) -> Path:
    """The source of a chapter: by name ("02-targets"), by number ("02") or by path. Raises CommandError."""
    if chapter.endswith(".ipynb") and Path(chapter).is_file():
        return Path(chapter)
    folder = book_folder() / "notebooks"
    names = sorted(p.stem for p in folder.glob("*.ipynb"))
    matches = [n for n in names if n == chapter or n.split("-")[0] == chapter]
    if len(matches) != 1:
        raise CommandError(f"{chapter!r}: no such chapter; there are: {', '.join(names) or 'none in ' + folder.name}")
    return folder / f"{matches[0]}.ipynb"


def _read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook. Raises CommandError for a file that is none."""
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError, KeyError, nbformat.ValidationError) as error:
        raise CommandError(f"{path}: cannot be read as a notebook ({type(error).__name__})") from error


def _defaults(path: Path) -> dict[str, ast.expr]:
    """The parameters of a notebook and what its parameters cell assigns to them. Raises CommandError."""
    tagged = [cell for cell in _read_notebook(path).cells if "parameters" in cell.metadata.get("tags", [])]
    try:
        body = ast.parse(tagged[0].source).body if tagged else []
    except SyntaxError as error:
        raise CommandError(f"{path}: its parameters cell is no Python (line {error.lineno}: {error.msg})") from error
    found = {}
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
    return found


def _literal(node: ast.expr) -> Any:
    """The value of a literal; None for what is computed, as for what comes from the profile."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def known_parameters(path: Path) -> dict[str, Any]:
    """Names in the parameters cell of a notebook and their defaults.

    None: from the profile, or computed in the notebook, so that only the notebook can check it.
    """
    return {name: _literal(node) for name, node in _defaults(path).items()}


def parse_assignment(text: str) -> tuple[str, Any]:
    """ "beta=0.5" -> ("beta", 0.5); what is no Python literal, nor inf or nan, is a text.

    Raises CommandError without "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise CommandError(f"-p {text!r}: a parameter is given as name=value")
    if value.strip().lower() in ("true", "false", "none", "null"):
        return name.strip(), {"true": True, "false": False}.get(value.strip().lower())
    if re.fullmatch(r"[+-]?(inf|infinity|nan)", value.strip().lower()):
        return name.strip(), float(value)  # no parameter is that, and the check says so of the number
    try:
        return name.strip(), ast.literal_eval(value.strip()) if "," not in value or value.strip()[0] in "[(" else value
    except (ValueError, SyntaxError, TypeError):
        return name.strip(), value


def _unwritable(path: Path, error: OSError) -> CommandError:
    return CommandError(f"{os.path.relpath(path)}: cannot be written ({error.strerror or error})")


def parse_assignments(texts: list[str]) -> dict[str, Any]:
    """Values by name, each given once. Raises CommandError."""
    given: dict[str, Any] = {}
    for name, value in map(parse_assignment, texts):
        if name in given:
            raise CommandError(f"{name}: given twice, {given[name]!r} and {value!r}; allowed: once")
        given[name] = value
    return given


def _replace(path: Path, text: str) -> None:
    """Write a file in one move: it is there whole or not at all. Raises CommandError."""
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _check_writable(path: Path) -> None:
    """Raise CommandError if a file cannot be made or replaced, before much is spent on what goes into it."""
    if path.is_dir():
        example = os.path.relpath(path / "executed.ipynb")
        raise CommandError(f"{os.path.relpath(path)}: is a folder; name the file to write, e.g. {example}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _without_progress(notebook: nbformat.NotebookNode) -> None:
    """Drop the remains of progress bars, which were meant for the terminal."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.get("name") == "stderr" and "\r" in o.get("text", ""))]


def _verbatim(path: Path) -> str:
    """A path for papermill, which puts parameters into braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def execute_chapter(source: Path, given: dict[str, Any], output: Path | None) -> Path:
    """Execute a chapter and move the result to `output`, by default its place in the book; returns where it is.

    Parameters and output are checked before anything starts. A failed notebook is kept beside, with its error in it.
    Raises ParameterError, or CommandError with the failing cell's error.
    """
    defaults = known_parameters(source)
    params.check(defaults | given, list(defaults))
    if output is None:
        book = book_folder() / "book"
        target, values_file = book / "notebooks" / source.name, book / "_values" / f"{source.stem}.json"
    else:
        target, values_file = output, None
    if target.resolve() == source.resolve():
        raise CommandError(f"{os.path.relpath(target)}: would be written over by its own result; name another with -o")
    for path in filter(None, (target, values_file)):
        _check_writable(path)
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    terminal = sys.stderr.isatty()
    if terminal:
        os.environ["PREFDYN_PROGRESS"] = "1"  # the kernel's bars, passed on to this terminal
    try:
        notebook = papermill.execute_notebook(
            _verbatim(source),
            _verbatim(failed),
            parameters=given,
            kernel_name="python3",
            kernel_manager_class=_Kernel,
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns of TCP, which stays on this machine
            stderr_file=sys.stderr if terminal else None,
        )
    except papermill.PapermillExecutionError as error:
        raise CommandError(
            f"{source.stem}: {error.ename}: {error.evalue}\n(the notebook up to the error is kept as {failed.name})"
        ) from error
    except DeadKernelError as error:
        raise CommandError(
            f"{source.stem}: its kernel died, often for want of memory; a smaller `micro_batch` or `probe` needs less. "
            "Runs that were finished are kept."
        ) from error
    _without_progress(notebook)
    values = page.collect_values(notebook)
    changed = {name: value for name, value in given.items() if name != "profile"}
    values |= {GIVEN: {"value": changed, "text": ", ".join(f"{name}={value!r}" for name, value in changed.items())}}
    if values_file:
        _replace(values_file, json.dumps(values, indent=1, sort_keys=True) + "\n")
    _replace(target, nbformat.writes(notebook) + "\n")
    failed.unlink()
    return target


@app.command()
def chapters() -> None:
    """List the chapters with their parameters: what each means, what is allowed, and its default."""
    for path in sorted((book_folder() / "notebooks").glob("*.ipynb")):
        title = next((cell.source.partition("\n")[0].lstrip("# ") for cell in _read_notebook(path).cells), "")
        typer.secho(f"{path.stem}  {title}", bold=True)
        for name, node in _defaults(path).items():
            allowed, meaning = params.meaning(name)
            default = _literal(node)
            if default is None and not isinstance(node, ast.Constant):
                default = ast.unparse(node)
            elif default is None:
                values = {profile: params.presets(profile, "world")[name] for profile in params.PRESETS}
                same = len({str(v) for v in values.values()}) == 1
                default = values["reader"] if same else ", ".join(f"{p} {v}" for p, v in values.items())
            typer.echo(f"  {name:17} {meaning}\n  {'':17} allowed: {allowed}; default: {default}")
        typer.echo()


@app.command()
def execute(
    chapter: Annotated[str, typer.Argument(help="name or number of a chapter, or the path of a notebook")],
    parameter: Annotated[list[str], typer.Option("-p", "--parameter", help="name=value; repeat for more")] = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="where to write it [its place in the book]")
    ] = None,
) -> None:
    """Execute a chapter with parameters; runs that are kept already are not computed again."""
    target = execute_chapter(chapter_path(chapter), parse_assignments(parameter), output)
    typer.echo(f"executed: {os.path.relpath(target)}")


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="a preference file, a folder of such files, or a name on the hub")],
    parameter: Annotated[list[str], typer.Option("-p", "--parameter", help="name=value; repeat for more")] = [],  # noqa: B006
    show: Annotated[int, typer.Option(help="pairs to show, and records that are left out", min=0)] = 3,
) -> None:
    """Say what is in a preference file: layout, counts, lengths, and what would be left out and cut.

    Limits, sizes and the model whose tokenizer counts are parameters, as for chapters: -p max_prompt=256 -p model=NAME.
    """
    if source == "world":
        raise CommandError("'world': no preference file; chapter 1 shows what is in the world")
    given = parse_assignments([f"dataset={source}", *parameter])
    p = params.check(given)
    for line in survey.report(p, show):
        typer.echo(line)


LEDGER = "08-ledger"  # the chapter that leaves the rules' intervals


def _reference_paths(profile: str, second: bool = False) -> tuple[Path, Path]:
    """The file of reference results of a profile, and the folder of the numbers that executed chapters leave."""
    root = book_folder()
    return reference.path(root, profile, second), root / "book" / "_values"


def _intervals(values: Path) -> reference.Intervals:
    return reference.intervals(values, LEDGER, [rule.name for rule in claims.RULES])


def _edition(folder: Path) -> str:
    """The profile of the executed chapters.

    Raises CommandError if they differ in it, if one was executed with other parameters too, or if there are none.
    """
    known = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for chapter, values in known.items():
        if changed := values.get(GIVEN, {}).get("text"):
            raise CommandError(
                f"{chapter} was executed with {changed}; `prefdyn execute {chapter}` makes it as presets say"
            )
    profiles = {values["profile"]["value"] for values in known.values() if "profile" in values}
    if len(profiles) != 1:
        there = ", ".join(sorted(profiles)) or "none is executed"
        raise CommandError(
            f"all chapters have to be of one profile ({there}); `make book PROFILE=reader` executes them"
        )
    return profiles.pop()


@app.command("reference")
def write_reference(
    second: Annotated[
        bool, typer.Option("--second", help="as what a second machine said, beside the reference")
    ] = False,
) -> None:
    """Write the numbers of the executed chapters, with their seeds, and verdicts as reference results of a profile."""
    profile = _edition(_reference_paths("")[1])
    path, values = _reference_paths(profile, second)
    numbers = reference.collect(values)
    verdicts = reference.verdicts(values)
    known = {"profile": profile, "versions": versions(), "numbers": numbers, "verdicts": verdicts}
    known |= {"intervals": _intervals(values)}
    _replace(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    typer.echo(f"{len(numbers)} numbers and {len(verdicts)} verdicts written to {os.path.relpath(path)}")


def _edges(profile: str) -> list[str]:
    """Rules of which an end of the reference's interval is nearer to the threshold than a second machine's to it."""
    paths = [_reference_paths(profile, second)[0] for second in (False, True)]
    first, second = (reference.read(path).get("intervals", {}) if path.is_file() else {} for path in paths)
    shifts = firmness.shifts(first, second)
    return [name for name, shift in shifts.items() if firmness.near(first[name], claims.find(name).threshold, shift)]


@app.command()
def verify(
    profile: Annotated[str, typer.Option(help="whose reference results to compare with")] = "reader",
) -> None:
    """Compare numbers and verdicts of the executed chapters with the reference results.

    Exits 1 and names those that differ, and verdicts that turned.
    """
    path, values = _reference_paths(profile)
    known = reference.read(path)
    found = _edition(values)
    if found != profile:
        raise CommandError(f"the executed chapters are of profile {found!r}, the reference of {profile!r}")
    table = reference.compare(known["numbers"], reference.collect(values))
    for row in table[~table["status"].isin(reference.AGREES)].itertuples():
        numbers = f"reference {row.reference:.6g}, now {row.now:.6g}, tolerance {row.tolerance:.2g}"
        typer.echo(f"{row.status:9} {row.number}: {numbers}")
    counts = table["status"].value_counts()
    typer.echo(f"of {len(table)} numbers: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    turned = reference.turned(known["verdicts"], reference.verdicts(values))
    edges = _edges(profile)
    for name, (then, now) in turned.items():
        near = sorted(rule for rule in edges if name == f"{LEDGER}:{claims.find(rule).claim}")
        why = f" ({', '.join(near)} on the edge)" if near else ""
        typer.echo(f"turned    {name}: reference {then!r}, now {now!r}{why}")
    typer.echo(f"of {len(known['verdicts'])} verdicts: {len(turned)} turned")
    if different := {k: v for k, v in versions().items() if known["versions"].get(k) != v}:
        typer.echo(f"versions differ from the reference's: {', '.join(f'{k} {v}' for k, v in different.items())}")
    if turned or not table["status"].isin(reference.AGREES).all():
        raise typer.Exit(1)


@runs_app.command("list")
def list_runs() -> None:
    """List finished runs, the oldest first."""
    store = RunStore()
    rows = store.list()
    for row in rows:
        typer.echo(f"{row['key']:28} {row['seconds']:8.1f} s {row['megabytes']:8.2f} MB  {row['finished']}")
    typer.echo(f"{len(rows)} runs in {os.path.relpath(store.root)}")


@runs_app.command("show")
def show_run(key: Annotated[str, typer.Argument(help="key of a run, or its beginning")]) -> None:
    """Show the configuration and the provenance of a run."""
    run = RunStore().named(key)
    shown = {"key": run.key, "spec": run.json("spec"), "provenance": run.json("provenance")}
    typer.echo(json.dumps(shown | {"files": sorted(run.json("manifest"))}, indent=1))


@runs_app.command("remove")
def remove_run(
    keys: Annotated[list[str], typer.Argument(help="keys of runs, or their beginnings")],
) -> None:
    """Remove runs; a chapter that needs one computes it again."""
    store = RunStore()
    for key in [store.named(key).key for key in keys]:
        store.remove(key)
        typer.echo(f"removed: {key}")


StudyName = Annotated[str, typer.Argument(help="name of a study, a file in data/studies")]


@study_app.command("list")
def list_studies() -> None:
    """List the studies: how many cells are there, of which days and code, and whether that has changed since."""
    for name in studies.names():
        table = studies.table(name)
        typer.secho(f"{name}  {table.study.title}", bold=True)
        typer.echo(f"  {table.study.about}\n  {table}")


@study_app.command("run")
def run_study(
    name: StudyName,
    profile: Annotated[str, typer.Option(help="where: a folder in data/studies/profiles")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="say what would be computed")] = False,
    cores: Annotated[int | None, typer.Option(help="runs at a time [as the profile says]", min=1)] = None,
) -> None:
    """Compute the cells of a study that are not in its table; runs that are kept are not computed again."""
    book_folder()
    study, place = studies.read(name), workflow.profile(profile)
    with workflow.alone(name):
        planned = workflow.prepare(study, RunStore())
        to_do = f"{planned.rows} of {len(study.cells)} cells to do"
        typer.echo(f"{name}: {to_do}; {planned.there} of their {planned.runs} runs are kept")
        if planned.rows:
            command = workflow.command(planned, place, dry_run, cores, quiet=not sys.stderr.isatty())
            if subprocess.run(command, cwd=project_root()).returncode:
                there = f"{len(studies.kept_rows(study))} of {len(study.cells)} cells are there"
                failed = "what failed is said above or in .snakemake/log; the same command goes on from here"
                raise CommandError(f"{name}: {there}; {failed}")
    if not dry_run:
        typer.echo(studies.table(name))


@study_app.command("check")
def check_study(
    name: StudyName,
    cells: Annotated[int, typer.Option(help="how many, chosen at random", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="of the choice")] = 0,
) -> None:
    """Compute some cells of a study again, from nothing, and compare with the table.

    Exits 1 if a value is farther from the kept one than the study's tolerances allow.
    """
    study, found = studies.read(name), []
    typer.echo(studies.table(name))
    for number in studies.chosen(study, cells, seed):
        rows = studies.compare(study, number, workflow.again(study, number))
        typer.echo(pd.DataFrame(rows).to_string(index=False))
        found += [row["verdict"] for row in rows]
    counts = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in dict.fromkeys(found))
    typer.echo(f"of {len(found)} values: {counts}")
    if "differs" in found:
        raise typer.Exit(1)


PlanFile = Annotated[Path, typer.Argument(help="what was planned")]


@study_app.command("compute", hidden=True)
def compute_run(plan: PlanFile, folder: Annotated[Path, typer.Argument(help="of the run in the store")]) -> None:
    """Compute one run of a planned study; Snakemake calls this."""
    workflow.compute(plan, folder)


@study_app.command("row", hidden=True)
def write_row(
    plan: PlanFile,
    number: Annotated[int, typer.Argument(help="of the cell")],
    store: Annotated[Path, typer.Argument(help="where its runs are")],
) -> None:
    """Write one row of a planned study; Snakemake calls this."""
    workflow.write_row(plan, number, RunStore(store))


def _is_ours(error: Exception) -> bool:
    """Whether the library itself raised an error: then its message is for the user; elsewhere it may be a fault."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(__file__).parents[1] in Path(frames[-1].filename).parents


def main() -> None:
    """Run the command line; what the user can mend is said in a line, without a traceback."""
    try:
        app()
    except (CommandError, ValueError, KeyError) as error:
        if not _is_ours(error):
            raise
        typer.secho(error.args[0], fg="red", err=True)
        sys.exit(2)
