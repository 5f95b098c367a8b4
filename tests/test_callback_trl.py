"""The lens while the field's trainers train: their own loss, measured by the callback and by the offline route."""

import json
import os
from pathlib import Path

import pytest
import torch
from prefdyn.lab.policy import word_tokenizer
from prefdyn.lens import alignment, probing
from prefdyn.lens.batch import Batch
from prefdyn.lens.callback import LensCallback
from prefdyn.lens.likelihood import token_logps
from prefdyn.lens.losses import from_loss
from prefdyn.methods import dpo, kto
from prefdyn.methods.base import Pairs
from prefdyn.methods.surrogate import Surrogate
from toys.models import build

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="the trainer library is not installed")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

TOKENIZER = word_tokenizer([f"w{i}" for i in range(36)])
PAIRS, GROUP, LONGEST = 4, 2, 5


def words(seed: int, count: int) -> str:
    return " ".join(
        f"w{i}" for i in torch.randint(36, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


def preferences(count: int = PAIRS) -> list[dict[str, str]]:
    """Prompts with a chosen and a rejected response, of different lengths."""
    return [
        {
            "prompt": words(i, 1 + i % 3),
            "chosen": " " + words(50 + i, 2 + i % 4),
            "rejected": " " + words(90 + i, 5 - i % 4),
        }
        for i in range(count)
    ]


def judged() -> list[dict]:
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": label}
        for side, label in sides
        for pair in preferences()
    ]


def demonstrations() -> list[dict]:
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences()]


def policy(seed: int = 0, **more):
    ids = {"pad_token_id": None, "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": None}
    return build("gpt_neox", seed, vocab_size=len(TOKENIZER), **ids | more)


def reward(completions: list, **others) -> list[float]:
    return [float(len(set(text.split()))) + 0.1 * i for i, text in enumerate(completions)]


def trainer_of(name: str, path: Path, rows: list[dict], model=None, size: int = PAIRS, steps: int = 2, **settings):
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    plain |= {"save_strategy": "no", "max_steps": steps, "learning_rate": 1e-2, "per_device_train_batch_size": size}
    more = {"ref_model": policy(1)} if name in ("DPO", "KTO") and "peft_config" not in settings else {}
    if name == "GRPO":
        more = {"reward_funcs": reward}
        plain |= {"num_generations": GROUP, "max_completion_length": LONGEST, "per_device_eval_batch_size": size}
    if "peft_config" in settings:
        more["peft_config"] = settings.pop("peft_config")
    args = getattr(trl, f"{name}Config")(output_dir=str(path / "run"), **plain | settings)
    data = datasets.Dataset.from_list(rows)
    kind = getattr(trl, f"{name}Trainer")
    return kind(model=model or policy(), args=args, train_dataset=data, processing_class=TOKENIZER, **more)


def lens(trainer, path: Path, **settings) -> LensCallback:
    made = LensCallback(trainer, report=path / "lens", **settings)
    trainer.add_callback(made)
    return made


def table(path: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (path / "lens" / f"{name}.jsonl").read_text().splitlines()]


def about(path: Path) -> dict:
    return json.loads((path / "lens" / "about.json").read_text())


def measured(path: Path, step: int) -> dict[str, dict]:
    return {row["component"]: row for row in table(path, "alignment") if row["step"] == step}


def same_as(found: dict[str, dict], w: torch.Tensor, a: torch.Tensor) -> None:
    """G, and its positive and negative part, to 1e-4 of what they are or of the sum of sizes."""
    size = (w * a).abs().sum().item()
    for name, part in (("full", w), ("positive", w.clamp(min=0)), ("negative", w.clamp(max=0))):
        assert found[name]["g"] == pytest.approx((part * a).sum().item(), rel=1e-4, abs=1e-5 * size), name
        assert found[name]["weight"] == pytest.approx(part.abs().sum().item(), rel=1e-4)


def of_mask(inputs: dict) -> Batch:
    return Batch(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool())


def test_dpo_is_that_of_the_offline_route(tmp_path):
    trainer = trainer_of("DPO", tmp_path, preferences(), beta=0.3)
    made = lens(trainer, tmp_path)
    ((_, inputs),) = made._data.batches
    trainer.train()
    model, batch = trainer.model, of_mask(inputs)
    d = alignment.target_direction(model, batch.take(torch.arange(PAIRS)))
    logps, a = alignment.token_scores(model, batch, d)
    with torch.no_grad():
        references = token_logps(trainer.ref_model, batch).sum(-1)
    margin = dpo.dpo_margin(*logps.sum(-1).chunk(2), *references.chunk(2))
    omega = dpo.dpo_omega(margin, 0.3)
    weights = dpo.dpo_weights(batch.response, omega, 0.3)
    found = measured(tmp_path, 2)
    same_as(found, weights.w, a)
    for third in ("top", "middle", "bottom"):
        expected = alignment.by_sequence(weights, a, third).sum().item()
        assert found[third]["g"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    rows = [row for row in table(tmp_path, "sequences") if row["step"] == 2]
    assert [row["omega"] for row in rows] == pytest.approx(omega.tolist(), rel=1e-4)
    assert [row["margin"] for row in rows] == pytest.approx(margin.tolist(), rel=1e-3, abs=1e-4)
    chosen, rejected = a.sum(-1).chunk(2)
    assert [row["a_chosen"] for row in rows] == pytest.approx(chosen.tolist(), rel=1e-3, abs=1e-4)
    assert [row["a_rejected"] for row in rows] == pytest.approx(rejected.tolist(), rel=1e-3, abs=1e-4)
    assert {row["kind"] for row in table(tmp_path, "likelihood")} == {"target", "chosen", "rejected"}
    begin = measured(tmp_path, 0)
    assert begin["full"]["g"] is not None
    assert about(tmp_path)["method"]["settings"]["beta"] == 0.3 and about(tmp_path)["method"]["loss"] == "sigmoid"


def test_kto_is_that_of_the_offline_route(tmp_path):
    trainer = trainer_of(
        "KTO", tmp_path, judged(), size=2 * PAIRS, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7
    )
    made = lens(trainer, tmp_path)
    ((_, inputs),) = made._data.batches
    trainer.train()
    model, label = trainer.model, torch.as_tensor(inputs["label"]).bool()
    batch = of_mask(inputs).take(torch.cat([label.nonzero().flatten(), (~label).nonzero().flatten()]))
    others = Batch(inputs["KL_input_ids"], inputs["KL_attention_mask"].bool(), inputs["KL_completion_mask"].bool())
    d = alignment.target_direction(model, batch.take(torch.arange(PAIRS)))
    logps, a = alignment.token_scores(model, batch, d)
    with torch.no_grad():
        references = token_logps(trainer.ref_model, batch).sum(-1)
        now, then = (token_logps(each, others).sum(-1) for each in (model, trainer.ref_model))
        kl = (now - then).mean().clamp(min=0)

    def loss(logps: torch.Tensor) -> torch.Tensor:
        pairs = Pairs(*logps.chunk(2), *batch.response.chunk(2), *references.chunk(2), kl)
        return kto.loss(pairs, beta=0.3, desirable=1.2, undesirable=0.7).mean()

    same_as(measured(tmp_path, 2), from_loss(loss, logps, batch.response).w, a)
    assert about(tmp_path)["targets"] == {
        "what": "chosen",
        "count": PAIRS,
        "sentence": "the desirable completions of the probe",
    }


def test_sft_is_that_of_the_offline_route_over_several_batches(tmp_path):
    trainer = trainer_of("SFT", tmp_path, demonstrations(), size=3)
    made = lens(trainer, tmp_path)
    batches = made._data.batches
    trainer.train()
    model, total, d = trainer.model, 0.0, alignment.target_direction(trainer.model, made._targets)
    assert [count for count, _ in batches] == [3, 1]
    for count, inputs in batches:
        batch = Batch(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["labels"] != -100)
        _, a = alignment.token_scores(model, batch, d)
        total += count / PAIRS * a.sum().item() / batch.response.sum().item()
    found = measured(tmp_path, 2)
    assert found["full"]["g"] == pytest.approx(total, rel=1e-4)
    assert found["negative"]["g"] == 0 and found["full"]["n"] == PAIRS


TARGETS = [{"prompt": "w1 w2", "response": "w3 w4"}, {"prompt": "w5", "response": "w6"}]


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_grpo_is_that_of_the_offline_route_on_its_own_rollouts(architecture, tmp_path, monkeypatch):
    """Where positions are learned (gpt2), prompts that are padded on the left are read as the trainer places them."""
    ids = {"pad_token_id": None, "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": None}
    model = build(architecture, 0, vocab_size=len(TOKENIZER), **ids)
    rows = [{"prompt": pair["prompt"]} for pair in preferences()]
    settings = {"num_iterations": 2, "temperature": 4.0, "beta": 0.0, "learning_rate": 1e-3}  # far from certain
    trainer = trainer_of("GRPO", tmp_path, rows, model=model, size=6, **settings)
    made, kept = lens(trainer, tmp_path, targets=TARGETS, every=1), {}
    plain = probing.probed

    def also(trainer, layout, batches, direction, method):
        found = plain(trainer, layout, batches, direction, method)
        kept[trainer.state.global_step] = (batches[0][1], direction, found.ascent)
        return found

    monkeypatch.setattr(probing, "probed", also)
    trainer.train()
    assert not made.quiet and "compute_loss" not in vars(trainer)
    inputs, direction, ascent = kept[2]
    found = measured(tmp_path, 2)
    assert found["full"]["g"] == pytest.approx(alignment.inner(direction, ascent).item(), rel=1e-6)
    assert {row["kind"] for row in table(tmp_path, "likelihood")} == {"target", "sampled"}  # other ones every time
    whole = [row["full"] for row in table(tmp_path, "sequences") if row["step"] == 2]
    size = sum(map(abs, whole))
    assert size > 0 and sum(whole) == pytest.approx(found["full"]["g"], abs=1e-4 * size)
    assert measured(tmp_path, 0) == {}  # nothing was sampled yet
    assert (
        len({(row["example"], row["side"]) for row in table(tmp_path, "texts")}) == len(table(tmp_path, "texts")) == 12
    )
    if architecture == "gpt_neox":  # positions are relative, so that the lens may count them from the first token
        prompt, reply = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
        batch = Batch(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([prompt, reply], 1),
            torch.cat([torch.zeros_like(prompt), reply], 1),
        )
        d = alignment.target_direction(trainer.model, made._targets)
        logps, a = alignment.token_scores(trainer.model, batch, d, temperature=4.0)
        columns = slice(prompt.shape[1], None)
        old, advantages = torch.zeros_like(logps), torch.zeros_like(logps)
        sampled = inputs.get("old_per_token_logps")
        old[:, columns] = (logps[:, columns] if sampled is None else sampled) * reply
        advantages[:, columns] = inputs["advantages"][:, None] * reply
        objective = Surrogate(batch, old, advantages, low=0.2, high=0.2, temperature=4.0, per="reply", longest=LONGEST)
        w = objective.weights(logps, batch, torch.arange(len(batch))).w
        same_as(found, w, a)


def test_grpo_with_an_entropy_bonus_is_measured_at_the_logits(tmp_path):
    rows = [{"prompt": pair["prompt"]} for pair in preferences()]
    trainer = trainer_of("GRPO", tmp_path, rows, size=6, steps=1, entropy_coef=0.5)
    made = lens(trainer, tmp_path, targets=TARGETS)
    trainer.train()
    assert not made.quiet
    whole = [row["full"] for row in table(tmp_path, "sequences") if row["step"] == 1]
    assert sum(whole) == pytest.approx(measured(tmp_path, 1)["full"]["g"], abs=1e-4 * sum(map(abs, whole)))
    assert any("reads more of distributions" in note for note in about(tmp_path)["notes"])


def test_grpo_has_no_chosen_responses(tmp_path):
    rows = [{"prompt": pair["prompt"]} for pair in preferences()]
    with pytest.raises(ValueError, match=r"GRPOTrainer samples its responses.*'prompt'"):
        LensCallback(trainer_of("GRPO", tmp_path, rows, size=6))


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_training_is_the_same_bit_for_bit(name, tmp_path):
    """With dropout, sampling and the trainer's own averages over logging steps: weights and all that was logged."""

    def trained(path: Path, watched: bool):
        rows = {"DPO": preferences(6), "KTO": judged(), "GRPO": [{"prompt": p["prompt"]} for p in preferences()]}[name]
        settings = {"logging_steps": 2, "disable_dropout": False}
        settings |= {"gradient_accumulation_steps": 2} if name == "DPO" else {}
        torch.manual_seed(0)
        model = policy(attention_dropout=0.2, hidden_dropout=0.2)
        trainer = trainer_of(name, path, rows, model=model, size=4, steps=6, **settings)
        made = lens(trainer, path, every=3, **{"targets": TARGETS} if name == "GRPO" else {}) if watched else None
        trainer.train()
        assert made is None or not made.quiet
        clock = ("runtime", "per_second", "step_time")
        history = [
            {k: v for k, v in row.items() if not any(word in k for word in clock)}
            for row in trainer.state.log_history
            if "lens/g" not in row
        ]
        return dict(trainer.model.named_parameters()), json.dumps(history), torch.get_rng_state()

    one, other = (trained(tmp_path / place, place == "with") for place in ("without", "with"))
    assert all(torch.equal(p, other[0][name]) for name, p in one[0].items())
    assert one[1] == other[1] and torch.equal(one[2], other[2])
    assert len({row["step"] for row in table(tmp_path / "with", "likelihood")}) == 3


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_an_adapter_is_measured_over_what_it_trains(settings, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    trainer = trainer_of("DPO", tmp_path, preferences(), peft_config=adapter, beta=0.3, learning_rate=0.1, **settings)
    made = lens(trainer, tmp_path, every=1)
    trainer.train()
    assert not made.quiet
    said = about(tmp_path)["model"]
    assert said["adapter"] == "LORA" and 0 < said["moving"] < said["parameters"]
    assert {row["group"] for row in table(tmp_path, "groups")} == {"layer 0 attention", "layer 1 attention"}
    found, step = measured(tmp_path, 2), table(tmp_path, "steps")[-1]
    assert step["g"] != 0 and found["full"]["g"] > 0
    parts = found["positive"]["g"] + found["negative"]["g"]
    size = sum(abs(row["w"] * row["a"]) for row in table(tmp_path, "tokens") if row["step"] == 2)
    assert parts == pytest.approx(found["full"]["g"], abs=(5e-2 if settings else 1e-4) * size)


def test_bf16_is_measured_as_it_is_trained(tmp_path):
    trainer = trainer_of("DPO", tmp_path, preferences(), bf16=True, beta=0.3)
    made = lens(trainer, tmp_path)
    trainer.train()
    assert not made.quiet
    whole = [row["full"] for row in table(tmp_path, "sequences") if row["step"] == 2]
    assert sum(whole) == pytest.approx(measured(tmp_path, 2)["full"]["g"], abs=5e-2 * sum(map(abs, whole)))


def test_prompt_learning_is_refused_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    trainer = trainer_of("SFT", tmp_path, demonstrations(), peft_config=adapter)
    with pytest.raises(ValueError, match="virtual tokens"):
        LensCallback(trainer)
