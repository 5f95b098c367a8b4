"""The command line on a small project of its own: what it lists, executes, keeps and refuses."""

import errno
import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
import pytest
from prefdyn.book import cli, params
from prefdyn.book.cli import CommandError, parse_assignment
from prefdyn.lab.runs import RunStore
from toys.specs import Toy
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
CELLS = [
    ("markdown", "# A tiny chapter\n\nSome text.", []),
    ("code", 'profile = "smoke"\nbeta = None\nseeds = None', ["parameters"]),
    ("code", "import sys\n\nfrom prefdyn.book import page, params\n\np = params.read()", []),
    ("code", 'print("half \\r done", file=sys.stderr)\npage.say("Beta is {b:.1f}.", b=p.beta)', []),
    ("code", 'if p.beta > 1:\n    raise RuntimeError("beta is too large for this chapter")', []),
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one tiny chapter; the current folder is inside of it."""
    (tmp_path / "lib" / "prefdyn").mkdir(parents=True)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook = nbformat.v4.new_notebook()
    for number, (kind, source, tags) in enumerate(CELLS):
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        notebook.cells.append(new(source, id=f"cell-{number}", metadata={"tags": tags}))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "01-tiny.ipynb")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PREFDYN_RUNS", raising=False)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """Call `prefdyn ...`; returns exit status, what was printed, and what went to the terminal as an error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prefdyn", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beta=0.5", ("beta", 0.5)),
        ("beta = 1e-3", ("beta", 1e-3)),
        ("pairs=64", ("pairs", 64)),
        ("seeds=0,1,2", ("seeds", "0,1,2")),
        ("seeds=[0, 1]", ("seeds", [0, 1])),
        ("dataset=data/my pairs.jsonl", ("dataset", "data/my pairs.jsonl")),
        ("dataset='world'", ("dataset", "world")),
        ("model=a=b", ("model", "a=b")),
        ("model=007", ("model", "007")),
        ("beta=None", ("beta", None)),
        ("beta=null", ("beta", None)),
        ("beta=true", ("beta", True)),
        ("model=", ("model", "")),
        ("model={[]: 1}", ("model", "{[]: 1}")),
        ("beta=inf", ("beta", math.inf)),
        ("beta= +Infinity ", ("beta", math.inf)),
        ("beta=-inf", ("beta", -math.inf)),
        ("beta=1e999", ("beta", math.inf)),
        ("model=+-inf", ("model", "+-inf")),
        ("model=info", ("model", "info")),
        ("today=2025-01-01", ("today", "2025-01-01")),
        ("today=2025-10-10", ("today", "2025-10-10")),
    ],
)
def test_assignments(text, expected):
    assert parse_assignment(text) == expected


def test_not_a_number_is_a_number_too():
    name, value = parse_assignment("lr=NaN")
    assert name == "lr" and math.isnan(value)


@pytest.mark.parametrize("text", ["beta", "=3", " =3", ""])
def test_what_is_no_assignment(text):
    with pytest.raises(CommandError, match="given as name=value"):
        parse_assignment(text)


def test_chapters_are_found_by_name_number_and_path(project):
    path = project / "notebooks" / "01-tiny.ipynb"
    assert cli.chapter_path("01-tiny") == cli.chapter_path("01") == path
    assert cli.chapter_path("01-tiny.ipynb") == Path("01-tiny.ipynb")
    for wrong in ("1", "tiny", "02", "nowhere.ipynb"):
        with pytest.raises(CommandError, match="no such chapter; there are: 01-tiny"):
            cli.chapter_path(wrong)


def test_chapters_are_listed_with_their_parameters(project, call):
    status, out, _ = call("chapters")
    assert status == 0
    assert out.startswith("01-tiny  A tiny chapter\n")
    assert "profile" in out and "default: smoke" in out
    assert "DPO's beta" in out and "allowed: a number > 0; default: 0.1" in out
    assert "default: smoke [0, 1], reader [0, 1, 2, 3, 4], paper [0, 1, 2]" in out


def test_the_chapters_of_the_book_are_listed(monkeypatch, call):
    monkeypatch.chdir(ROOT)
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    status, out, _ = call("chapters")
    titles = {line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")}
    assert status == 0 and names and titles == names
    assert out.count("  profile ") == len(names)


def test_executing_a_chapter(project, call):
    """It works, then fails with another parameter, which leaves the good one alone, then goes where it is told to."""
    target = project / "book" / "notebooks" / "01-tiny.ipynb"
    values = project / "book" / "_values" / "01-tiny.json"
    failed = project / "book" / "notebooks" / "01-tiny.failed.ipynb"
    status, out, err = call("execute", "01", "-p", "beta=0.5")
    assert (status, out) == (0, "executed: ../book/notebooks/01-tiny.ipynb\n"), err
    assert json.loads(values.read_text())["b"]["value"] == 0.5
    executed = nbformat.read(target, as_version=4)
    sources = [cell.source for cell in executed.cells]
    assert sources[1] == CELLS[1][1] and "beta = 0.5" in sources[2]
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.output_type for output in outputs] == ["display_data"]  # the progress bar is gone
    assert outputs[0].data["text/markdown"] == "Beta is 0.5."
    assert sorted(p.name for p in target.parent.iterdir()) == ["01-tiny.ipynb"]
    before = target.read_bytes(), values.read_bytes()

    status, _, err = call("execute", "01", "-p", "beta=2")
    assert status == 2 and "01-tiny: RuntimeError: beta is too large for this chapter" in err
    assert "Traceback" not in err and failed.name in err
    assert (target.read_bytes(), values.read_bytes()) == before
    errors = [
        o for c in nbformat.read(failed, as_version=4).cells for o in c.get("outputs", []) if o.output_type == "error"
    ]
    assert [error.ename for error in errors] == ["RuntimeError"]

    elsewhere = project / "mine" / "copy.ipynb"
    status, _, err = call("execute", "01-tiny.ipynb", "-p", "seeds=3", "-o", str(elsewhere))
    assert status == 0 and "Beta is 0.1." in elsewhere.read_text(), err
    assert (target.read_bytes(), values.read_bytes()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "betta=1"], "betta: no such parameter. Did you mean 'beta'? There are: beta, profile, seeds"),
        (["-p", "lr=1"], "lr: no such parameter"),
        (["-p", "beta=-1"], "beta: given -1 (int); allowed: a number > 0"),
        (["-p", "seeds=1,1"], "each seed once"),
        (["-p", "beta"], "name=value"),
        (["-p", "beta=inf"], "beta: given inf (float); allowed: a number > 0"),
        (["-p", "beta=-Infinity"], "beta: given -inf (float)"),
        (["-p", "beta=nan"], "beta: given nan (float)"),
        (["-o", "."], ".: is a folder; name the file to write, e.g. executed.ipynb"),
        (["-o", "../lib"], "../lib: is a folder; name the file to write, e.g. ../lib/executed.ipynb"),
        (["-o", "01-tiny.ipynb/out.ipynb"], "01-tiny.ipynb/out.ipynb: cannot be written ("),
        (["-o", "01-tiny.ipynb"], "01-tiny.ipynb: would be written over by its own result; name another with -o"),
    ],
)
def test_what_is_wrong_stops_before_anything_runs(project, call, monkeypatch, arguments, said):
    def no_kernel(*args, **kwargs):
        raise AssertionError("the notebook was started")

    monkeypatch.setattr(cli.papermill, "execute_notebook", no_kernel)
    status, out, err = call("execute", "01", *arguments)
    assert status == 2 and said in err and out == "" and "Traceback" not in err
    assert not (project / "book").exists()


@pytest.mark.parametrize("read_only", ["notebooks", "_values"])
def test_a_book_that_cannot_be_written_stops_before_anything_runs(project, call, monkeypatch, read_only):
    def no_kernel(*args, **kwargs):
        raise AssertionError("the notebook was started")

    def write(dir):
        if Path(dir).name == read_only:
            raise OSError(errno.EROFS, "Read-only file system")
        return open(Path(dir) / "written", "w")

    monkeypatch.setattr(cli.papermill, "execute_notebook", no_kernel)
    monkeypatch.setattr(tempfile, "TemporaryFile", write)
    name = "01-tiny.ipynb" if read_only == "notebooks" else "01-tiny.json"
    status, _, err = call("execute", "01")
    assert (status, err) == (2, f"../book/{read_only}/{name}: cannot be written (Read-only file system)\n")


def test_reference_results_that_cannot_be_written_are_said(project, call):
    leave_values(project, gain=[1.0, 2.0, 3.0])
    (project / "data").write_text("")
    status, _, err = call("reference")
    assert status == 2 and err.startswith("../data/reference/reader.json: cannot be written (")


def parameters_cell(project: Path, source: str) -> None:
    """Give the tiny chapter another parameters cell."""
    path = project / "notebooks" / "01-tiny.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = source
    nbformat.write(notebook, path)


COMPUTED = '''"""What may be changed."""
profile: str = "smoke"
beta = 1 / 4
seeds = list(
    range(2)
)
pairs = lr = None'''


def test_defaults_may_be_computed(project, call):
    """They are listed as they are written; only names, and what is given, can be checked beforehand."""
    parameters_cell(project, COMPUTED)
    path = project / "notebooks" / "01-tiny.ipynb"
    known = {"profile": "smoke", "beta": None, "seeds": None, "pairs": None, "lr": None}
    assert cli.known_parameters(path) == known
    status, out, _ = call("chapters")
    assert status == 0 and "default: 1 / 4" in out and "default: list(range(2))" in out
    assert "default: smoke 128, reader 1024" in out
    for given, said in (("betta=1", "Did you mean 'beta'?"), ("beta=-1", "beta: given -1 (int)")):
        status, _, err = call("execute", "01", "-p", given)
        assert status == 2 and said in err
    status, _, err = call("execute", "01", "-o", str(project / "out {x}.ipynb"))
    assert status == 0, err
    assert "Beta is 0.2" in (project / "out {x}.ipynb").read_text()  # 0.25 to one digit


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda project: parameters_cell(project, "profile = "),
            "01-tiny.ipynb: its parameters cell is no Python (line 1",
        ),
        (lambda project: parameters_cell(project, "colour = 1"), "colour: no such parameter"),
        (lambda project: (project / "notebooks/01-tiny.ipynb").write_text("x"), "cannot be read as a notebook"),
        (lambda project: (project / "notebooks/01-tiny.ipynb").write_text("[]"), "cannot be read as a notebook"),
        (lambda project: (project / "notebooks/01-tiny.ipynb").write_bytes(b"\xff"), "cannot be read as a notebook"),
    ],
)
def test_a_notebook_that_cannot_be_used_is_said(project, call, spoil, said):
    spoil(project)
    for command in (["execute", "01"], ["chapters"]):
        status, _, err = call(*command)
        assert status == 2 and said in err and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["chapters"], ["execute", "01"], ["verify"], ["reference"]])
def test_outside_of_the_book_every_command_says_where_to_go(tmp_path, monkeypatch, call, arguments):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert (status, out) == (2, "") and "no book is here or above; run this in the book's folder" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["JUPYTER_PATH", "JUPYTER_DATA_DIR"])
def test_chapters_are_executed_by_the_interpreter_that_runs_the_command(project, call, monkeypatch, where):
    """Whatever is installed as "python3", and with what a notebook says of its kernel unchanged."""
    kernel = project / "foreign" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["false"], "display_name": "Foreign", "language": "python"}')
    monkeypatch.setenv(where, str(project / "foreign"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    path, out = project / "notebooks" / "01-tiny.ipynb", project / "out.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[4].source = "import sys\n\nprint(sys.executable)"
    nbformat.write(notebook, path)
    status, _, err = call("execute", "01", "-o", str(out))
    assert status == 0, err
    executed = nbformat.read(out, as_version=4)
    assert executed.cells[4].outputs[0].text.strip() == sys.executable
    assert executed.metadata["kernelspec"] == notebook.metadata["kernelspec"]
    assert executed.metadata.keys() == {"kernelspec", "language_info", "papermill"}


def test_what_papermill_is_given_reaches_the_check(project):
    """By papermill's own command, which checks nothing: inf is no literal, and is refused by name all the same."""
    with pytest.raises(papermill.PapermillExecutionError, match=r"beta: given inf \(float\); allowed: a number > 0"):
        papermill.execute_notebook(
            "01-tiny.ipynb", str(project / "out.ipynb"), parameters={"beta": math.inf}, progress_bar=False
        )


def test_what_the_library_refuses_is_a_line_and_what_fails_is_a_traceback(project, monkeypatch, call):
    """Whatever kind of ValueError a command meets."""

    def of_the_library() -> None:
        params.check({"beta": -1})

    def of_elsewhere() -> None:
        json.loads("{")

    monkeypatch.setattr(cli, "app", of_the_library)
    status, out, err = call()
    assert (status, out) == (2, "") and "beta: given -1 (int)" in err
    monkeypatch.setattr(cli, "app", of_elsewhere)
    with pytest.raises(json.JSONDecodeError):
        cli.main()


@pytest.fixture
def exclusively(monkeypatch):
    """The script that keeps two builds apart, with a command that is noted instead of run."""
    spec = importlib.util.spec_from_file_location("exclusively", ROOT / ".ci" / "exclusively.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.became = []
    monkeypatch.setattr(module.os, "execvp", lambda name, command: module.became.append(command))
    return module


def test_a_build_becomes_its_command(exclusively, tmp_path):
    exclusively.main(str(tmp_path / "deep" / "lock"), "make", "it")
    assert exclusively.became == [("make", "it")]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        *((number, "Another build is running") for number in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)),
        *((number, "has no locks") for number in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.EIO)),
    ],
)
def test_a_build_that_finds_no_lock_says_why(exclusively, tmp_path, monkeypatch, number, said):
    def flock(*args):
        raise OSError(number, "as the system says")

    monkeypatch.setattr(exclusively.fcntl, "flock", flock)
    with pytest.raises(SystemExit) as stopped:
        exclusively.main(str(tmp_path / "lock"), "make")
    assert said in stopped.value.code and exclusively.became == []
    assert ("as the system says" in stopped.value.code) == (said == "has no locks")


def test_a_second_build_is_told_of_the_first(exclusively, tmp_path):
    with (tmp_path / "lock").open("w") as first:
        exclusively.fcntl.flock(first, exclusively.fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="Another build is running in this folder"):
            exclusively.main(str(tmp_path / "lock"), "make")
    exclusively.main(str(tmp_path / "lock"), "make")
    assert exclusively.became == [("make",)]


def test_a_build_in_a_folder_that_cannot_be_written_says_so(exclusively, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"file: cannot be written \("):
        exclusively.main(str(tmp_path / "file" / "lock"), "make")


def test_unknown_chapters_list_the_known_ones(project, call):
    status, _, err = call("execute", "99")
    assert status == 2 and "'99': no such chapter; there are: 01-tiny" in err


def test_runs_are_listed_shown_and_removed(project, call):
    store = RunStore()
    made = [store.get(Toy(name=name, traces=str(project))) for name in ("a", "b")]
    status, out, _ = call("runs", "list")
    assert status == 0 and all(run.key in out for run in made)
    assert out.endswith("2 runs in ../data/runs\n")
    status, out, _ = call("runs", "show", made[0].key[:-2])
    shown = json.loads(out)
    assert status == 0 and shown["key"] == made[0].key and shown["spec"]["name"] == "a"
    assert "result.json" in shown["files"] and "versions" in shown["provenance"]
    status, _, err = call("runs", "remove", made[0].key, "toy-nothing")
    assert status == 2 and "no such run among 2" in err and made[0].folder.exists()  # all are found, or none is removed
    status, out, _ = call("runs", "remove", made[0].key)
    assert (status, out) == (0, f"removed: {made[0].key}\n")
    assert not made[0].folder.exists() and made[1].folder.exists()


def test_an_empty_store_is_no_error(project, call):
    assert call("runs", "list")[:2] == (0, "0 runs in ../data/runs\n")
    assert call("runs", "show", "x")[0] == 2


def leave_values(project, profile: str = "reader", verdict: str = "partly", **numbers: list[float]) -> None:
    """What an executed chapter leaves: its profile, a verdict and numbers over seeds."""
    values = {"profile": {"value": profile, "text": profile}, "C1": {"value": verdict, "text": verdict}}
    values |= {k: {"value": sum(s) / len(s), "text": "", "seeds": s} for k, s in numbers.items()}
    folder = project / "book" / "_values"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "01-tiny.json").write_text(json.dumps(values))


def test_reference_results_are_written_and_verified(project, call):
    leave_values(project, gain=[1.0, 2.0, 3.0], kl=[0.1, 0.1, 0.1])
    status, out, _ = call("reference")
    path = project / "data" / "reference" / "reader.json"
    assert (
        status == 0
        and "2 numbers and 1 verdicts written" in out
        and json.loads(path.read_text())["profile"] == "reader"
    )
    status, out, _ = call("verify")
    assert status == 0 and "of 2 numbers: 2 identical" in out and "versions differ" not in out
    leave_values(project, gain=[1.5, 2.5, 3.5], kl=[0.1, 0.1, 0.1])
    status, out, _ = call("verify")
    assert status == 0 and "1 identical, 1 agrees" in out.replace("1 agrees, 1 identical", "1 identical, 1 agrees")
    leave_values(project, gain=[11.0, 12.0, 13.0], kl=[0.1, 0.1, 0.1])
    status, out, _ = call("verify")
    assert status == 1 and "differs   01-tiny:gain: reference 2, now 12, tolerance 2.5" in out
    assert "kl:" not in out
    leave_values(project, gain=[1.0, 2.0, 3.0])
    status, out, _ = call("verify")
    assert status == 1 and "missing   01-tiny:kl" in out


def test_a_verdict_that_turned_is_named(project, call):
    """Also where every number agrees; a verdict that is new is no fault."""
    leave_values(project, gain=[1.0, 2.0, 3.0])
    call("reference")
    leave_values(project, verdict="not supported", gain=[1.0, 2.0, 3.0])
    status, out, _ = call("verify")
    assert status == 1 and "1 identical" in out and "of 1 verdicts: 1 turned" in out
    assert "turned    01-tiny:C1: reference 'partly', now 'not supported'" in out


def leave_interval(project, low: float, high: float, verdict: str) -> None:
    """What the ledger leaves: the interval of C1a, whose threshold is 0.8, and the verdict on its claim."""
    seeds = [low, (low + high) / 2, high]
    kept = {"value": seeds[1], "text": "", "seeds": seeds, "interval": [low, high], "n": 3}
    values = {"profile": {"value": "reader", "text": "reader"}, "C1": {"value": verdict, "text": verdict}, "C1a": kept}
    folder = project / "book" / "_values"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "08-ledger.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("second", "edge"),
    [
        (0.85, " (C1a on the edge)"),
        (0.825, ""),
        (None, ""),
    ],  # two machines differ by 0.03, by 0.005, or nobody knows
)
def test_a_verdict_that_turned_on_the_edge_is_said_to_have_been_there(project, call, second, edge):
    """The end lies 0.02 above the threshold, which is less than 0.03."""
    leave_interval(project, 0.82, 1.0, "supported")
    call("reference")
    assert json.loads((project / "data" / "reference" / "reader.json").read_text())["intervals"]["C1a"]["low"] == 0.82
    if second:
        leave_interval(project, second, 1.0, "supported")
        call("reference", "--second")
    leave_interval(project, 0.78, 1.0, "inconclusive")
    status, out, _ = call("verify")
    assert status == 1 and f"now 'inconclusive'{edge}\n" in out


def test_what_a_second_machine_said_is_kept_beside_the_reference(project, call):
    leave_interval(project, 0.82, 1.0, "supported")
    call("reference")
    leave_interval(project, 0.78, 1.0, "inconclusive")
    assert call("reference", "--second")[0] == 0
    kept = {
        name: json.loads((project / "data" / "reference" / f"{name}.json").read_text())
        for name in ("reader", "reader-second")
    }
    assert [one["intervals"]["C1a"]["low"] for one in kept.values()] == [0.82, 0.78]


def test_an_edited_reference_fails_by_name(project, call):
    leave_values(project, gain=[1.0, 2.0, 3.0], kl=[0.1, 0.2, 0.3])
    call("reference")
    path = project / "data" / "reference" / "reader.json"
    known = json.loads(path.read_text())
    known["numbers"]["01-tiny:kl"]["value"] = 0.21
    path.write_text(json.dumps(known))
    status, out, _ = call("verify")
    assert status == 1 and "edited    01-tiny:kl" in out and "gain:" not in out


def test_other_versions_are_said(project, call):
    leave_values(project, gain=[1.0, 2.0, 3.0])
    call("reference")
    path = project / "data" / "reference" / "reader.json"
    known = json.loads(path.read_text())
    known["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(known))
    status, out, _ = call("verify")
    assert status == 0 and "versions differ from the reference's: torch" in out


def test_what_cannot_be_verified_is_said(project, call):
    status, _, err = call("verify")
    assert status == 2 and "there are no reference results reader.json" in err
    assert call("reference")[2].startswith("all chapters have to be of one profile (none is executed)")
    leave_values(project, gain=[1.0, 2.0, 3.0])
    call("reference")
    leave_values(project, "smoke", gain=[1.0, 2.0, 3.0])
    status, _, err = call("verify")
    assert status == 2 and "the executed chapters are of profile 'smoke', the reference of 'reader'" in err


def test_a_parameter_given_twice_is_refused():
    assert cli.parse_assignments(["beta=0.5", "pairs=48"]) == {"beta": 0.5, "pairs": 48}
    with pytest.raises(CommandError, match="pairs: given twice, 48 and 4800"):
        cli.parse_assignments(["pairs=48", "pairs=4800"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["world"], "no preference file"), (["a.jsonl", "-p", "dataset=b.jsonl"], "dataset: given twice")],
)
def test_what_data_cannot_describe_is_said(arguments, said):
    result = CliRunner().invoke(cli.app, ["data", *arguments])
    assert isinstance(result.exception, CommandError) and said in str(result.exception)
