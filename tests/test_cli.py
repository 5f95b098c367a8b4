"""The command line on a small project of its own: what it lists, executes, keeps and refuses."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from prefdyn import cli
from prefdyn.cli import CommandError, parse_assignment
from prefdyn.runs import RunStore
from toys.specs import Toy

ROOT = Path(__file__).resolve().parents[1]
CELLS = [
    ("markdown", "# A tiny chapter\n\nSome text.", []),
    ("code", 'profile = "smoke"\nbeta = None\nseeds = None', ["parameters"]),
    ("code", "import sys\n\nfrom prefdyn import page, params\n\np = params.read()", []),
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
    ],
)
def test_assignments(text, expected):
    assert parse_assignment(text) == expected


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
    assert "default: smoke [0, 1], reader [0, 1, 2], paper [0, 1, 2]" in out


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
    ],
)
def test_wrong_parameters_stop_before_anything_runs(project, call, monkeypatch, arguments, said):
    def no_kernel(*args, **kwargs):
        raise AssertionError("the notebook was started")

    monkeypatch.setattr(cli.papermill, "execute_notebook", no_kernel)
    status, out, err = call("execute", "01", *arguments)
    assert status == 2 and said in err and out == "" and "Traceback" not in err
    assert not (project / "book").exists()


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


def leave_values(project, profile: str = "reader", **numbers: list[float]) -> None:
    """What an executed chapter leaves: its profile and numbers over seeds."""
    values = {"profile": {"value": profile, "text": profile}}
    values |= {k: {"value": sum(s) / len(s), "text": "", "seeds": s} for k, s in numbers.items()}
    folder = project / "book" / "_values"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "01-tiny.json").write_text(json.dumps(values))


def test_reference_results_are_written_and_verified(project, call):
    leave_values(project, gain=[1.0, 2.0, 3.0], kl=[0.1, 0.1, 0.1])
    status, out, _ = call("reference")
    path = project / "data" / "reference" / "reader.json"
    assert status == 0 and "2 numbers written" in out and json.loads(path.read_text())["profile"] == "reader"
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
