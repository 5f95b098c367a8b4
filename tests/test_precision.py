"""Low precision: sums in float32, errors against the same weights cast up; in float32 it is `lens.alignment`."""

import dataclasses

import pytest
import torch
from prefdyn.lab import policy
from prefdyn.lens import alignment, controls, precision
from prefdyn.methods.dpo import dpo_weights
from toys.models import VOCAB, build, random_batch

LOW = [torch.bfloat16, torch.float16]
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def setting(architecture: str = "gpt_neox", rows: int = 12):
    """A model in float32, a batch of pairs with its weights, and D'."""
    batch = random_batch(rows, seed=1)
    weights = dpo_weights(batch.response, torch.linspace(0.2, 0.7, rows // 2), beta=0.3)
    return build(architecture), batch, weights, random_batch(7, seed=2)


def apart(d, exact) -> float:
    """|d - exact| / |exact|."""
    difference = alignment.norm({name: d[name].float() - exact[name] for name in exact})
    return (difference / alignment.norm(exact)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_in_float32_and_better_it_is_the_plain_measurement_bit_for_bit(dtype, reduction):
    model, batch, weights, targets = setting()
    model.to(dtype)
    d, plain = (room.target_direction(model, targets, reduction, size=3) for room in (precision, alignment))
    ascents = [room.gradient(model, [(batch, weights.w)], 0.7) for room in (precision, alignment)]
    for found, expected in ((d, plain), ascents):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for method in ("forward", "central"):
        scored = [room.token_scores(model, batch, d, method, 5, 0.7) for room in (precision, alignment)]
        assert all(torch.equal(found, expected) for found, expected in zip(*scored, strict=True))
    w = weights.w.to(dtype)
    scored, ascent = alignment.token_scores(model, batch, d), alignment.gradient(model, [(batch, w)])
    found = precision.check("here", "forward", w, scored, ascent, d, model)
    assert found == alignment.check("here", "forward", w, scored, ascent, d) < 1
    assert precision.low(model) is None


def test_the_precision_of_a_model_is_that_of_its_coarsest_parameter():
    model = build("llama")
    assert precision.low(model.bfloat16()) == torch.bfloat16
    model.float().model.layers[0].mlp.half().requires_grad_(False)
    assert model.dtype == torch.float32 and precision.low(model) == torch.float16
    model.lm_head.bfloat16()
    assert precision.low(model) == torch.bfloat16


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "qwen3, tied"])
def test_what_is_summed_in_float32_is_off_by_the_rounding_of_single_rows(architecture, dtype):
    """About the precision of one number, whatever the number of rows, and less than what is summed in low precision."""
    model = build(architecture).to(dtype)
    exact, targets = precision.in_float32(model), random_batch(64, seed=2)
    expected = alignment.target_direction(exact, targets)
    d = precision.target_direction(model, targets)
    assert all(t.dtype == torch.float32 for t in d.values())
    off = apart(d, expected)
    assert 0.05 * EPS[dtype] < off < 2.5 * EPS[dtype]
    assert off < 1.02 * apart(alignment.target_direction(model, targets), expected)
    if architecture == "gpt2":  # rows of position embeddings add up what every sequence says
        assert off < 0.5 * apart(precision.target_direction(model, targets, rows=64), expected)


@pytest.mark.parametrize("dtype", LOW)
def test_parts_and_weights_add_up(dtype):
    """By hand: the sum over single rows of an ordinary gradient, added up in float32."""
    model, batch, weights, _ = setting()
    model.to(dtype)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for part, w in zip(batch.slices(1), weights.w.split(1), strict=True):
        for name, grad in alignment.gradient(model, [(part, w)]).items():
            total[name] += grad
    found = precision.gradient(model, [(batch.take(rows), weights.w[rows]) for rows in torch.arange(12).split(5)])
    assert apart(found, total) < 2 * EPS[dtype]
    assert found.keys() == total.keys()


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_neither_small_nor_large_weights_leave_the_range_of_float16(size):
    """float16 ends at 6e-8 and at 65504: weights of 1e-9 would all be 0, scores of 1e8 infinite."""
    model, batch, weights, targets = setting()
    model.half()
    plain, found = (precision.gradient(model, [(batch, scale * weights.w)]) for scale in (1.0, size))
    assert apart({name: t / size for name, t in found.items()}, plain) < 1e-3
    if size < 1:
        lost = alignment.gradient(model, [(batch, size * weights.w)])
        assert alignment.norm(lost) == 0
    d = precision.target_direction(model, targets)
    _, scores = precision.token_scores(model, batch, d)
    _, scaled = precision.token_scores(model, batch, {name: size * t for name, t in d.items()})
    assert (scaled / size - scores).abs().max() < 2e-3 * scores.abs().max()


def test_what_is_not_finite_is_refused_by_name():
    model, batch, weights, targets = setting()
    d = precision.target_direction(model.bfloat16(), targets)
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight[0] = torch.inf
    with pytest.raises(alignment.MeasurementError, match=r"gradient of \d+ parameters is not finite in torch.bfloat16"):
        precision.gradient(model, [(batch, weights.w)])
    with pytest.raises(alignment.MeasurementError, match=r"scores are not finite in torch.bfloat16"):
        precision.token_scores(model, batch, d)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        precision.gradient(model.requires_grad_(False), [(batch, weights.w)])
    with pytest.raises(ValueError, match="reduction='max'"):
        precision.target_direction(model, targets, "max")


@pytest.mark.parametrize("dtype", LOW)
def test_scores_of_a_float32_direction(dtype):
    """Against one backward pass a token of the same weights in float32; and the check knows how coarse it may be."""
    model, batch, weights, targets = setting()
    model.to(dtype)
    exact = precision.in_float32(model)
    d = alignment.target_direction(exact, targets)
    logps, scores = precision.token_scores(model, batch, d, size=5)
    assert scores.dtype == logps.dtype == torch.float32
    _, expected = alignment.token_scores(exact, batch, d, "backward")
    assert 0 < (scores - expected).abs().max() < 5 * EPS[dtype] * expected.abs().max()
    _, backward = precision.token_scores(model, batch, d, "backward")
    assert (backward - expected).abs().max() < 5 * EPS[dtype] * expected.abs().max()
    ascent = precision.gradient(model, [(batch, weights.w)])
    assert precision.check("here", "forward", weights.w, (logps, scores), ascent, d, model) < 0.5
    with pytest.raises(alignment.MeasurementError, match="here"):  # as if it were in float32
        alignment.check("here", "forward", weights.w, (logps, scores), ascent, d)
    with pytest.raises(alignment.MeasurementError, match="here"):
        precision.check("here", "forward", weights.w, (logps, 1.5 * scores), ascent, d, model)


def test_a_float32_adapter_on_a_frozen_bfloat16_base():
    """What moves is float32 and so is d; the base, which does not move, is coarse."""
    model, batch, _, targets = setting("llama")
    model.bfloat16().requires_grad_(False)
    down = model.model.layers[1].mlp.down_proj

    class Adapter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.a, self.b = down, torch.nn.Linear(24, 2, bias=False), torch.nn.Linear(2, 16, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x.float())).to(x.dtype)

    torch.manual_seed(0)
    model.model.layers[1].mlp.down_proj = Adapter()
    d = precision.target_direction(model, targets)
    assert len(d) == 2 and alignment.precision(d) == torch.float32
    exact = precision.in_float32(model)
    assert apart(d, alignment.target_direction(exact, targets)) < 3 * EPS[torch.bfloat16]
    _, scores = precision.token_scores(model, batch, d)
    _, expected = alignment.token_scores(exact, batch, d, "backward")
    assert (scores - expected).abs().max() < 6 * EPS[torch.bfloat16] * expected.abs().max()


def test_error_says_what_low_precision_does():
    """Each number by its definition, from two measurements made here."""
    model, batch, weights, targets = setting()
    model.bfloat16()
    exact = precision.in_float32(model)
    found = precision.error(model, exact, batch, weights, targets)
    d, d32 = precision.target_direction(model, targets), alignment.target_direction(exact, targets)
    (logps, a), (logps32, a32) = precision.token_scores(model, batch, d), alignment.token_scores(exact, batch, d32)
    off = ((a - a32) / a32.abs().max())[batch.response]
    assert found.direction == pytest.approx(apart(d, d32), rel=1e-3)
    assert found.cosine == pytest.approx(1 - found.direction**2 / 2, abs=2e-5)
    assert found.logps == pytest.approx((logps - logps32).abs().max().item())
    assert found.scores_rms == pytest.approx(off.square().mean().sqrt().item(), rel=1e-4)
    assert found.scores_largest == pytest.approx(off.abs().max().item(), rel=1e-4)
    assert found.scores_rms < found.scores_largest
    assert found.g.keys() == controls.CONTROLS.keys()
    for name, (low, high) in found.g.items():
        w = controls.apply(name, weights)
        assert (low, high) == pytest.approx(((w * a).sum().item(), (w * a32).sum().item()), rel=1e-4)
        assert found.relative(name) == pytest.approx(abs(low / high - 1))
    assert found.relative("positive") < 0.05
    assert str(found).startswith("against the same weights in float32, bfloat16 is off by 0.")
    same = precision.error(exact, precision.in_float32(exact), batch, weights, targets)
    assert (same.direction, same.scores_largest, same.logps, same.dtype) == (0, 0, 0, "float32")
    assert same.relative("full") == 0


def test_error_leaves_undefined_components_undefined():
    """At the first step all omegas are equal: there are no thirds."""
    model, batch, _, targets = setting()
    weights = dpo_weights(batch.response, torch.full((6,), 0.5), beta=0.3)
    found = precision.error(model.bfloat16(), precision.in_float32(model), batch, weights, targets)
    assert found.relative("top") != found.relative("top") and "top" not in str(found)
    assert dataclasses.replace(found, g={"full": (1.0, 0.0)}).relative("full") == float("inf")


def test_error_is_of_one_function_in_two_precisions():
    model, batch, weights, targets = setting()
    before = precision.in_float32(model)
    model.bfloat16()
    with pytest.raises(ValueError, match=r"same_model_in_float32: .* is not that of the model, cast up"):
        precision.error(model, before, batch, weights, targets)  # weights before they were rounded
    with pytest.raises(ValueError, match=r"has parameters in torch.bfloat16"):
        precision.error(model, model, batch, weights, targets)
    with pytest.raises(ValueError, match="not the same model"):
        precision.error(model, build("llama"), batch, weights, targets)
    copy = precision.in_float32(model)
    copy.get_output_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match=r"weight requires a gradient in one of the two models alone"):
        precision.error(model, copy, batch, weights, targets)


def plain(model):
    return model


def checkpointing(model):
    model.train().gradient_checkpointing_enable()
    return model


def marked(model):
    """As trainers leave adapters with checkpointing: the second call adds a hook and forgets the first one."""
    model.enable_input_require_grads()
    return checkpointing(model)


def hooks(model) -> list:
    return [list(module._forward_hooks.items()) for module in model.modules()]


@pytest.mark.parametrize("prepare", [plain, checkpointing, marked])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_bfloat16_with_either_attention_and_with_checkpointing(architecture, attention, prepare):
    """The same d and scores, within what rounding does, as of the same weights in float32 and with nothing odd."""
    twin = precision.in_float32(build(architecture).bfloat16())
    twin.set_attn_implementation("eager")
    model = build(architecture).bfloat16()
    model.set_attn_implementation(attention)
    model = prepare(model)
    before, handle = hooks(model), getattr(model, "_require_grads_hook", None)
    batch, targets = random_batch(8, seed=1), random_batch(5, seed=2)
    d, exact = precision.target_direction(model, targets), alignment.target_direction(twin, targets)
    assert apart(d, exact) < 3 * EPS[torch.bfloat16]
    _, scores = precision.token_scores(model, batch, d)
    _, expected = alignment.token_scores(twin, batch, exact, "backward")
    assert (scores - expected).abs().max() < 6 * EPS[torch.bfloat16] * expected.abs().max()
    assert model.training == (prepare is not plain) and model.config._attn_implementation == attention
    assert precision.choose_method(model, policy.word_tokenizer([f"w{i}" for i in range(VOCAB - 4)])) == "forward"
    assert hooks(model) == before and getattr(model, "_require_grads_hook", None) is handle


def test_marking_hooks_are_back_after_an_error_and_other_hooks_stay():
    """And they can still be taken away by who put them there; a wrapper is given no attribute."""
    model = marked(build("llama"))
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match="requires_grad_"):  # why
        alignment.token_scores(model, random_batch(2), {n: p.detach() for n, p in model.named_parameters()})
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), precision.unmarked(model):
        assert sum(map(len, hooks(model))) == 1
        raise ZeroDivisionError
    assert hooks(model) == before and sum(map(len, before)) == 3
    wrapper = torch.nn.ModuleList([model])
    with precision.unmarked(wrapper):
        precision.token_scores(model, random_batch(2), {n: p.detach() for n, p in model.named_parameters()})
    assert "_require_grads_hook" not in vars(wrapper) and seen
    model.disable_input_require_grads()
    assert sum(map(len, hooks(model))) == 2


class _Doubled(torch.autograd.Function):
    """An operation of someone's own, with a backward pass and without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Own(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return _Doubled.apply(self.inner(x))


def with_own_operation():
    model = build("llama")
    model.model.layers[0].mlp = Own(model.model.layers[0].mlp)
    return model


def test_without_a_forward_derivative_differences_are_taken_and_in_bfloat16_that_is_refused():
    tokenizer = policy.word_tokenizer([f"w{i}" for i in range(VOCAB - 4)])
    model, batch, targets = with_own_operation(), random_batch(6, seed=1), random_batch(3, seed=2)
    assert alignment.choose_method(model, tokenizer) == "central"
    d = precision.target_direction(model, targets)
    _, scores = precision.token_scores(model, batch, d, "central")
    _, expected = alignment.token_scores(model, batch, d, "backward")
    assert (scores - expected).abs().max() < 2e-3 * expected.abs().max()
    low = model.bfloat16()
    d = precision.target_direction(low, targets)  # reverse mode is there
    assert all(t.dtype == torch.float32 for t in d.values())
    with pytest.raises(RuntimeError, match=r"jvp|forward"):
        precision.token_scores(low, batch, d)
    with pytest.raises(ValueError, match=r"method='central': .*bfloat16 is mostly rounding; use method='forward'"):
        precision.token_scores(low, batch, d, "central")
    with pytest.raises(alignment.MeasurementError, match=r"forward: .* \| central: ValueError: .*bfloat16"):
        alignment.choose_method(low, tokenizer)


def test_a_lora_adapter_in_training_with_checkpointing():
    """As a trainer has it: adapters in float32 on a bfloat16 base, dropout, and embeddings marked twice."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(build("llama").bfloat16(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # which start at zero
                p.normal_(std=0.3)
    twin = precision.in_float32(model).eval()
    model.enable_input_require_grads()
    model.train().gradient_checkpointing_enable()
    before, batch, targets = hooks(model), random_batch(8, seed=1), random_batch(5, seed=2)
    d, exact = precision.target_direction(model, targets), alignment.target_direction(twin, targets)
    assert len(d) == 8 and alignment.precision(d) == torch.float32 and precision.low(model) == torch.bfloat16
    assert apart(d, exact) < 4 * EPS[torch.bfloat16]
    _, scores = precision.token_scores(model, batch, d)
    _, expected = alignment.token_scores(twin, batch, exact, "backward")
    assert (scores - expected).abs().max() < 8 * EPS[torch.bfloat16] * expected.abs().max()
    assert hooks(model) == before and "_require_grads_hook" not in vars(model) and model.training
