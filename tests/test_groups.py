"""Groups of parameters: every parameter is in one, they are those that the structure has, and sums add up."""

import math

import pytest
import torch
from prefdyn.lab import policy
from prefdyn.lens import alignment, groups
from toys.models import Table, build, random_batch, tiny_policy

LAYERS = [f"layer {i} {part}" for i in range(2) for part in ("attention", "mlp", "norms")]
WHOLE = ["embedding", *LAYERS, "final norm", "head"]
TIED = WHOLE[:-1]  # gpt2 is tied as transformers has it
EXPECTED = {
    "gpt_neox": WHOLE,
    "gpt2": TIED,
    "llama": WHOLE,
    "llama, tied": TIED,
    "qwen3": WHOLE,
    "qwen3, tied": TIED,
}


def ascents(model):
    """Two directions: of the likelihood of two batches."""
    return (alignment.target_direction(model, random_batch(4, seed=seed)) for seed in (1, 2))


@pytest.mark.parametrize("architecture", EXPECTED)
def test_every_parameter_has_one_group_in_the_order_from_input_to_output(architecture):
    model = build(architecture)
    of = groups.groups(model)
    assert sorted(of) == sorted(name for name, _ in model.named_parameters())
    assert list(dict.fromkeys(of.values())) == EXPECTED[architecture]
    seen = [group for group, last in zip(of.values(), [None, *of.values()], strict=False) if group != last]
    assert len(seen) == len(set(seen))  # those of a group are together


@pytest.mark.parametrize("architecture", policy.ARCHITECTURES)
def test_policies_made_here_have_nothing_else(architecture):
    _, tokenizer = tiny_policy()
    sizes = {"layers": 12, "width": 16, "heads": 2, "context": 52, "seed": 0, "architecture": architecture}
    of = groups.groups(policy.scratch_model(tokenizer, **sizes))
    layers = [f"layer {i} {part}" for i in range(12) for part in ("attention", "mlp", "norms")]
    assert list(dict.fromkeys(of.values())) == ["embedding", *layers, "final norm", "head"]  # 10 follows 9


@pytest.mark.parametrize(
    ("architecture", "name", "group"),
    [
        ("gpt_neox", "gpt_neox.embed_in.weight", "embedding"),
        ("gpt_neox", "gpt_neox.layers.1.post_attention_layernorm.bias", "layer 1 norms"),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.bias", "layer 0 attention"),
        ("gpt2", "transformer.wpe.weight", "embedding"),
        ("gpt2", "transformer.wte.weight", "embedding"),  # the output layer too
        ("gpt2", "transformer.h.0.ln_1.weight", "layer 0 norms"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "layer 1 attention"),
        ("gpt2", "transformer.ln_f.weight", "final norm"),
        ("llama", "model.layers.1.mlp.gate_proj.weight", "layer 1 mlp"),
        ("llama", "lm_head.weight", "head"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight", "layer 0 attention"),  # inside of the attention
        ("qwen3", "model.layers.0.post_attention_layernorm.weight", "layer 0 norms"),
        ("qwen3, tied", "model.embed_tokens.weight", "embedding"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight", "layer 0 mlp"),
        ("opt", "model.decoder.layers.1.fc2.weight", "layer 1 mlp"),
        ("phi", "lm_head.bias", "head"),
    ],
)
def test_by_name(architecture, name, group):
    assert groups.groups(build(architecture))[name] == group


@pytest.mark.parametrize("architecture", EXPECTED)
def test_groups_add_up(architecture):
    model = build(architecture)
    a, b = ascents(model)
    of = groups.groups(model)
    found = groups.inner_by_group(a, b, of)
    assert list(found) == EXPECTED[architecture]
    assert sum(found.values()) == pytest.approx(alignment.inner(a, b).item(), rel=1e-5)
    for group, value in found.items():
        own = [name for name in a if of[name] == group]
        assert value == pytest.approx(sum((a[name] * b[name]).sum().item() for name in own), rel=1e-4, abs=1e-6)
    own = groups.cosine_by_group(a, a, of)
    assert list(own) == list(found) and list(own.values()) == pytest.approx([1] * len(own))
    for group, value in groups.cosine_by_group(a, b, of).items():
        parts = [{name: t for name, t in d.items() if of[name] == group} for d in (a, b)]
        assert value == pytest.approx(alignment.cosine(*parts), rel=1e-4, abs=1e-6)


def test_what_is_not_known_is_other_and_last():
    """A parameter of the model itself, one that `of` lacks, and a policy that is no transformer."""
    model = build("gpt_neox")
    model.extra = torch.nn.Parameter(torch.ones(2))
    model.gpt_neox.layers[0].gate = torch.nn.Linear(2, 1)
    of = groups.groups(model)
    assert list(dict.fromkeys(of.values())) == [*WHOLE, "other"]
    assert {name for name, group in of.items() if group == "other"} == {
        "extra",
        "gpt_neox.layers.0.gate.weight",
        "gpt_neox.layers.0.gate.bias",
    }
    assert groups.groups(Table(torch.zeros(2, 2))) == {"table": "other"}
    a, b = {"x": torch.ones(2), "y": torch.ones(1)}, {"x": torch.full((2,), 3.0), "y": torch.zeros(1)}
    assert groups.inner_by_group(a, b, {"y": "head"}) == {"head": 0.0, "other": 6.0}
    cosines = groups.cosine_by_group(a, b, {"y": "head"})
    assert cosines["other"] == pytest.approx(1) and math.isnan(cosines["head"])
    with pytest.raises(ValueError, match="only one of the two has"):
        groups.inner_by_group(a, {"x": torch.ones(2)}, {})
    assert groups.inner_by_group({}, {}, {}) == {}
