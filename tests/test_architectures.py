"""Architectures of transformers, each saved, loaded and measured in every way: a table that is kept in data/.

PREFDYN_WRITE=1 writes the table; without it the test compares.
"""

import csv
import os
from pathlib import Path

import pytest
import torch
from prefdyn.book import plan
from prefdyn.book.params import ParameterError, Parameters, check
from prefdyn.lab import policy, ppo, recipes
from prefdyn.lab.runs import RunStore
from prefdyn.lab.worlds import EASY
from prefdyn.lens import alignment, likelihood
from prefdyn.lens.batch import Batch, pad
from toys.models import FAMILIES, UNSUITABLE, VOCAB, build, lift_float32
from transformers import AutoConfig

TABLE = Path(__file__).resolve().parents[1] / "data" / "architectures.csv"
COLUMNS = ("architecture", "class", "tied", "methods", "needs", "forward", "central", "heads")
END = 1  # the end of text, and the padding
WORDS = [f"w{i}" for i in range(VOCAB - 4)]


def batch(side: str = "right") -> Batch:
    """Rows of different lengths, longer than any window, with the padding token inside of prompts and as an end."""
    rng = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, VOCAB, (count,), generator=rng).tolist()

    prompts = [[*tokens(3), END, *tokens(2)], tokens(2), [END, *tokens(4)]]
    return pad(prompts, [[*tokens(3), END], [*tokens(5), END], [*tokens(2), END]], END, side)


def loaded(architecture: str, folder: Path):
    """A random model and its tokenizer, by way of a checkpoint."""
    tokenizer = policy.word_tokenizer(WORDS)
    tokenizer.pad_token = tokenizer.eos_token
    policy.save(build(architecture, pad_token_id=END, eos_token_id=END, bos_token_id=END), tokenizer, folder)
    return policy.load(str(folder))


def apart(model, method: str) -> float | None:
    """The largest difference to per-token backward, as a part of the largest score; None if the method fails."""
    direction = alignment.target_direction(model, batch())
    _, expected = alignment.token_scores(model, batch(), direction, "backward")
    try:
        scored = alignment.token_scores(model, batch(), direction, method)
    except RuntimeError:
        return None
    w = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape) * batch().response
    assert alignment.check("here", method, w, scored, alignment.gradient(model, [(batch(), w)]), direction) < 0.2
    return ((scored[1] - expected).abs().max() / expected.abs().max()).item()


def rounded(value: float | None, *bounds: float) -> str:
    """The first of the powers of ten `bounds` that `value` is below: coarse, so that it is the same on any machine."""
    return "" if value is None else next((f"{bound:.0e}" for bound in bounds if value < bound), "more")


def needs(model) -> str:
    """What measuring changes for as long as it lasts."""
    changes = {
        "plain attention": model.config._attn_implementation == "sdpa",
        "experts one by one": model.config._experts_implementation != "eager",
    }
    return "; ".join(what for what, needed in changes.items() if needed) or "nothing"


def padded_rows_are_as_if_alone(model) -> bool:
    """Padding on either side changes no log-prob."""
    whole = {
        side: likelihood.token_logps(model, batch(side)).detach()[batch(side).response] for side in ("right", "left")
    }
    rows = [batch().rows(slice(i, i + 1)) for i in range(len(batch()))]
    alone = torch.cat([likelihood.token_logps(model, row).detach()[row.response] for row in rows])
    return all((logps - alone).abs().max() < 1e-4 for logps in whole.values())


def replies_are_as_if_alone(model) -> bool:
    """Through the cache, which sees padding before shorter prompts."""
    prompts, limits = [[3], [5, 6, END, 8, 9], [9, 4]], {"max_response": 6, "ends": (END,), "pad_id": END}
    alone = [policy.generate(model, [prompt], **limits)[0] for prompt in prompts]
    return policy.generate(model, prompts, **limits) == alone


def heads_learn(model) -> bool:
    """A value model and a reward model start at zero, and their heads and bodies have gradients."""
    for bias, score in ((True, ppo.token_values), (False, ppo.sequence_scores)):
        headed = ppo.Headed(model, bias)
        if (score(headed, batch()) != 0).any():
            return False
        torch.nn.init.normal_(headed.head.weight)
        score(headed, batch()).sum().backward()
        words = headed.body.get_input_embeddings().weight
        if not all(grad.isfinite().all() and grad.any() for grad in (headed.head.weight.grad, words.grad[END])):
            return False
    return True


def measured(architecture: str, folder: Path, monkeypatch) -> dict[str, str]:
    """A row of the table; what must hold for every architecture is asserted on the way."""
    model, tokenizer = loaded(architecture, folder)
    assert padded_rows_are_as_if_alone(model) and replies_are_as_if_alone(model)
    single = {method: apart(model, method) for method in ("forward", "central")}
    assert single["forward"] is None or single["forward"] < 1e-5
    assert single["central"] < 5e-2
    assert alignment.choose_method(model, tokenizer) == ("central" if single["forward"] is None else "forward")
    row = {"architecture": architecture, "class": type(model).__name__, "needs": needs(model)}
    row["tied"] = "yes" if model.get_output_embeddings().weight is model.get_input_embeddings().weight else "no"
    row["heads"] = "yes" if heads_learn(model) else "no"
    with monkeypatch.context() as patch:
        lift_float32(patch)
        torch.set_default_dtype(torch.float64)
        try:
            exact = {method: apart(model.double(), method) for method in single}
        finally:
            torch.set_default_dtype(torch.float32)
    row["methods"] = ", ".join(method for method, value in exact.items() if value is not None)
    return row | {"forward": rounded(exact["forward"], 1e-10), "central": rounded(exact["central"], 1e-4)}


def refused(architecture: str, folder: Path) -> dict[str, str]:
    """Likewise, of what `policy.load` does not take."""
    if architecture == "t5":
        AutoConfig.for_model("t5").save_pretrained(folder)
    with pytest.raises(ValueError) as error:
        policy.load(str(folder)) if architecture == "t5" else loaded(architecture, folder)
    name = AutoConfig.from_pretrained(folder).architectures
    reason = str(error.value).removeprefix(f"model={str(folder)!r}: ")
    return {"architecture": architecture, "class": name[0] if name else "", "methods": "refused", "needs": reason}


def test_the_table_of_architectures_is_what_is_measured(tmp_path, monkeypatch):
    made = [measured(name, tmp_path / name, monkeypatch) for name in FAMILIES]
    made += [refused(name, tmp_path / name) for name in (*UNSUITABLE, "t5")]
    table = [{column: row.get(column, "") for column in COLUMNS} for row in made]
    if os.environ.get("PREFDYN_WRITE"):
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    with TABLE.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == table
    assert len(FAMILIES) >= 16 and all(row["forward"] != "more" and row["central"] != "more" for row in table)
    assert all(row["heads"] == "yes" for row in table if row["methods"] != "refused")


SMALL = {
    "profile": "smoke",
    "seeds": [0],
    "pairs": 24,
    "check": 8,
    "demonstrations": 64,
    "validation": 4,
    "held_out": 8,
    "width": 16,
    "sft_steps": 4,
    "sft_batch": 8,
    "batch": 8,
    "epochs": 1.0,
    "iterations": 1,
    "rollouts": 8,
    "ppo_batch": 8,
    "checkpoints": 2,
    "probe": 8,
    "ppo_probe": 8,
}
SCRATCH = tuple(policy.ARCHITECTURES)
WORLD = policy.word_tokenizer(EASY.vocabulary())


def made(architecture: str, layers: int = 2, width: int = 24, heads: int = 2, seed: int = 0):
    """A model from scratch of the world's words."""
    sizes = {"layers": layers, "width": width, "heads": heads, "context": 52, "seed": seed}
    return policy.scratch_model(WORLD, architecture=architecture, **sizes)


def test_parameters_allow_what_can_be_made():
    allowed = Parameters.model_json_schema()["properties"]["architecture"]["enum"]
    assert tuple(allowed) == SCRATCH and made("gpt-neox").config.model_type == "gpt_neox"
    with pytest.raises(ParameterError, match=r"architecture: given 'gpt3'.*; allowed: one of gpt-neox, llama"):
        check({"architecture": "gpt3"})
    with pytest.raises(ParameterError, match=r"architecture: given 'llama'; a model from scratch alone has it"):
        check({"architecture": "llama", "model": "./here"})


@pytest.mark.parametrize("architecture", SCRATCH)
def test_models_from_scratch_have_the_sizes_that_are_asked_for(architecture):
    """Weights without embeddings, norms and biases: 4 w^2 of attention, 8 w^2 of hidden layers, 12 w^2 if gated."""
    model = made(architecture, layers=3)
    gated = architecture in ("llama", "qwen3")
    ends = [embeddings.weight for embeddings in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert ends[0] is not ends[1] and all(end.shape == (len(WORLD), 24) for end in ends)
    outside = {id(end) for end in ends} | {id(p) for name, p in model.named_parameters() if "wpe" in name}
    inner = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in outside)
    assert inner == 3 * (16 if gated else 12) * 24**2
    assert model.config.max_position_embeddings == 52 and model.config.num_attention_heads == 2
    first = made(architecture, layers=3).state_dict()
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    other = made(architecture, layers=3, seed=1).state_dict()
    assert not all(torch.equal(value, first[name]) for name, value in other.items())
    dropped = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(dropped)


@pytest.mark.parametrize("architecture", SCRATCH)
def test_sizes_that_do_not_fit_are_refused(architecture):
    """Rotary positions turn pairs of coordinates of a head."""
    with pytest.raises(ValueError, match=r"width=26, heads=4: width must be a multiple of"):
        made(architecture, width=26, heads=4)
    if architecture == "gpt2":
        assert made(architecture, width=18, heads=2).config.n_embd == 18
        return
    with pytest.raises(ValueError, match=r"width=18, heads=2: width must be a multiple of 2 \* heads"):
        made(architecture, width=18, heads=2)


def test_an_architecture_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"architecture='gpt3': must be one of gpt-neox, llama, qwen3, gpt2"):
        made("gpt3")


@pytest.mark.parametrize("architecture", SCRATCH)
def test_models_from_scratch_train_and_are_measured(architecture, tmp_path):
    """By DPO and by PPO, each then measured in the way that planning chooses."""
    p, store = check(SMALL | {"architecture": architecture}), RunStore(tmp_path)
    assert plan.measuring_method(p) == "forward"
    for method in ("dpo", "ppo"):
        run = plan.run(p, 0, method)
        found = store.get(plan.alignment_run(p, run)).frame("alignment")
        assert found.query("component == 'full'")[["g", "g_opt", "cosine"]].notna().all(axis=None)
        start, end = (recipes.load_checkpoint(store.get(run), step)[0] for step in (0, run.steps()[-1]))
        assert type(end) is policy.ARCHITECTURES[architecture][1]
        assert all((a != b).any() for a, b in zip(start.parameters(), end.parameters(), strict=True) if a.ndim > 1)
