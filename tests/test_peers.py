"""Our methods against the field's trainer library (TRL), where it is installed: loss and gradient of the same batch.

The library's number and gradient come from its own trainer's `compute_loss` on a batch of its own loader; ours from
the log-probs of that batch. What differs by design is declared beside each case as a change of our loss or settings, in
words and in code; bounds are never loosened for it, and undeclared it would be seen.

`PREFDYN_WRITE=1 pytest -n 0 tests/test_peers.py` writes data/peers.csv. Its columns: loss, relative to the larger of 1
and the loss; gradient, relative to its norm; residual, the share of the library's gradient that no weights of tokens
make. Each is a bound that holds: 1e-10 where the trainer can be run in float64, 1e-05 where it insists on float32.
"""

import csv
import functools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from prefdyn.lab.policy import word_tokenizer
from prefdyn.lens import alignment
from prefdyn.lens.batch import Batch, concatenate
from prefdyn.lens.likelihood import response_columns, response_logits, token_logps
from prefdyn.lens.losses import from_loss, logit_contributions
from prefdyn.methods import registry
from prefdyn.methods.base import PairObjective, Pairs
from prefdyn.methods.rollout import Rollouts, kl_estimate
from prefdyn.methods.sft import sft_weights
from toys.models import build, lift_float32, random_batch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="the trainer library is not installed")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

TABLE = Path(__file__).resolve().parents[1] / "data" / "peers.csv"
COLUMNS = ("method", "library", "version", "loss", "gradient", "residual", "differs by declaration")
FLOAT64, FLOAT32 = 1e-10, 1e-5  # trainers of whole logits; those with a fused output layer, which is in float32, others
TOKENIZER = word_tokenizer([f"w{i}" for i in range(36)])
PAIRS, GROUP, LONGEST = 6, 4, 6
RETURNS = [3.0, 1.0, 5.0, 4.0, 0.0, 2.0, 7.0, 4.0, 6.0, 2.0, 2.0, 3.0]  # of 3 prompts; no group of equals


# What both sides see


def words(rng: random.Random, most: int) -> str:
    return " ".join(f"w{rng.randrange(36)}" for _ in range(rng.randint(1, most)))


def preferences() -> list[dict[str, str]]:
    """Prompts with a chosen and a rejected response, random words of different numbers."""
    rng = random.Random(5)
    return [
        {"prompt": words(rng, 4), "chosen": " " + words(rng, 6), "rejected": " " + words(rng, 6)} for _ in range(PAIRS)
    ]


def judged() -> list[dict]:
    """The same responses one by one, each desirable or not."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": label}
        for side, label in sides
        for pair in preferences()
    ]


def demonstrations() -> list[dict[str, str]]:
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences()]


def policy(seed: int) -> torch.nn.Module:
    ids = {"pad_token_id": None, "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": None}
    return build("gpt_neox", seed, vocab_size=len(TOKENIZER), **ids)


# Batches of the library as ours


def joint(batch: dict) -> Batch:
    """Rows whose responses a mask tells: of the trainers of pairs, of single responses and of demonstrations."""
    response = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"].bool()
    return Batch(batch["input_ids"], batch["attention_mask"].bool(), response)


def sided(batch: dict) -> Batch:
    """Rows of the trainers that hold chosen and rejected responses apart."""

    def side(name: str) -> Batch:
        ids, attention, labels = (batch[f"{name}_{what}"] for what in ("input_ids", "attention_mask", "labels"))
        return Batch(ids, attention.bool(), labels != -100)

    return concatenate([side("chosen"), side("rejected")])


def by_label(batch: dict) -> Batch:
    """Rows of single responses, the desirable ones first."""
    order = torch.as_tensor(batch["label"]).bool()
    return joint(batch).take(torch.cat([order.nonzero().flatten(), (~order).nonzero().flatten()]))


def mismatched(batch: dict) -> Batch:
    """Rows of prompts with other prompts' responses."""
    ids, attention, response = (batch[f"KL_{what}"] for what in ("input_ids", "attention_mask", "completion_mask"))
    return Batch(ids, attention.bool(), response.bool())


def replied(batch: dict) -> Batch:
    """Prompts, padded on the left, and the replies to them."""
    prompts, replies = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return Batch(ids, torch.cat([prompts, replies], 1), torch.cat([torch.zeros_like(prompts), replies], 1))


def everything(batch: Batch) -> Batch:
    """The same rows with every token that is predicted as response: some losses count those of prompts."""
    first = batch.attention.cumsum(-1) == 1
    return replace(batch, response=batch.attention & ~first)


# Declared differences: our loss as the library has it


@dataclass(frozen=True)
class Seen:
    """What a declaration may read: our pairs, the log-probs of every token of their rows, our loss and its alpha."""

    pairs: Pairs
    logps: torch.Tensor
    loss: Callable[..., torch.Tensor]
    alpha: float


def as_it_is(seen: Seen) -> torch.Tensor:
    return seen.loss(seen.pairs).mean()


def a_token(seen: Seen) -> torch.Tensor:
    """With log-ratios divided by the lengths of their responses."""
    pairs, (chosen, rejected) = seen.pairs, seen.pairs.lengths()
    shorter = replace(
        pairs,
        chosen=pairs.chosen / chosen[:, None],
        rejected=pairs.rejected / rejected[:, None],
        ref_chosen=pairs.ref_chosen / chosen,
        ref_rejected=pairs.ref_rejected / rejected,
    )
    return seen.loss(shorter).mean()


def without_reference(seen: Seen) -> torch.Tensor:
    zero = torch.zeros_like(seen.pairs.ref_chosen)
    return seen.loss(replace(seen.pairs, ref_chosen=zero, ref_rejected=zero)).mean()


def over_the_batch(seen: Seen) -> torch.Tensor:
    """The likelihood term as a mean over the chosen tokens of the batch, not over pairs of means over tokens."""
    chosen, lengths = seen.pairs.sums()[0], seen.pairs.lengths()[0]
    return as_it_is(seen) + seen.alpha * ((chosen / lengths).mean() - chosen.sum() / lengths.sum())


def summed_to_mean(seen: Seen) -> torch.Tensor:
    """The same of a likelihood term that we sum over responses."""
    chosen, lengths = seen.pairs.sums()[0], seen.pairs.lengths()[0]
    return as_it_is(seen) + seen.alpha * (chosen.mean() - chosen.sum() / lengths.sum())


def with_prompts(seen: Seen) -> torch.Tensor:
    """The likelihood term as a mean over all tokens of the chosen rows of the batch, those of prompts included."""
    chosen, lengths = seen.pairs.sums()[0], seen.pairs.lengths()[0]
    rows = seen.logps[: len(chosen)]
    return as_it_is(seen) + (chosen / lengths).mean() - rows[rows != 0].mean()


@dataclass(frozen=True)
class Case:
    """One of our methods of pairs, a trainer and its configuration, and what differs by declaration."""

    method: str
    trainer: str
    config: dict
    settings: dict = field(default_factory=dict)
    change: Callable[[Seen], torch.Tensor] = as_it_is
    declared: str = ""
    reads: Callable[[dict], Batch] = joint

    def __str__(self) -> str:
        return f"{self.method}, {self.trainer} {self.config}"


EXPERIMENTAL = {
    "CPO": "trl.experimental.cpo",
    "ORPO": "trl.experimental.orpo",
    "OnlineDPO": "trl.experimental.online_dpo",
}
CASES = (
    Case("dpo", "DPO", {"loss_type": ["sigmoid"], "beta": 0.3}, {"beta": 0.3}),
    Case(
        "ipo",
        "DPO",
        {"loss_type": ["ipo"], "beta": 0.3},
        {"beta": 0.3},
        a_token,
        "log-ratios are means over tokens there, sums here",
    ),
    Case("slic", "DPO", {"loss_type": ["hinge"], "beta": 5.0}, {"beta": 5.0, "delta": 1.0}),
    Case(
        "robust_dpo",
        "DPO",
        {"loss_type": ["robust"], "label_smoothing": 0.2, "beta": 0.3},
        {"beta": 0.3, "epsilon": 0.2},
    ),
    Case(
        "smoothed_dpo",
        "CPO",
        {"loss_type": "sigmoid", "label_smoothing": 0.2, "cpo_alpha": 0.0, "beta": 0.3},
        {"beta": 0.3, "epsilon": 0.2},
        without_reference,
        "no reference there; its trainer with one has no smoothed labels",
        sided,
    ),
    Case("apo_zero", "DPO", {"loss_type": ["apo_zero"], "beta": 0.3}, {"beta": 0.3}),
    Case("normalised_dpo", "DPO", {"loss_type": ["sigmoid_norm"], "beta": 2.0}, {"beta": 2.0}),
    Case(
        "rpo",
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.3},
        {"beta": 0.3, "alpha": 0.7},
        over_the_batch,
        "likelihood term: mean over the chosen tokens of the batch there, over pairs of means here",
    ),
    Case(
        "cpo",
        "CPO",
        {"loss_type": "sigmoid", "cpo_alpha": 0.7, "beta": 0.3},
        {"beta": 0.3, "alpha": 0.7},
        summed_to_mean,
        "likelihood term: mean over the chosen tokens of the batch there, over pairs of sums here",
        sided,
    ),
    Case(
        "simpo",
        "CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
        {"beta": 2.0, "gamma": 0.5},
        reads=sided,
    ),
    Case(
        "orpo",
        "ORPO",
        {"beta": 0.3},
        {"beta": 0.3},
        with_prompts,
        "likelihood term: mean over all tokens of the chosen rows there, prompts too; over pairs of means here",
        sided,
    ),
    Case(
        "kto",
        "KTO",
        {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7},
        {"beta": 0.3, "desirable": 1.2, "undesirable": 0.7},
        declared="divergence: a row for each response there, for each pair here",
        reads=by_label,
    ),
)


# The library's side


def config(name: str, path: Path, **settings):
    """A configuration that does nothing beside the loss: on the CPU, whole numbers, no files."""
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    module = import_module(EXPERIMENTAL.get(name, "trl"))
    return getattr(module, f"{name}Config")(output_dir=str(path), **plain, **settings)


def trainer_of(
    name: str, model, path: Path, rows: list[dict], reference=None, size: int = PAIRS, settings=None, **more
):
    """A trainer of the library, made as its users make it."""
    args = config(name, path, per_device_train_batch_size=size, **(settings or {}))
    if reference is not None:
        more["ref_model"] = reference
    kind = getattr(import_module(EXPERIMENTAL.get(name, "trl")), f"{name}Trainer")
    data = datasets.Dataset.from_list(rows)
    return kind(model=model, args=args, train_dataset=data, processing_class=TOKENIZER, **more)


def first_batch(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def slope(value: torch.Tensor, model) -> torch.Tensor:
    """The gradient with respect to all parameters, in one vector."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def theirs(trainer, batch: dict) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the trainer's own method."""
    trainer.model.eval()
    value = trainer.compute_loss(trainer.model, batch)
    return value.item(), slope(value, trainer.model)


# Our side, and what is compared


def ours(model, batch: Batch, loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Loss, and minus the gradient that its token weights make: the sum of w grad log pi."""
    logps = token_logps(model, batch)
    w = from_loss(loss, logps, batch.response).w
    return loss(logps.detach()).item(), -slope((w * logps).sum(), model)


def residual(gradient: torch.Tensor, model, batch: Batch) -> float:
    """What of a gradient no weights of tokens explain: its distance from the span of the tokens' own, relative."""
    logps = token_logps(model, batch)[batch.response]
    own = torch.stack([slope(logp, model) for logp in logps], 1)
    assert own.shape[0] > 20 * own.shape[1]  # otherwise they would span everything
    best = torch.linalg.lstsq(own, gradient[:, None], driver="gelsd").solution
    return ((own @ best).squeeze(1) - gradient).norm().item() / gradient.norm().item()


def bounded(value: float | str, bound: float) -> str:
    """The bound that a number is below: coarse, so that it is the same on any machine. Words as they are."""
    return value if isinstance(value, str) else f"{bound:.0e}" if value < bound else "more"


def row(method: str, library: str, loss="", gradient="", left="", declared: str = "") -> dict[str, str]:
    bound = FLOAT64 if library.startswith(("CPO", "ORPO")) else FLOAT32
    numbers = (bounded(each, bound) for each in (loss, gradient, left))
    return dict(zip(COLUMNS, (method, library, trl.__version__, *numbers, declared or "nothing"), strict=True))


def compared(method: str, library: str, model, batch: Batch, their, our, declared: str = "") -> dict[str, str]:
    """A row of the table: differences relative to the larger of 1 and the loss, and to the gradient's norm."""
    loss = abs(their[0] - our[0]) / max(1.0, abs(their[0]))
    gradient = (their[1] - our[1]).norm().item() / their[1].norm().item()
    return row(method, library, loss, gradient, residual(their[1], model, batch), declared)


def said(name: str, settings: dict) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"{name}Trainer, {listed}" if listed else f"{name}Trainer"


def sides(logps: torch.Tensor, batch: Batch, references: torch.Tensor, kl: torch.Tensor | None) -> Pairs:
    inside = logps.masked_fill(~batch.response, 0.0)
    return Pairs(*inside.chunk(2), *batch.response.chunk(2), *references.chunk(2), kl)


def same_weights_as_its_objective(case: Case, batch: Batch, pairs: Pairs, logps: torch.Tensor) -> None:
    """Where nothing is declared, the weights that runs train with are those compared here."""
    method, index = registry.find(case.method), torch.arange(PAIRS)
    blocks = (batch.take(index), batch.take(index + PAIRS), pairs.ref_chosen, pairs.ref_rejected)
    make = method.objective or functools.partial(PairObjective, method)
    found = make(*blocks, **case.settings).weights(logps, batch, index).w
    own = from_loss(
        lambda x: method.loss(sides(x, batch, torch.cat(blocks[2:]), None), **case.settings).mean(),
        logps,
        batch.response,
    )
    assert torch.allclose(found, own.w, atol=1e-14)


def pair_row(case: Case, path: Path) -> dict[str, str]:
    """A method of pairs against its trainer."""
    model, reference, method = policy(0), policy(1), registry.find(case.method)
    rows, size = (judged(), 2 * PAIRS) if case.trainer == "KTO" else (preferences(), PAIRS)
    given = reference if case.trainer in ("DPO", "KTO") else None
    trainer = trainer_of(case.trainer, model, path, rows, given, size, case.config)
    found = first_batch(trainer)
    batch = case.reads(found)
    with torch.no_grad():
        references, kl = token_logps(reference, batch).sum(-1), None
        if method.kl:
            now, then = (token_logps(each, mismatched(found)).sum(-1) for each in (model, reference))
            kl = (now - then).mean().clamp(min=0)

    def loss(logps: torch.Tensor) -> torch.Tensor:
        pairs = sides(logps, batch, references, kl)
        alpha = case.settings.get("alpha", 0.0)
        return case.change(Seen(pairs, logps, functools.partial(method.loss, **case.settings), alpha))

    assert kl is None or kl > 0
    if case.change is as_it_is and not method.kl:
        logps = token_logps(model, batch).detach()
        same_weights_as_its_objective(case, batch, sides(logps, batch, references, kl), logps)
    their, our = theirs(trainer, found), ours(model, everything(batch), loss)
    span = everything(batch) if case.change is with_prompts else batch
    return compared(case.method, said(case.trainer, case.config), model, span, their, our, case.declared)


# Demonstrations and fresh replies


def sft_row(path: Path) -> dict[str, str]:
    """Maximum likelihood on demonstrations; ours has weights and no loss of pairs."""
    model = policy(0)
    trainer = trainer_of("SFT", model, path, demonstrations())
    found = first_batch(trainer)
    batch = joint(found)
    scale = len(batch) / batch.response.sum()
    their, logps = theirs(trainer, found), token_logps(model, batch)
    w = sft_weights(batch.response).w
    our = (-scale * logps.sum(-1).mean()).item(), -scale * slope((w * logps).sum(), model)
    declared = "mean over all tokens of the batch there, mean over demonstrations of sums here: one factor"
    return compared("sft", "SFTTrainer", model, batch, their, our, declared)


def rewards(completions: list, **others) -> list[float]:
    """A reward that is known beforehand, whatever was said."""
    return RETURNS[: len(completions)]


def replies_of(trainer) -> dict:
    """Replies that a trainer has sampled and judged, as it reads them; some are cut short, so that lengths differ."""
    trainer.model.eval()
    torch.manual_seed(0)
    asked = [{"prompt": pair["prompt"]} for pair in preferences()[: len(RETURNS) // GROUP]]
    found = trainer._prepare_inputs([row for row in asked for _ in range(GROUP)])
    most = 1 + torch.arange(len(RETURNS)) % LONGEST
    mask = found["completion_mask"] * (torch.arange(found["completion_mask"].shape[1]) < most[:, None])
    return found | {"completion_mask": mask, "num_items_in_batch": mask.sum()}


def fresh_trainer(name: str, model, path: Path, **settings):
    more = {"num_generations": GROUP, "max_completion_length": LONGEST, "per_device_eval_batch_size": len(RETURNS)}
    asked = [{"prompt": pair["prompt"]} for pair in preferences()]
    settings = more | settings
    return trainer_of(name, model, path, asked, size=len(RETURNS), settings=settings, reward_funcs=rewards)


def rollouts_of(batch: Batch, old: torch.Tensor) -> Rollouts:
    return Rollouts(batch, old, old, torch.tensor(RETURNS), GROUP, 1.0, LONGEST)


def by_their_spread(objective, rollouts: Rollouts) -> None:
    """Divide by the spread over k - 1 and 1e-4 where we have that over k and 1e-6."""
    returns = rollouts.grouped()
    ratio = (returns.std(-1, unbiased=False) + 1e-6) / (returns.std(-1) + 1e-4)
    objective.advantages = objective.advantages * ratio.repeat_interleave(GROUP)[:, None]


SPREAD = "spread of a group over k - 1, and 1e-4, there; over k, and 1e-6, here"


@dataclass(frozen=True)
class Fresh:
    """One of our methods of fresh replies, the configuration of GRPOTrainer, and what differs by declaration."""

    method: str
    config: dict
    settings: dict
    spread: bool = True
    declared: str = SPREAD
    penalty: float = 0.0
    corrected: bool = False  # whether the penalty is multiplied by the ratio

    def __str__(self) -> str:
        return f"{self.method}, {self.config}"


FRESH = (
    Fresh("grpo", {"loss_type": "grpo", "epsilon": 0.2}, {"clip": 0.2}),
    Fresh(
        "grpo",
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.3, "use_bias_correction_kl": False},
        {"clip": 0.2},
        declared=f"{SPREAD}; penalty (k3) in the loss there, in the return here: added to our loss",
        penalty=0.3,
    ),
    Fresh(
        "grpo",
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.3, "use_bias_correction_kl": True},
        {"clip": 0.2},
        declared=f"{SPREAD}; penalty (k3) times the ratio in the loss there, in the return here: added to our loss",
        penalty=0.3,
        corrected=True,
    ),
    Fresh("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.2}, {"clip": 0.2}, False, ""),
    Fresh(
        "dapo",
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        {"low": 0.2, "high": 0.28},
        declared=f"{SPREAD}; tokens of groups of equals count there, not here: there are none in the batch",
    ),
)


def moved(logps: torch.Tensor, response: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    """Log-probs of a policy near by."""
    noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed))
    return (logps.detach() + size * noise) * response


def surrogate(case: Fresh, batch: Batch, old: torch.Tensor, reference: torch.Tensor) -> Callable:
    """Our clipped surrogate with what the case declares, a function of log-probs."""
    rollouts, index = rollouts_of(batch, old), torch.arange(len(batch))
    objective = registry.find(case.method).rollouts(rollouts, **case.settings)
    if case.spread:
        by_their_spread(objective, rollouts)

    def loss(logps: torch.Tensor) -> torch.Tensor:
        each = kl_estimate(logps, reference, "k3") * ((logps - old).exp() if case.corrected else 1.0)
        penalty = (each.sum(-1) / batch.response.sum(-1)).mean()
        return objective.loss(logps, batch.response, index) + case.penalty * penalty

    if not case.penalty:
        logps = old + moved(old, batch.response, 0.3, 9)
        own = from_loss(loss, logps, batch.response).w
        assert torch.allclose(objective.weights(logps, batch, index).w, own, atol=1e-14)
    return loss


def away_from_sampling(model, found: dict) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Our batch of a trainer's, with log-probs when sampled and of a reference, so that tokens leave the clip."""
    batch = replied(found)
    now, columns = token_logps(model, batch), slice(found["prompt_ids"].shape[1], None)
    old, reference = (moved(now, batch.response, 0.3, seed) for seed in (3, 4))
    found |= {"old_per_token_logps": old[:, columns], "ref_per_token_logps": reference[:, columns]}
    ratio = (now.detach() - old).exp()[batch.response]
    assert 0.05 < ((ratio - 1).abs() > 0.28).double().mean() < 0.95
    return batch, old, reference


def fresh_row(case: Fresh, path: Path) -> dict[str, str]:
    """A method of fresh replies against GRPOTrainer, on replies that it sampled and judged itself."""
    model = policy(0)
    model.save_pretrained(path / "policy")  # where the library would load a reference
    model.config._name_or_path = str(path / "policy")
    trainer = fresh_trainer("GRPO", model, path, **case.config)
    found = replies_of(trainer)
    batch, old, reference = away_from_sampling(model, found)
    their = theirs(trainer, found)
    our = ours(model, batch, surrogate(case, batch, old, reference))
    return compared(case.method, said("GRPO", case.config), model, batch, their, our, case.declared)


def rloo_row(path: Path) -> dict[str, str]:
    """Where the policy is the one that sampled: ratios are of whole replies there, of tokens here."""
    model = policy(0)
    trainer = fresh_trainer("RLOO", model, path, beta=0.0)
    found = replies_of(trainer)
    batch = replied(found)
    old = token_logps(model, batch).detach()
    objective = registry.find("rloo").rollouts(rollouts_of(batch, old), clip=0.2)
    found |= {"old_logps": old.sum(-1)}
    index, (_, gradient) = torch.arange(len(batch)), theirs(trainer, found)
    _, our = ours(model, batch, lambda logps: LONGEST * objective.loss(logps, batch.response, index))
    difference = ((gradient - our).norm() / gradient.norm()).item()
    declared = (
        "ratios of whole replies, not divided by the longest length, there; of tokens here: the same gradient, times "
        "that length, where the ratio is 1, and a loss that says nothing"
    )
    left = residual(gradient, model, batch)
    return row("rloo", "RLOOTrainer, beta=0.0", "not compared", difference, left, declared)


def online_dpo_row(path: Path, monkeypatch) -> dict[str, str]:
    """A training step of the library: it samples, judges and calls backward in one go, on replies we listen to."""
    model, reference = policy(0), policy(1)
    settings = {"max_new_tokens": LONGEST, "beta": 0.3, "max_length": 32, "missing_eos_penalty": None}
    asked = [{"prompt": pair["prompt"]} for pair in preferences()]
    trainer = trainer_of("OnlineDPO", model, path, asked, reference, settings=settings, reward_funcs=rewards)
    heard, generate = {}, trainer._generate

    def listen(*args, **kwargs):
        found = generate(*args, **kwargs)
        heard.update(zip(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), found, strict=False))
        return found

    monkeypatch.setattr(trainer, "_generate", listen)
    torch.manual_seed(0)
    model.zero_grad()
    loss = trainer.training_step(model, {"prompt": [each["prompt"] for each in asked]}).item()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    apart = torch.arange(2 * PAIRS).reshape(2, PAIRS).T.flatten()  # theirs: first replies, then second ones
    batch = replied(heard).take(apart)
    ref = token_logps(reference, batch).detach()
    whole = Rollouts(batch, ref, ref, torch.tensor(RETURNS)[apart], 2, 1.0, LONGEST)
    objective, index = registry.find("online_dpo").rollouts(whole, beta=0.3), torch.arange(PAIRS)
    rows = objective.batch(index)
    logps = token_logps(model, rows)
    w = objective.weights(logps.detach(), rows, index).w
    our = objective.metrics(logps.detach(), rows, index)["loss"], -slope((w * logps).sum(), model)
    assert objective.size == PAIRS
    declared = "pairs of equals count there, not here: there are none in the batch"
    return compared("online_dpo", said("OnlineDPO", {"beta": 0.3}), model, rows, (loss, gradient), our, declared)


# A loss that reads whole distributions


def with_bonus(loss: Callable, coefficient: float) -> Callable:
    """A loss of log-probs less the mean entropy of the tokens, as one of logits, of all rows at once."""

    def whole(logits: torch.Tensor, rows: Batch, columns: torch.Tensor) -> torch.Tensor:
        logp = logits.log_softmax(-1)
        picked = logp.gather(-1, rows.ids[:, columns, None]).squeeze(-1) * rows.response[:, columns]
        entropy = -(logp.exp() * logp).sum(-1) * rows.response[:, columns]
        logps = picked.new_zeros(rows.ids.shape).index_copy(1, columns, picked)
        return loss(logps) - coefficient * entropy.sum() / rows.response.sum()

    return whole


def bonus_row(path: Path) -> dict[str, str]:
    """GRPO with an entropy bonus is no weighted sum of tokens, and is measured from logits all the same."""
    model, case = policy(0), FRESH[0]
    settings = case.config | {"entropy_coef": 0.5}
    trainer = fresh_trainer("GRPO", model, path, **settings)
    found = replies_of(trainer)
    batch, old, reference = away_from_sampling(model, found)
    loss, gradient = theirs(trainer, found)
    whole = with_bonus(surrogate(case, batch, old, reference), 0.5)
    left = residual(gradient, model, batch)
    assert left > 0.01
    logits, columns = response_logits(model, batch)
    value = whole(logits, batch, columns)
    direction = alignment.target_direction(model, random_batch(3, 7))
    expected = -(gradient * torch.cat([direction[name].flatten() for name, _ in model.named_parameters()])).sum()
    measured = logit_contributions(model, batch, direction, whole).sum()
    assert measured.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(columns, response_columns(batch))
    declared = f"{SPREAD}; entropy bonus added to ours: no weights of tokens, but contributions of logits add up"
    our = value.item(), slope(value, model)
    return compared("grpo", said("GRPO", settings), model, batch, (loss, gradient), our, declared)


# The table

ABSENT = {
    "reinforce": ("no counterpart", "no trainer with the mean of all replies as the baseline"),
    "ppo": ("no counterpart", "its trainer is gone from this version"),
    "best_of_n": ("no counterpart", "no trainer of the best of several replies"),
}
OTHERS = {"sft": sft_row, "rloo": rloo_row, "online_dpo": online_dpo_row, "entropy bonus": bonus_row}


def absent_rows() -> list[dict[str, str]]:
    """Methods that the library has no trainer of, said as such."""
    return [row(name, *(what, "", "", ""), declared=why) for name, (what, why) in ABSENT.items()]


@pytest.fixture(scope="module")
def table():
    """Rows as the tests find them; written at the end if asked and all are there."""
    rows: dict[str, dict[str, str]] = {}
    yield rows
    if os.environ.get("PREFDYN_WRITE") and len(rows) == len(CASES) + len(FRESH) + len(OTHERS):
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                sorted([*rows.values(), *absent_rows()], key=lambda each: (each["method"], each["library"]))
            )


def settle(table: dict, found: dict[str, str], residual_small: bool = True) -> None:
    """A row is as good as it must be, and is what the table says, of whatever version that was made with."""
    table[found["library"] + found["method"]] = found
    assert found["loss"] != "more" != found["gradient"] and (found["residual"] != "more") == residual_small, found
    if not os.environ.get("PREFDYN_WRITE"):
        with TABLE.open(newline="", encoding="utf-8") as file:
            known = [each | {"version": found["version"]} for each in csv.DictReader(file)]
        assert found in known, "PREFDYN_WRITE=1 pytest -n 0 tests/test_peers.py writes it"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_method_of_pairs_is_that_of_the_library(case, table, double, monkeypatch, tmp_path):
    if case.trainer in EXPERIMENTAL:  # others have an output layer that insists on float32
        lift_float32(monkeypatch)
    settle(table, pair_row(case, tmp_path))


@pytest.mark.parametrize("case", [case for case in CASES if case.change is not as_it_is], ids=str)
def test_what_is_declared_of_pairs_would_be_seen(case, double, tmp_path):
    found = pair_row(replace(case, change=as_it_is), tmp_path)
    assert found["gradient"] == "more"


@pytest.mark.parametrize("case", FRESH, ids=str)
def test_a_method_of_fresh_replies_is_that_of_the_library(case, table, double, tmp_path):
    settle(table, fresh_row(case, tmp_path))


@pytest.mark.parametrize("case", [case for case in FRESH if case.spread], ids=str)
def test_what_is_declared_of_fresh_replies_would_be_seen(case, double, tmp_path):
    assert fresh_row(replace(case, spread=False), tmp_path)["gradient"] == "more"


def test_maximum_likelihood_is_that_of_the_library(table, double, tmp_path):
    settle(table, sft_row(tmp_path))


def test_leave_one_out_is_that_of_the_library_where_the_policy_sampled(table, double, tmp_path):
    settle(table, rloo_row(tmp_path))


def test_online_pairs_are_those_of_the_library(table, double, monkeypatch, tmp_path):
    settle(table, online_dpo_row(tmp_path, monkeypatch))


def test_an_entropy_bonus_is_no_weighted_sum_of_tokens(table, double, tmp_path):
    settle(table, bonus_row(tmp_path), residual_small=False)


def test_every_method_is_in_the_table():
    """Compared, or said not to be."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert {each["method"] for each in listed} == set(registry.names())
    assert [each | {"version": ""} for each in absent_rows()] == [
        each | {"version": ""} for name in ABSENT for each in listed if each["method"] == name
    ]
    compared_here = {case.method for case in (*CASES, *FRESH)} | {"sft", "rloo", "online_dpo"}
    assert compared_here | set(ABSENT) == set(registry.names()) and not compared_here & set(ABSENT)
