"""The command `prefdyn lens`: options, what is refused, and runs of the field's own trainer from end to end."""

import json
import os
import random
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import prefdyn.book
import pytest
import torch
import typer
from prefdyn.book import lens_cli
from prefdyn.lab import folders, policy
from test_folders import make_run, sequence_logp, tiny, words, write_pairs
from typer.testing import CliRunner

APP = typer.Typer()
APP.command()(lens_cli.lens)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, write_pairs(folder / "pairs.jsonl"), steps=(2, 4))
    return folder


@pytest.fixture(autouse=True)
def report(monkeypatch) -> list[Path]:
    """In the place of the report's writer, one that notes what it was given."""
    written = []
    module = ModuleType("prefdyn.book.report")
    module.write = lambda folder: written.append(folder) or folder / "report.html"
    monkeypatch.setitem(sys.modules, "prefdyn.book.report", module)
    monkeypatch.setattr(prefdyn.book, "report", module, raising=False)
    return written


def call(*arguments: object) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(APP, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_checkpoints_become_a_lens_folder_and_a_report(run, tmp_path, report):
    out = tmp_path / "mine"
    given = [run / "checkpoint-4", run / "checkpoint-2", "--pairs", run / "pairs.jsonl", "--reference", run / "start"]
    given += ["--method", "rpo", "--beta", 0.5, "-p", "alpha=0.25", "--probe", 4, "--out", out, "--max-response", 5]
    said = call(*given).splitlines()
    assert report == [out] and said[-1] == f"report: {out / 'report.html'}"
    assert [line.partition(":")[0] for line in said[:-1]] == ["checkpoint-2", "checkpoint-4"] and "G = " in said[0]
    about = json.loads((out / "about.json").read_text())
    assert about["method"]["settings"] == {"alpha": 0.25, "beta": 0.5}
    assert about["data"]["used"] == 4 and about["data"]["max_response"] == 5
    assert [model["step"] for model in about["models"]] == [2, 4]
    typed = shlex.split(about["command"])
    assert typed[:2] == ["prefdyn", "lens"] and "--dtype" not in typed
    said = call(*typed[2:]).splitlines()  # the command that is noted is the same question
    assert said[:-1] == ["checkpoint-2: measured before", "checkpoint-4: measured before"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-p", "beta"], r"-p 'beta': must be name=number, the name a setting of method='dpo': beta"),
        (["-p", "beta=high"], r"-p 'beta=high': must be name=number"),
        (["--beta", 0.1, "-p", "beta=0.2"], "beta is given twice"),
        (["--method", "orpo", "-p", "gamma=1"], "orpo: no such setting: gamma; there are: beta"),
        (["--method", "sft", "--beta", 0.1], "sft: no such setting: beta; there are: none"),
        (["--method", "grpo"], "method='grpo': its weights come from replies sampled while it trains"),
        (["--memory", "20"], "memory='20': must be a positive number and a unit"),
        (["--dtype", "float16"], "dtype='float16': must be one of float32, bfloat16"),
        (["--targets", "nowhere.jsonl", "--method", "orpo"], r"targets: given 'nowhere.jsonl', no such file"),
        (["--base", "."], "holds a whole model, which has no base"),
        ([], "method='dpo' compares with a reference policy and none was given"),
    ],
)
def test_what_cannot_be_is_refused_by_name(run, tmp_path, more, message, report):
    with pytest.raises(ValueError, match=message):
        call(run / "checkpoint-2", "--pairs", run / "pairs.jsonl", "--out", tmp_path, *more)
    assert not report


def test_without_checkpoints_or_pairs_there_is_nothing_to_do(run):
    for given in (["--pairs", run / "pairs.jsonl"], [run / "checkpoint-2"]):
        assert CliRunner().invoke(APP, list(map(str, given))).exit_code == 2
    with pytest.raises(folders.FolderError, match="nowhere: no such folder"):
        call("nowhere", "--pairs", run / "pairs.jsonl")


# The field's own trainer


def trained(folder: Path, **settings):
    """A few steps of TRL's DPOTrainer on conversations, saved every 2 steps; returns the trainer and its pairs."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl", reason="the trainer library is not installed")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    model, tokenizer = tiny()
    policy.save(model, tokenizer, folder / "start")
    rng = random.Random(5)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"w{i} {words(rng, 3)}"}],
            "chosen": [{"role": "assistant", "content": words(rng, 6)}],
            "rejected": [{"role": "assistant", "content": f"w{i} {words(rng, 5)}"}],
        }
        for i in range(8)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = trl.DPOConfig(
        output_dir=str(folder / "run"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=5e-3,
        beta=0.5,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        seed=0,
    )
    own = datasets.Dataset.from_list(rows)
    start = policy.load(str(folder / "start"))[0]
    given = {"args": told, "train_dataset": own, "eval_dataset": own, "processing_class": tokenizer}
    trainer = trl.DPOTrainer(start, **given, **settings)
    trainer.train()
    return trainer, rows


def test_a_run_of_the_field_s_trainer_is_read_from_end_to_end(tmp_path):
    """Margins at the last checkpoint are the trainer's own, and log-probs those of its model, token by token."""
    trainer, rows = trained(tmp_path)
    made = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert {"optimizer.pt", "training_args.bin", "trainer_state.json"} <= {file.name for file in made[0].iterdir()}
    given = ["--pairs", tmp_path / "pairs.jsonl", "--beta", 0.5, "--out", tmp_path / "out"]
    call(*made, *given, "--reference", tmp_path / "start")
    sequences = pd.read_parquet(tmp_path / "out" / "sequences.parquet").query("step == 4")
    logged = trainer.evaluate()["eval_rewards/margins"]
    assert abs(logged) > 0.05 and 0.5 * sequences["margin"].mean() == pytest.approx(logged, rel=1e-3)
    model, tokenizer = trainer.model.eval(), policy.load_tokenizer(str(made[0]))
    with torch.no_grad():
        chosen = [
            sequence_logp(model, tokenizer, row["prompt"][0]["content"], row["chosen"][0]["content"]).item()
            for row in rows
        ]
    likelihood = pd.read_parquet(tmp_path / "out" / "likelihood.parquet")
    found = likelihood.query("step == 4 and kind == 'chosen'")["logp"].item()
    assert found == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)


def test_adapters_of_the_field_s_trainer_are_read_from_end_to_end(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer, _ = trained(tmp_path, peft_config=config)
    made = sorted((tmp_path / "run").glob("checkpoint-*"))
    given = ["--pairs", tmp_path / "pairs.jsonl", "--beta", 0.5, "--out", tmp_path / "out"]
    call(*made, *given, "--base", tmp_path / "start")
    sequences = pd.read_parquet(tmp_path / "out" / "sequences.parquet").query("step == 4")
    logged = trainer.evaluate()["eval_rewards/margins"]
    assert 0.5 * sequences["margin"].mean() == pytest.approx(logged, rel=1e-3, abs=1e-5)
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["model"]["adapter"] == "LORA of rank 2 on q_proj, v_proj" and about["reference"] == "start"
