"""A key names all that a result depends on: files, commits, dates and tables, and nothing else."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefdyn.book import plan
from prefdyn.book.params import ParameterError, check
from prefdyn.lab import policy, recipes, world
from prefdyn.lab.layouts import DataError
from prefdyn.lab.runs import RunStore
from prefdyn.lab.worlds import EASY
from toys.models import tiny_policy

SMALL = {
    "profile": "smoke",
    "pairs": 24,
    "check": 8,
    "validation": 4,
    "held_out": 4,
    "batch": 8,
    "sft_batch": 8,
    "sft_steps": 2,
    "epochs": 1.0,
    "checkpoints": 2,
}
DATED = "{% set day = strftime_now('%d %b') if strftime_now is defined else 'never' %}{{ day }} " + policy.CHAT_TEMPLATE


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of the world's words and of dates, whose template begins with today's."""
    tokenizer = policy.word_tokenizer([*EASY.vocabulary(), "01", "02", "Jan", "never"])
    model = policy.scratch_model(tokenizer, layers=1, width=16, heads=2, context=60, seed=0)
    tokenizer.chat_template = DATED
    policy.save(model, tokenizer, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def file_of(path: Path, rows: int = 40) -> Path:
    said = ({"prompt": f"{i}?", "chosen": f"good {i}", "rejected": "bad"} for i in range(rows))
    path.write_text("\n".join(map(json.dumps, said)))
    return path


def test_a_template_that_asks_for_the_date_is_told_the_one_in_the_key(store, checkpoint):
    """Else reference log-probs of one day and DPO of the next would share a key, and margins not begin at 0."""
    first, second = (check(SMALL | {"model": str(checkpoint), "today": f"2025-01-0{day}"}) for day in (1, 2))
    assert len({store.key(plan.run(p, 0, "dpo").scored()) for p in (first, second)}) == 2
    spec = plan.run(first, 0, "dpo")
    run = store.get(spec)
    assert run.frame("steps")["margin"].iloc[0] == pytest.approx(0, abs=1e-5)
    tokenizer = recipes.final_policy(run)[1]
    words = recipes.encode(spec.data, tokenizer, recipes.dataset(spec.data).pairs[:1], "chosen")
    assert tokenizer.decode(words.ids[0]).startswith("01 Jan write")
    assert "strftime_now" in json.loads((checkpoint / "tokenizer_config.json").read_text()).get(
        "chat_template", ""
    ) or ("strftime_now" in (checkpoint / "chat_template.jinja").read_text())  # the checkpoint itself is as it was


def test_a_file_that_changes_between_planning_and_reading_stops_the_run(store, tmp_path):
    path = file_of(tmp_path / "a.jsonl")
    spec = plan.data_spec(check(SMALL | {"dataset": str(path)}), 0)
    path.write_text(path.read_text().replace("good", "fine"))
    with pytest.raises(DataError, match="has changed since the work was planned"):
        recipes.dataset(spec)
    changed = plan.data_spec(check(SMALL | {"dataset": str(path)}), 0)
    assert changed.content != spec.content and recipes.dataset(changed).pairs[0]["chosen"].startswith("fine")


def test_a_checkpoint_that_changes_between_planning_and_loading_stops_the_run(store, tmp_path, checkpoint):
    spec = plan.sft_run(check(SMALL | {"model": str(checkpoint)}), 0)
    policy.save(*tiny_policy(seed=3), checkpoint)
    recipes.tokenizer_of.cache_clear()
    with pytest.raises(ValueError, match="its files have changed since the runs that need it were planned"):
        store.get(spec)


def test_what_lies_beside_a_checkpoint_is_not_the_checkpoint(store, checkpoint):
    key = store.key(plan.sft_run(check(SMALL | {"model": str(checkpoint)}), 0))
    (checkpoint / "README.md").write_text("A model.")
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "model.safetensors.metadata").write_text("a download")
    (checkpoint / "optimizer.safetensors").write_bytes(b"state")
    assert store.key(plan.sft_run(check(SMALL | {"model": str(checkpoint)}), 0)) == key
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert store.key(plan.sft_run(check(SMALL | {"model": str(checkpoint)}), 0)) != key


def test_a_checkpoint_is_read_once_to_plan_all_runs_of_a_chapter(checkpoint, monkeypatch):
    read, digest = [], hashlib.file_digest

    def noted(stream, name):
        read.append(Path(stream.name).name)
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    p = check(SMALL | {"model": str(checkpoint)})
    for seed in range(3):
        plan.reward_run(p, seed)
        for run in (plan.sft_run(p, seed), plan.run(p, seed, "dpo"), plan.run(p, seed, "ppo")):
            plan.alignment_run(p, run)
    assert "model.safetensors" in read and len(read) == len(set(read))


def test_demonstrators_that_a_reader_changes_are_those_of_the_run(store, monkeypatch):
    """Set in the notebook, as an exercise invites to: the run of this world, not the kept one of another."""
    p = check(SMALL | {"difficulty": "easy", "demonstrations": 64, "width": 16})
    before = plan.sft_run(p, 0)
    monkeypatch.setitem(world.SKILLS, "novice", {"share": 1.0, "habit": 0.0, "slip": 0.05})
    monkeypatch.setattr(world, "SKILLS", {"novice": world.SKILLS["novice"]})
    after = plan.sft_run(p, 0)
    assert store.key(before) != store.key(after)
    perfect, mixed = (recipes.dataset(spec.data).demonstrations for spec in (after, before))
    shares = [sum(row["reward"] == 7 for row in rows) / len(rows) for rows in (perfect, mixed)]
    assert shares[0] > 0.6 > 0.5 > shares[1]  # with five or six things to slip on, 0.95 ** 6 = 0.74 are perfect
    assert store.get(after).frame("replies").shape == store.get(before).frame("replies").shape


def test_another_world_is_another_run(store):
    """Of everything that reads the world, and of what is computed from that."""

    def keys(difficulty: str) -> list[str]:
        p = check(SMALL | {"difficulty": difficulty, "max_response": 36, "lr": 1e-3})
        runs = [plan.run(p, 0, "dpo"), plan.run(p, 0, "ppo")]
        return [store.key(spec) for run in runs for spec in (run.sft, run, plan.alignment_run(p, run))]

    assert keys("easy") == keys("easy") and not set(keys("easy")) & set(keys("hard"))


def test_a_file_has_no_difficulty(tmp_path):
    """To ask for one is refused, since nothing would read it."""
    given = SMALL | {"dataset": str(file_of(tmp_path / "a.jsonl"))}
    assert plan.data_spec(check(given), 0).difficulty == ""
    for difficulty in ("easy", "hard"):
        with pytest.raises(ParameterError, match=f"difficulty: given '{difficulty}'; only the world has it"):
            check(given | {"difficulty": difficulty})


PLANNED = """
import sys
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.lab.runs import RunStore
print(RunStore(sys.argv[1]).key(plan.sft_run(check({"profile": "smoke", "model": "org/name", "max_response": 28}), 0)))
"""


def test_a_name_on_the_hub_stands_for_its_commit(tmp_path):
    """A cache as a download leaves it, whose reference moves: the key follows, and comes back with it."""
    home = tmp_path / "hub" / "models--org--name"
    for seed, commit in enumerate(("a" * 40, "b" * 40)):
        policy.save(*tiny_policy(seed=seed), home / "snapshots" / commit)
    (home / "refs").mkdir()
    keys = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        (home / "refs" / "main").write_text(commit)
        offline = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", PLANNED, str(tmp_path / "runs")]
        done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        keys.append(done.stdout.strip())
    assert keys[0] == keys[2] != keys[1]
