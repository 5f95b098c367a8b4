"""A preference file of which most cannot be used: the command and the page account for every line."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from prefdyn.book import cli
from prefdyn.lab.layouts import DataError
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
LONG = "a very long beginning that both sides share and that is all that a short limit keeps of them "
LIMITS = {"max_prompt": 12, "max_response": 8, "vocab_size": 300}
REASONS = {
    "not valid JSON": 40,
    "'chosen' and 'rejected' are the same text": 40,
    "chosen and rejected answer different prompts": 40,
    "cut to max_response=8 tokens, chosen and rejected are the same": 40,
}


def line(i: int) -> str:
    """One of five kinds of lines, in turn: one that can be used, and four that cannot."""
    asked = f"What is {i} + {i}?"
    row = {"prompt": asked, "chosen": f"It is {2 * i}.", "rejected": "No idea!"}
    said = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": text}]
        for ask, text in ((asked, "yes"), ("Else?", "no"))
    ]
    return [
        json.dumps(row),
        json.dumps(row)[:-9],
        json.dumps(row | {"rejected": row["chosen"]}),
        json.dumps({"chosen": said[0], "rejected": said[1]}),
        json.dumps(row | {"chosen": LONG + "yes", "rejected": LONG + "no"}),
    ][i % 5]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "prefs.jsonl"
    path.write_text("\n".join(map(line, range(200))))
    return path


def counted(text: str, separator: str) -> dict[str, int]:
    """The rows "what, number" of an account whose value begins with a number."""
    found = re.findall(rf"^ *(\S.*?) *{separator} *(\d+)", text, re.MULTILINE)
    return {what.removeprefix("left out: "): int(number) for what, number in found}


def assert_accounts_for_all(rows: dict[str, int], read: str) -> None:
    assert {reason: rows.get(reason) for reason in REASONS} == REASONS
    assert rows[read] == 200
    uses = ("to train on", "to check on", "of prompts kept for validation and evaluation", "more than were asked for")
    assert sum(rows[f"pairs {use}"] for use in uses) == 40


SIZES = {"pairs": 48, "check": 32, "validation": 4, "held_out": 8}


def data(file: Path, **given):
    """`prefdyn data` with parameters."""
    options = [part for name, value in given.items() for part in ("-p", f"{name}={value}")]
    return CliRunner().invoke(cli.app, ["data", str(file), "--show", "2", *options])


def test_a_file_that_cannot_be_used_is_described_all_the_same(file):
    result = data(file, profile="smoke")
    # the smoke profile keeps 128 prompts for validation and evaluation: more than there are
    assert isinstance(result.exception, DataError) and "the file has 80 different prompts" in str(result.exception)
    assert counted(result.output, "  ")["records"] == 200


def test_the_command_accounts_for_every_line(file):
    result = data(file, **LIMITS, **SIZES)
    assert result.exit_code == 0, result.output
    rows = counted(result.output, "  ")
    assert_accounts_for_all(rows, "records")
    assert "layout" in result.output and "words (median)" in result.output
    assert "line 2: not valid JSON" in result.output and "What is 0 + 0?" in result.output


def test_the_page_accounts_for_every_line(file, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFDYN_RUNS", str(tmp_path / "runs"))
    small = {"profile": "smoke", "seeds": [0], "width": 16, "sft_steps": 2, "sft_batch": 4} | SIZES | LIMITS
    source = ROOT / "notebooks" / "01-setting.ipynb"
    output = cli.execute_chapter(source, small | {"dataset": str(file)}, tmp_path / "out.ipynb")
    texts = [
        "".join(out["data"]["text/plain"])
        for cell in nbformat.read(output, as_version=4).cells
        for out in cell.get("outputs", [])
        if "records read" in "".join(out.get("data", {}).get("text/plain", ""))
    ]
    (told,) = texts
    rows = counted(told, r"\|")
    assert_accounts_for_all(rows, "records read")
    assert "chosen cut to 8 tokens" in told


def test_a_file_with_text_that_would_be_markup_is_escaped_on_the_page(capsys):
    from prefdyn.book import page
    from prefdyn.lab.account import Account, Limits
    from prefdyn.lab.layouts import LeftOut

    odd = LeftOut("line 1", "unknown role", "<script>alert(1)</script>")
    account = Account("pairs", (), (), 1, (odd,), 0, (), {}, Limits(9, 9), {})
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "display", lambda data, **more: shown.append(data))
        page.texts({"what": what, "": value} for what, value in account.rows())
    assert "<script>" not in shown[0]["text/html"] and "&lt;script&gt;" in shown[0]["text/html"]
