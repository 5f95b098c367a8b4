"""Chapters on preferences of one's own, very small: each executes where no true reward is known, and says so."""

import json
from pathlib import Path

import nbformat
import pytest
from prefdyn.book import cli, page, params, plan
from prefdyn.findings import claims
from prefdyn.lab import recipes

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "profile": "smoke",
    "seeds": [0, 1],
    "pairs": 48,
    "check": 32,
    "validation": 4,
    "held_out": 8,
    "max_prompt": 12,
    "max_response": 8,
    "vocab_size": 300,
    "width": 16,
    "sft_steps": 8,
    "sft_batch": 8,
    "batch": 8,
    "epochs": 2.0,
    "iterations": 3,
    "rollouts": 8,
    "ppo_batch": 4,
    "checkpoints": 4,
    "probe": 32,
    "ppo_probe": 32,
    "choice_probe": 16,
    "explore_prompts": 3,
    "explore_samples": 2,
    "earning_prompts": 4,
    "earning_samples": 2,
    "mass_pairs": 6,
    "mass_samples": 2,
    "sequences": 16,
    "variants": ["shift", "late"],
    "dpo_negative": [[0, 0.0], [2, 1.0]],
}


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Questions with a right and an evasive answer."""
    rows = [
        {
            "prompt": f"What is {i} + {i}?",
            "chosen": f"It is {2 * i}, naïvely.",
            "rejected": f"No idea{'!' * (1 + i % 3)}",
        }
        for i in range(120)
    ]
    path = tmp_path / "preferences.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("chapter", [name for name in CHAPTERS if name != "06-exact"])
def test_a_chapter_executes_on_a_file_of_preferences(chapter, dataset, tmp_path, monkeypatch):
    """Whatever needs the true reward is left out; the ledger, alone, finds no run and judges no claim of the paper."""
    monkeypatch.setenv("PREFDYN_RUNS", str(tmp_path / "runs"))
    source = ROOT / "notebooks" / f"{chapter}.ipynb"
    given = {name: value for name, value in SMALL.items() if name in cli.known_parameters(source)}
    output = cli.execute_chapter(source, given | {"dataset": str(dataset)}, tmp_path / "out.ipynb")
    shown = [
        "".join(part["data"].get("text/plain", ""))
        for cell in nbformat.read(output, as_version=4).cells
        for part in cell.get("outputs", [])
        if part.output_type == "display_data"
    ]
    text = "\n".join(shown)
    assert len(shown) > 5 and "nan" not in text.lower().replace("naïve", "")
    assert described(nbformat.read(output, as_version=4)) and "records read | 120 (pairs)" in text
    if chapter == "08-ledger":
        assert "Of 7 claims: 7 not run" in text
    elif chapter != "07-prediction":  # G needs no true reward
        assert "not known" in text


def described(notebook: nbformat.NotebookNode) -> set[str]:
    """Digests of the pairs that a chapter describes."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return {kept[page.DIGEST] for o in outputs if page.DIGEST in (kept := o.get("metadata", {}).get(page.KEY, {}))}


def assert_describes_what_its_runs_read(notebook: nbformat.NotebookNode) -> None:
    p = params.check(notebook.metadata.papermill.parameters)
    read = plan.run(p, p.seeds[0], "dpo").data
    assert plan.reward_run(p, p.seeds[0]).data == plan.run(p, p.seeds[0], "ppo", reward="learned").data == read
    assert described(notebook) == {recipes.dataset(read).digest()}


def test_the_first_chapter_describes_the_labels_that_later_chapters_train_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFDYN_RUNS", str(tmp_path / "runs"))
    source = ROOT / "notebooks" / "01-setting.ipynb"
    given = {"profile": "smoke", "seeds": [0], "sft_steps": 4, "label_noise": 0.3}
    notebook = nbformat.read(cli.execute_chapter(source, given, tmp_path / "out.ipynb"), as_version=4)
    assert_describes_what_its_runs_read(notebook)
    flipped = page.collect_values(notebook)["flipped"]["value"]
    pairs = recipes.dataset(plan.run(params.check(given), 0, "dpo").data).pairs
    assert flipped == pytest.approx(sum(row["flipped"] for row in pairs) / len(pairs)) and 0.2 < flipped < 0.4


@pytest.mark.parametrize("chapter", [name for name in CHAPTERS if name != "06-exact"])
def test_a_page_describes_the_pairs_that_its_runs_read(chapter):
    executed = ROOT / "book" / "notebooks" / f"{chapter}.ipynb"
    if not executed.is_file():
        pytest.skip("the book is not built")
    assert_describes_what_its_runs_read(nbformat.read(executed, as_version=4))


def test_figures_of_the_ledger_exist():
    for rule in claims.RULES:
        chapter, _, figure = rule.figure.partition("#")
        assert chapter in CHAPTERS and f'\\"{figure}\\"' in (ROOT / "notebooks" / f"{chapter}.ipynb").read_text(), (
            rule.name
        )


def test_the_ledger_waits_for_the_chapters_that_it_judges():
    named = [line for line in (ROOT / "Snakefile").read_text().splitlines() if line.startswith("LEDGER = ")]
    assert named == ['LEDGER = "08-ledger"'] and "08-ledger" in CHAPTERS
