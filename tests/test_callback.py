"""The lens while a plain `transformers.Trainer` trains: exact, unnoticed by training, and never in its way."""

import importlib.metadata
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prefdyn.lab.policy import word_tokenizer
from prefdyn.lens import alignment, callback, captured, folder
from prefdyn.lens.batch import Batch
from prefdyn.lens.callback import LensCallback
from prefdyn.lens.groups import groups
from prefdyn.methods.sft import sft_weights
from toys.models import build
from transformers import PreTrainedModel, Trainer, TrainingArguments

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

WORDS = word_tokenizer([f"w{i}" for i in range(36)])
ROWS, WIDTH = 8, 7


def policy(seed: int = 0, dropout: float = 0.0, architecture: str = "gpt_neox") -> PreTrainedModel:
    more = {"attention_dropout": dropout, "hidden_dropout": dropout} if dropout else {}
    return build(architecture, seed, vocab_size=40, pad_token_id=None, bos_token_id=None, eos_token_id=1, **more)


def examples(seed: int = 3, count: int = ROWS) -> list[dict[str, torch.Tensor]]:
    """Rows of random words, padded on the right, whose first two tokens are a prompt."""
    rng, rows = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        real = int(torch.randint(4, WIDTH + 1, (1,), generator=rng))
        ids = torch.randint(4, 40, (WIDTH,), generator=rng)
        mask = (torch.arange(WIDTH) < real).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(WIDTH) < 2), -100)
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return rows


def as_batch(rows: list[dict[str, torch.Tensor]]) -> Batch:
    ids, mask, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels"))
    return Batch(ids, mask.bool(), labels != -100)


def trainer_of(model, path: Path, kind: type[Trainer] = Trainer, data=None, evaluated=None, **settings) -> Trainer:
    plain = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 4}
    plain |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2, "seed": 5}
    args = TrainingArguments(output_dir=str(path / "run"), **plain | settings)
    return kind(model, args, train_dataset=data or examples(), eval_dataset=evaluated, processing_class=WORDS)


def lens(trainer: Trainer, path: Path, **settings) -> LensCallback:
    made = LensCallback(trainer, report=path / "lens", **settings)
    trainer.add_callback(made)
    return made


def table(path: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (path / "lens" / f"{name}.jsonl").read_text().splitlines()]


def about(path: Path) -> dict:
    return json.loads((path / "lens" / "about.json").read_text())


def part(rows: list[dict], step: int, component: str = "full") -> dict:
    (found,) = [row for row in rows if row["step"] == step and row["component"] == component]
    return found


# What is measured


def test_g_of_a_step_is_that_of_the_offline_route(tmp_path):
    trainer = trainer_of(policy(), tmp_path, evaluated=examples(9, 4), max_steps=2, optim="sgd")
    lens(trainer, tmp_path, every=1)
    trainer.train()
    batch, rows = as_batch(examples(9, 4)), table(tmp_path, "alignment")
    d = alignment.target_direction(trainer.model, batch)
    logps, a = alignment.token_scores(trainer.model, batch, d)
    w = sft_weights(batch.response).w * len(batch) / batch.response.sum()  # a mean over tokens, not over rows
    expected = (w * a).sum().item()
    assert part(rows, 2)["g"] == pytest.approx(expected, rel=1e-4)
    assert part(rows, 2, "positive")["g"] == pytest.approx(expected, rel=1e-4)
    assert part(rows, 2, "negative")["g"] == 0
    assert part(rows, 2)["cosine"] == pytest.approx(1, rel=1e-4)  # both are sums over the same tokens
    assert part(rows, 2)["logp_targets"] == pytest.approx(logps.sum(-1).mean().item(), rel=1e-5)
    each = (w * a).sum(-1)
    assert part(rows, 2)["se"] == pytest.approx((4 * each.var()).sqrt().item(), rel=1e-3)
    assert [row["full"] for row in table(tmp_path, "sequences")[-4:]] == pytest.approx(
        each.tolist(), rel=1e-4, abs=1e-6
    )
    own = [row["g"] for row in table(tmp_path, "groups") if row["step"] == 2]
    assert len(own) == len(set(groups(trainer.model).values())) and sum(own) == pytest.approx(expected, rel=1e-4)
    tokens = [row for row in table(tmp_path, "tokens") if row["step"] == 2]
    assert sum(row["w"] * row["a"] for row in tokens) == pytest.approx(expected, rel=1e-4)
    assert [row["logp"] for row in tokens] == pytest.approx(logps[batch.response].tolist(), rel=1e-4, abs=1e-5)
    assert table(tmp_path, "texts")[0]["response"] == WORDS.decode(batch.ids[0][batch.response[0]])


def test_g_is_the_rate_at_which_a_small_step_changes_the_targets(tmp_path):
    """A plain step of size lr along -gradient of the probe's loss raises their mean log-likelihood by lr G."""
    rate, found = 1e-5, []
    trainer = trainer_of(
        policy().double(), tmp_path, data=examples(3, 4), max_steps=2, optim="sgd", learning_rate=rate, max_grad_norm=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    lens(trainer, tmp_path, every=1)
    trainer.train()
    found = table(tmp_path, "alignment")
    moved = part(found, 2)["logp_targets"] - part(found, 1)["logp_targets"]
    assert moved / rate == pytest.approx(part(found, 1)["g"], rel=1e-2)


class Smoothed(Trainer):
    """A loss that reads whole distributions: the mean negative log-likelihood less the mean entropy."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logp = (
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
        )
        labels = inputs["labels"][:, 1:]
        inside = labels != -100
        picked = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return -((picked + 0.5 * entropy) * inside).sum() / inside.sum()


def test_a_loss_of_whole_distributions_is_measured_at_the_logits(tmp_path):
    trainer = trainer_of(policy(), tmp_path, kind=Smoothed, max_steps=1)
    lens(trainer, tmp_path, probe=4)
    trainer.train()
    batch, rows = as_batch(examples()[:4]), table(tmp_path, "alignment")
    d = alignment.target_direction(trainer.model, batch)
    inputs = {name: torch.stack([row[name] for row in examples()[:4]]) for name in examples()[0]}
    loss = trainer.compute_loss(trainer.model.eval(), inputs)
    grads = dict(zip(d, torch.autograd.grad(loss, [p for _, p in trainer.model.named_parameters()]), strict=True))
    expected = -alignment.inner(grads, d).item()
    assert part(rows, 1)["g"] == pytest.approx(expected, rel=1e-4)
    sequences = [row["full"] for row in table(tmp_path, "sequences") if row["step"] == 1]
    assert sum(sequences) == pytest.approx(expected, rel=1e-4)
    by_tokens = sum(row["w"] * row["a"] for row in table(tmp_path, "tokens") if row["step"] == 1)
    assert abs(by_tokens - expected) > 1e-2 * abs(expected)  # token weights alone would be wrong
    assert any("reads more of distributions" in note for note in about(tmp_path)["notes"])


class Penalised(Trainer):
    """A loss that is not of tokens alone: with half the square of all parameters."""

    def compute_loss(self, model, *args, **kwargs):
        return super().compute_loss(model, *args, **kwargs) + 0.5 * sum(p.square().sum() for p in model.parameters())


def test_what_no_token_explains_is_in_the_whole_and_said(tmp_path):
    trainer = trainer_of(policy(), tmp_path, kind=Penalised, max_steps=1)
    lens(trainer, tmp_path, probe=4)
    trainer.train()
    d = alignment.target_direction(trainer.model, as_batch(examples()[:4]))
    penalty = alignment.inner(d, dict(trainer.model.named_parameters())).item()
    tokens = sum(row["full"] for row in table(tmp_path, "sequences") if row["step"] == 1)
    assert part(table(tmp_path, "alignment"), 1)["g"] == pytest.approx(tokens - penalty, rel=1e-4)
    assert any("no token explains" in note for note in about(tmp_path)["notes"])


def test_the_cheap_tier_is_of_the_gradient_that_the_optimiser_gets(tmp_path):
    """Accumulated over two batches and clipped; d is that of the latest measurement."""
    trainer = trainer_of(
        policy(), tmp_path, max_steps=4, gradient_accumulation_steps=2, max_grad_norm=0.1, logging_steps=1
    )
    made, seen = lens(trainer, tmp_path, every=2), []
    event = made.on_pre_optimizer_step

    def also(args, state, control, **kwargs):
        grads = {f"model.{name}": p.grad.clone() for name, p in trainer.model.named_parameters()}
        seen.append((-alignment.inner(grads, made._direction).item(), alignment.norm(grads).item()))
        return event(args, state, control, **kwargs)

    made.on_pre_optimizer_step = also
    trainer.train()
    rows = table(tmp_path, "steps")
    assert [row["g"] for row in rows] == pytest.approx([g for g, _ in seen], rel=1e-4)
    assert [row["norm"] for row in rows] == pytest.approx([0.1] * 4, rel=1e-3)
    assert [(row["step"], row["d_step"]) for row in rows] == [(0, 0), (1, 0), (2, 2), (3, 2)]
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(logged, abs=1e-3)
    assert all(abs(row["cosine"]) <= 1 for row in rows)


def test_targets_can_be_given(tmp_path):
    """Texts as they are, with the end of text; conversations through the chat template."""
    model = policy()
    conversation = {
        "prompt": [{"role": "user", "content": "w1 w2"}],
        "completion": [{"role": "assistant", "content": "w3"}],
    }
    trainer = trainer_of(model, tmp_path, max_steps=1)
    made = lens(trainer, tmp_path, targets=[{"prompt": "w1 w2", "response": "w3 w4"}, conversation])
    rows = [
        [made._targets.ids[i][made._targets.attention[i]].tolist(), int(made._targets.response[i].sum())]
        for i in (0, 1)
    ]
    named = WORDS.get_vocab()
    assert rows[0] == [[named["w1"], named["w2"], named["w3"], named["w4"], WORDS.eos_token_id], 3]
    assert rows[1] == [[named["w1"], named["w2"], named["<reply>"], named["w3"], WORDS.eos_token_id], 2]
    trainer.train()
    assert about(tmp_path)["targets"]["count"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "rejected"}, "targets='rejected'"),
        ({"targets": []}, "nothing in it"),
        ({"targets": [{"prompt": "w1"}]}, r"targets\[0\].*'response'"),
        ({"targets": [{"prompt": "w1", "response": [{"role": "user", "content": "w2"}]}]}, "both be texts"),
        ({"probe": 0}, "probe=0"),
        ({"probe": True}, "probe=True"),
        ({"every": 0}, "every=0"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LensCallback(trainer_of(policy(), tmp_path), report=tmp_path / "lens", **settings)


def test_trainers_that_cannot_be_measured_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="trainer: given a SimpleNamespace"):
        LensCallback(SimpleNamespace())
    trainer = trainer_of(policy(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
        with pytest.raises(ValueError, match="world_size=2"):
            LensCallback(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_deepspeed_enabled", True)
        with pytest.raises(ValueError, match="DeepSpeed"):
            LensCallback(trainer)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        LensCallback(trainer)


def test_a_stream_is_refused_as_a_probe(tmp_path):
    stream = (row for row in examples())
    trainer = trainer_of(policy(), tmp_path)
    trainer.train_dataset = stream
    with pytest.raises(ValueError, match="train_dataset is a generator"):
        LensCallback(trainer)
    assert len(list(stream)) == ROWS  # none was taken


# What training must not notice


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "accumulated", "bf16", "checkpointed"],
)
def test_training_is_the_same_bit_for_bit(settings, tmp_path):
    """With dropout, shuffled batches and evaluations: every weight after six steps, every loss, every generator."""

    def trained(path: Path, watched: bool):
        data, evaluated = examples(3, 12), examples(9, 5)
        more = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1} | settings
        trainer = trainer_of(policy(dropout=0.2), path, data=data, evaluated=evaluated, **more)
        made = lens(trainer, path, every=3) if watched else None
        trainer.train()
        assert made is None or (not made.quiet and len(table(path, "alignment")) == 3 * 6)
        history = [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
                   for row in trainer.state.log_history if "lens/g" not in row]  # fmt: skip
        state = torch.get_rng_state(), np.random.get_state()[1], trainer.model.training
        return dict(trainer.model.named_parameters()), history, state

    (one, losses, state), (other, others, kept) = (
        trained(tmp_path / name, name == "with") for name in ("without", "with")
    )
    assert all(torch.equal(p, other[name]) for name, p in one.items())
    assert losses == others
    assert torch.equal(state[0], kept[0]) and np.array_equal(state[1], kept[1]) and state[2] == kept[2]


def test_what_a_trainer_collects_is_put_back():
    inner = {"train": {"a": [1.0]}, "eval": {}}
    trainer = SimpleNamespace(_metrics=inner, seen={1}, count=3, train_dataset=[1])
    with callback.untouched(trainer):
        inner["train"]["a"].append(2.0)
        inner["eval"]["b"] = [3.0]
        trainer.count, trainer.new = 4, 5
        trainer.seen.add(2)
        torch.rand(1), np.random.rand(), trainer.train_dataset.append(2)
    assert inner == {"train": {"a": [1.0]}, "eval": {}} and trainer._metrics is inner
    assert trainer.count == 3 and not hasattr(trainer, "new") and trainer.seen == {1}
    assert trainer.train_dataset == [1, 2]  # datasets are not looked into


def test_listening_leaves_a_model_as_it_was():
    model = policy()
    before = dict(vars(model))
    with captured.listening(model) as calls:
        model(input_ids=torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]]))
        with torch.no_grad():
            model(input_ids=torch.tensor([[4, 5, 6]]))
    assert len(calls) == 1 and calls[0].batch.response.tolist() == [[False, True, True]]
    assert vars(model) == before


# When things go wrong


class Failing(Trainer):
    """Raises where a loss is computed in evaluation mode with gradients, as the lens does."""

    def compute_loss(self, model, *args, **kwargs):
        if not model.training and torch.is_grad_enabled():
            raise RuntimeError("no loss for you")
        return super().compute_loss(model, *args, **kwargs)


def test_an_error_in_the_lens_is_said_once_and_training_goes_on(tmp_path, caplog):
    trainer = trainer_of(policy(), tmp_path, kind=Failing, max_steps=3)
    made = lens(trainer, tmp_path, every=1)
    with caplog.at_level(logging.WARNING, logger="prefdyn.lens"):
        trainer.train()
    assert made.quiet and trainer.state.global_step == 3
    said = [record.getMessage() for record in caplog.records if record.name == "prefdyn.lens"]
    assert len(said) == 1 and "no loss for you" in said[0] and "Training goes on" in said[0]
    assert any("no loss for you" in note for note in about(tmp_path)["notes"])


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "lens").write_text("a file, where a folder is wanted")
    trainer = trainer_of(policy(), tmp_path, max_steps=2)
    made = lens(trainer, tmp_path, every=1)
    with caplog.at_level(logging.WARNING, logger="prefdyn.lens"):
        trainer.train()
    assert made.quiet and trainer.state.global_step == 2 and "FileExistsError" in caplog.text
    assert (tmp_path / "lens").read_text() == "a file, where a folder is wanted"


def test_a_model_without_a_forward_derivative_is_measured_by_central_differences(tmp_path, monkeypatch):
    def none(*args):
        raise NotImplementedError("no forward derivative")

    monkeypatch.setitem(captured.METHODS, "forward", none)
    trainer = trainer_of(policy(), tmp_path, max_steps=1)
    made = lens(trainer, tmp_path, every=1)
    trainer.train()
    assert not made.quiet and about(tmp_path)["accuracy"]["method"] == "central"
    rows = table(tmp_path, "alignment")
    assert part(rows, 1, "positive")["g"] == pytest.approx(part(rows, 1)["g"], rel=1e-2)


# When, and where it goes


def test_the_loggers_of_the_trainer_get_it(tmp_path):
    trainer = trainer_of(policy(), tmp_path, max_steps=4, logging_steps=2)
    lens(trainer, tmp_path, every=2)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "lens/g" in row]
    assert [row["step"] for row in logged] == [0, 2, 4]
    rows = table(tmp_path, "alignment")
    for row in logged:
        assert row["lens/g"] == part(rows, row["step"])["g"]
        assert row["lens/g_positive"] == pytest.approx(part(rows, row["step"], "positive")["g"])
        assert {"lens/g_negative", "lens/cosine", "lens/share"} <= set(row) and 0 < row["lens/share"] <= 1
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [2, 4]  # its own are still there


def test_half_scaled_gradients_are_unscaled(tmp_path):
    """Clipping takes a scale out; without clipping the lens does."""
    trainer = trainer_of(policy(), tmp_path, max_steps=1, max_grad_norm=0)
    made = lens(trainer, tmp_path)
    trainer.train()
    made._direction = {name: torch.ones_like(p) for name, p in captured.moving(trainer.model).items()}
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, 8.0)
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: 4.0)
    count = sum(p.numel() for p in trainer.model.parameters())
    assert made._cheap()["g"] == pytest.approx(-2.0 * count)


@pytest.mark.parametrize(("share", "steps"), [(1.0, [0, 2, 4, 5]), (0.0, [0, 5])])
def test_without_a_number_it_measures_at_evaluations_while_that_is_cheap(share, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(callback, "SHARE", share)
    more = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 5}
    trainer = trainer_of(policy(), tmp_path, evaluated=examples(9, 4), **more)
    lens(trainer, tmp_path)
    trainer.evaluate()  # not a part of training, and not measured
    assert not (tmp_path / "lens").exists()
    trainer.train()
    assert sorted({row["step"] for row in table(tmp_path, "alignment")}) == steps
    omitted = [note for note in about(tmp_path)["notes"] if "were not measured" in note]
    assert [note[:6] for note in omitted] == (["2 of 2"] if share == 0 else [])


def test_more_than_its_share_is_said_once_and_still_measured(tmp_path, caplog):
    trainer = trainer_of(policy(), tmp_path, max_steps=4)
    lens(trainer, tmp_path, every=1)
    with caplog.at_level(logging.WARNING, logger="prefdyn.lens"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "every=1" in record.getMessage()]
    assert len(said) == 1 and len(table(tmp_path, "alignment")) == 5 * 6
    cost = about(tmp_path)["cost"]
    assert 0.1 < cost["share"] < 1 and cost["seconds"] > 0 and cost["rows"] == 4


def test_the_same_run_continues_its_folder_and_another_is_refused(tmp_path):
    def resumed(steps: int, **more) -> Trainer:
        model = policy(architecture="llama")
        trainer = trainer_of(model, tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        lens(trainer, tmp_path, every=1)
        trainer.train(**more)
        return trainer

    resumed(4)
    first = table(tmp_path, "alignment")
    trainer = resumed(4, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    second = table(tmp_path, "alignment")
    assert [row["step"] for row in second] == [row["step"] for row in first]
    assert [row["g"] for row in second] == pytest.approx([row["g"] for row in first], rel=1e-5)
    assert [row["step"] for row in table(tmp_path, "steps")] == [0, 1, 2, 3]
    assert len(table(tmp_path, "texts")) == ROWS
    trainer.args.seed = 6
    with pytest.raises(ValueError, match="tables of another run"):
        LensCallback(trainer, report=tmp_path / "lens")


def test_a_folder_is_continued_whatever_its_texts_hold_and_however_its_writer_ended(tmp_path):
    made = folder.Folder(tmp_path, {"seed": 5})
    made.begin(0)
    rows = [{"step": step, "token": token} for step, token in enumerate(["a\u2028b", "\x85", "c\n", "d"])]
    made.append("tokens", rows)
    with (tmp_path / "tokens.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "tok')  # killed in the middle of a line
    made.begin(3)
    kept = (tmp_path / "tokens.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in kept] == rows[:3]


def test_the_report_is_made_by_whoever_offers_to(tmp_path, monkeypatch):
    asked = []
    entry = SimpleNamespace(load=lambda: lambda folder: asked.append(folder))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **found: [entry] if found == REPORT else [])
    trainer = trainer_of(policy(), tmp_path, max_steps=1)
    lens(trainer, tmp_path)
    trainer.train()
    assert asked == [tmp_path / "lens"]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **found: [])
    trainer.train()
    assert any("prefdyn[book]" in note for note in about(tmp_path)["notes"])


REPORT = {"group": "prefdyn.report", "name": "html"}


def test_about_says_what_the_contract_asks_for(tmp_path):
    trainer = trainer_of(policy(), tmp_path, max_steps=1)
    lens(trainer, tmp_path, probe=6)
    trainer.train()
    said = about(tmp_path)
    top = "kind title made command method targets models reference model data accuracy cost versions hardware"
    assert {*top.split(), "notes"} <= set(said) and said["kind"] == "live"
    assert said["data"]["name"] == "train_dataset" and said["data"]["records"] == ROWS and said["data"]["used"] == 6
    assert said["data"]["left_out"] == {"more than were asked for": ROWS - 6}
    assert said["targets"] == {"what": "chosen", "count": 6, "sentence": "the completions of the probe"}
    assert said["model"]["parameters"] == said["model"]["moving"] == sum(p.numel() for p in trainer.model.parameters())
    assert any("prefdyn lens RUN/checkpoint-*" in note for note in said["notes"])
    assert any("what each of them does to itself" in note for note in said["notes"])
