"""Gradient alignment: forward mode against per-token backward in true float64, by hand, and against real steps."""

import contextlib

import numpy as np
import pytest
import torch
from prefdyn.lab import policy
from prefdyn.lens import alignment, controls, likelihood
from prefdyn.lens.batch import Batch, pad
from prefdyn.lens.faithful import faithful
from prefdyn.lens.likelihood import sequence_logps, token_logps
from prefdyn.methods.dpo import dpo_weights
from prefdyn.methods.sft import sft_weights
from toys.models import ARCHITECTURES, VOCAB, Table, build, lift_float32, random_batch
from transformers import AttentionInterface


@pytest.fixture
def exact(double, monkeypatch):
    """Float64 from end to end: transformers' own classes would pass through float32 on the way."""
    lift_float32(monkeypatch)


def test_by_hand(double):
    """Two tokens, all logits equal: the gradient of log pi(y | x) is e_y - (1/2, 1/2) in row x.

    D' is one response, prompt 0, answer 1: d = (-1/2, 1/2) in row 0. So the score of token 1 after 0 is
    1/4 + 1/4 = 1/2, that of token 0 after 0 is -1/2, and whatever follows 1 lies in another row: 0.
    """
    model = Table([[1.0, 1.0], [1.0, 1.0]])
    direction = alignment.target_direction(model, pad([[0]], [[1]], 0))
    assert direction["table"].flatten().tolist() == pytest.approx([-0.5, 0.5, 0, 0])
    batch = pad([[0], [0], [1]], [[1, 1], [0], [0]], 0)
    for method in alignment.METHODS:
        logps, scores = alignment.token_scores(model, batch, direction, method)
        expected = torch.tensor([[0, 0.5, 0], [0, -0.5, 0], [0, 0, 0]])
        assert torch.allclose(scores, expected, atol=1e-8), method
        assert torch.allclose(logps, token_logps(model, batch))
    # SFT on these three demonstrations, 1/3 a token: G = (1/2 - 1/2 + 0) / 3 = 0, and row by row
    weights = sft_weights(batch.response)
    assert alignment.by_sequence(weights, scores, "full").tolist() == pytest.approx([1 / 6, -1 / 6, 0])


def test_reductions_by_hand(double):
    """D': 0 -> 1 1 and 0 -> 0. In units of u = (-1/2, 1/2) of a row, the gradients are (u, u) and (-u, 0) in rows 0, 1.

    sum:  row 0 gets (u - u) / 2 = 0,         row 1 gets u / 2.
    mean: row 0 gets (u / 2 - u) / 2 = -u / 4, row 1 gets u / 4.
    """
    model, targets = Table([[0.0, 0.0], [0.0, 0.0]]), pad([[0], [0]], [[1, 1], [0]], 0)
    summed = alignment.target_direction(model, targets, "sum", size=1)
    meant = alignment.target_direction(model, targets, "mean", size=1)
    assert summed["table"].flatten().tolist() == pytest.approx([0, 0, -0.25, 0.25])
    assert meant["table"].flatten().tolist() == pytest.approx([0.125, -0.125, -0.125, 0.125])
    with pytest.raises(ValueError, match="reduction='max'"):
        alignment.target_direction(model, targets, "max")


def setting(architecture: str, side: str = "right"):
    """A model, pairs as a batch of chosen and then rejected rows, their weights, and D'."""
    model = build(architecture)
    batch, targets = random_batch(8, seed=1, side=side), random_batch(3, seed=2, side=side)
    omega = torch.linspace(0.2, 0.7, 4)
    return model, batch, dpo_weights(batch.response, omega, beta=0.3), targets


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_mode_equals_per_token_backward_in_float64(exact, architecture):
    model, batch, _, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    logps, scores = alignment.token_scores(model, batch, direction)
    _, expected = alignment.token_scores(model, batch, direction, "backward")
    assert scores.dtype == torch.float64
    inside = batch.response
    assert expected[inside].abs().min() > 1e-6  # so that a relative comparison means something
    assert ((scores - expected)[inside].abs() < 1e-8 * expected[inside].abs()).all()
    assert (scores[~inside] == 0).all()
    assert torch.allclose(logps, token_logps(model, batch), atol=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3, tied"])
def test_scores_at_a_temperature(exact, architecture, temperature):
    """All methods agree on <grad log softmax(logits / T), d>, and the weighted sum is the gradient's inner product."""
    model, batch, weights, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    logps, expected = alignment.token_scores(model, batch, direction, "backward", temperature=temperature)
    assert torch.allclose(logps, token_logps(model, batch, temperature).detach(), atol=1e-12)
    size = expected.abs().max()
    for method, bound in (("forward", 1e-11), ("central", 1e-6)):
        values, scores = alignment.token_scores(model, batch, direction, method, size=3, temperature=temperature)
        assert (values - logps).abs().max() < 1e-11 and (scores - expected).abs().max() < bound * size, method
    ascent = alignment.gradient(model, [(batch, weights.w)], temperature)
    assert alignment.inner(ascent, direction).item() == pytest.approx((weights.w * expected).sum().item(), rel=1e-9)
    _, plain = alignment.token_scores(model, batch, direction)
    assert (plain - expected).abs().max() > 0.05 * size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("method", "bound"), [("forward", 1e-5), ("central", 1e-3)])
def test_float32_is_close_to_the_largest_score(architecture, method, bound):
    model, batch, _, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    _, scores = alignment.token_scores(model, batch, direction, method)
    _, expected = alignment.token_scores(model, batch, direction, "backward")
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention_gives_the_same_scores(policy_and_tokenizer, attention):
    model, _ = policy_and_tokenizer
    batch, targets = random_batch(6, seed=1), random_batch(3, seed=2)
    direction = alignment.target_direction(model, targets)
    _, expected = alignment.token_scores(model, batch, direction, "backward")
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        _, scores = alignment.token_scores(model, batch, direction)
    finally:
        model.set_attn_implementation(before)
    assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weighted_scores_are_the_inner_product_of_the_definition(exact, architecture):
    """G = < grad of the mean NLL of D', grad L >, with both gradients from autograd of whole losses."""
    model, batch, weights, targets = setting(architecture)
    parameters = list(model.parameters())
    nll = -token_logps(model, targets).sum(-1).mean()
    grad_targets = torch.autograd.grad(nll, parameters)
    loss = -(weights.w * token_logps(model, batch)).sum()
    grad_loss = torch.autograd.grad(loss, parameters)
    by_definition = sum((a * b).sum() for a, b in zip(grad_targets, grad_loss, strict=True)).item()
    direction = alignment.target_direction(model, targets)
    _, scores = alignment.token_scores(model, batch, direction)
    g = alignment.by_sequence(weights, scores, "full").sum().item()
    assert g == pytest.approx(by_definition, rel=1e-9)
    ascent = alignment.gradient(model, [(batch, weights.w)])
    assert alignment.inner(ascent, direction).item() == pytest.approx(g, rel=1e-9)
    lengths = [np.sqrt(sum(x.pow(2).sum().item() for x in grads)) for grads in (grad_loss, grad_targets)]
    assert alignment.norm(ascent).item() == pytest.approx(lengths[0])
    assert alignment.norm(direction).item() == pytest.approx(lengths[1])


def test_components_sum_to_g():
    model, batch, weights, targets = setting("gpt_neox")
    _, scores = alignment.token_scores(model, batch, alignment.target_direction(model, targets))
    part = {name: alignment.by_sequence(weights, scores, name) for name in controls.CONTROLS}
    size = part["full"].abs().max().item()
    assert torch.allclose(part["positive"] + part["negative"], part["full"], atol=1e-6 * size)
    assert torch.allclose(part["top"] + part["middle"] + part["bottom"], part["full"], atol=1e-6 * size)
    assert all(part[name].abs().max() > 0 for name in part)
    assert part["full"].sum().item() == pytest.approx((weights.w * scores).sum().item(), rel=1e-4, abs=1e-6 * size)


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3, tied"])
def test_a_small_step_changes_the_likelihood_as_g_says(exact, architecture):
    """theta - lr * grad L changes the NLL of D' by -lr * G + O(lr^2): halving lr quarters the error."""
    model, batch, weights, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    _, scores = alignment.token_scores(model, batch, direction)
    g = alignment.by_sequence(weights, scores, "full").sum().item()
    ascent = alignment.gradient(model, [(batch, weights.w)])  # minus the gradient of L
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = -sequence_logps(model, targets).mean().item()
    rates = np.array([2.0**-k for k in range(5)]) * 1e-3 / alignment.norm(ascent).item()
    errors = []
    for lr in rates:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + lr * ascent[name])
        after = -sequence_logps(model, targets).mean().item()
        errors.append(abs(after - before + lr * g))
    slope = np.polyfit(np.log(rates), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.1)
    assert errors[-1] < 0.1 * abs(rates[-1] * g)


def test_central_differences_leave_the_parameters_as_they_were():
    model, batch, _, targets = setting("gpt_neox")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    direction = alignment.target_direction(model, targets)
    alignment.token_scores(model, batch, direction, "central")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    broken = Batch(torch.full_like(batch.ids, 10**6), batch.attention, batch.response)  # no such token
    with pytest.raises(IndexError):
        alignment.token_scores(model, broken, direction, "central")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_measuring_leaves_no_gradients_behind():
    model, batch, weights, targets = setting("gpt_neox")
    direction = alignment.target_direction(model, targets)
    logps, scores = alignment.token_scores(model, batch, direction)
    alignment.gradient(model, [(batch, weights.w)])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not logps.requires_grad and not scores.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_chunks_change_nothing(architecture):
    model, batch, _, targets = setting(architecture)
    direction = alignment.target_direction(model, targets)
    _, scores = alignment.token_scores(model, batch, direction)
    bound = 1e-5 * scores.abs().max()
    _, in_chunks = alignment.token_scores(model, batch, direction, size=3)
    assert (in_chunks - scores).abs().max() < bound
    _, left_batch, _, left_targets = setting(architecture, side="left")
    left_direction = alignment.target_direction(model, left_targets, size=2)
    _, left = alignment.token_scores(model, left_batch, left_direction)
    assert left.isfinite().all()
    assert (left[left_batch.response] - scores[batch.response]).abs().max() < bound
    difference = {name: direction[name] - left_direction[name] for name in direction}
    assert alignment.norm(difference) < 1e-5 * alignment.norm(direction)


def test_a_direction_may_cover_a_part_of_the_parameters(exact):
    """Frozen parameters do not enter G."""
    model, batch, _, targets = setting("gpt_neox")
    whole = alignment.target_direction(model, targets)
    frozen = next(iter(whole))
    model.get_parameter(frozen).requires_grad_(False)
    direction = alignment.target_direction(model, targets)
    assert direction.keys() == whole.keys() - {frozen}
    _, scores = alignment.token_scores(model, batch, direction)
    for method in ("backward", "central"):
        _, expected = alignment.token_scores(model, batch, direction, method)
        assert torch.allclose(scores, expected, atol=1e-6 * scores.abs().max())


def test_what_cannot_be_measured():
    model, batch, _, targets = setting("gpt_neox")
    direction = alignment.target_direction(model, targets)
    with pytest.raises(ValueError, match="method='guess': must be one of forward, central, backward"):
        alignment.token_scores(model, batch, direction, "guess")
    with pytest.raises(ValueError, match=r"no counterpart.*elsewhere"):
        alignment.token_scores(model, batch, direction | {"elsewhere": torch.zeros(1)})


def reading_its_padding(rows: int = 5) -> Batch:
    """Rows with the token 2, which is padding and end of text at once, in prompts and at the end of responses."""
    plain = random_batch(rows, seed=4)
    asked = [
        ids[real & ~own].tolist() for ids, real, own in zip(plain.ids, plain.attention, plain.response, strict=True)
    ]
    return pad([[2, *prompt, 2] for prompt in asked], [[5 + i, 2] for i in range(rows)], 2)


PADDED = {"pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 2}


def test_the_row_of_the_padding_token_counts_in_both_modes(exact):
    """As transformers makes it, a Llama with pad = eos has no gradient for that row in reverse mode alone."""
    model, batch = build("llama, tied", **PADDED), reading_its_padding()
    words = model.get_input_embeddings()
    assert words.padding_idx == 2
    direction = alignment.target_direction(model, batch)
    found = {m: alignment.token_scores(model, batch, direction, m)[1] for m in alignment.METHODS}
    for method in ("forward", "central"):
        assert (found[method] - found["backward"]).abs().max() < 1e-6 * found["backward"].abs().max(), method
    total = alignment.inner(alignment.gradient(model, [(batch, batch.response.double())]), direction).item()
    assert found["forward"].sum().item() == pytest.approx(total, rel=1e-8)
    assert words.padding_idx == 2  # as it was
    own = direction["model.embed_tokens.weight"][2].norm()
    direction["model.embed_tokens.weight"][2] = 0.0
    assert own > 0.1 * alignment.norm(direction)  # much would have been lost


def state(model) -> dict:
    """Everything that `faithful` may touch."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (module.training, getattr(module, "gradient_checkpointing", None), len(module._forward_hooks))
        if isinstance(module, torch.nn.Embedding):
            found[name] += (module.padding_idx, module.scale_grad_by_freq, module.sparse)
    return found | {"kernels": (model.config._attn_implementation, model.config._experts_implementation)}


def with_dropout():
    model = build("gpt_neox", hidden_dropout=0.5, attention_dropout=0.5).train()
    model.gpt_neox.layers[1].eval()  # what is no longer trained, say
    return model


def with_checkpointing():
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    return model


def with_marked_activations():
    model = build("qwen3")
    model.enable_input_require_grads()
    return model


def with_odd_embeddings():
    model = build("qwen3, tied", **PADDED)
    model.get_input_embeddings().scale_grad_by_freq = True
    return model


def with_sparse_embeddings():
    model = build("llama")
    model.get_input_embeddings().sparse = True
    return model


class NoForward(torch.autograd.Function):
    """A fused attention has a backward pass of its own, and no forward derivative."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        ctx.save_for_backward(query, key, value, mask)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        with torch.enable_grad():
            parts = [t.detach().requires_grad_() for t in (query, key, value)]
            out = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
        return *torch.autograd.grad(out, parts, grad), None


def fused(module, query, key, value, mask, scaling=None, **kwargs):
    return NoForward.apply(query, key, value, mask).transpose(1, 2), None


def with_fused_attention():
    model = build("gpt_neox")
    AttentionInterface.register("fused_for_a_test", fused)
    model.config._attn_implementation = "fused_for_a_test"
    return model


ODD = [
    with_dropout,
    with_checkpointing,
    with_marked_activations,
    with_odd_embeddings,
    with_sparse_embeddings,
    with_fused_attention,
    lambda: build("mixtral"),
    lambda: build("gpt_oss"),
]


@pytest.mark.parametrize("make", ODD)
def test_whatever_state_a_model_is_in_it_is_measured_as_a_plain_function(make):
    """And is left in that state, after an error too. Its plain twin has the same weights and nothing odd about it."""
    model = make()
    twin = make().eval()
    twin.disable_input_require_grads()
    for module in twin.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx, module.scale_grad_by_freq, module.sparse = None, False, False
    twin.config._attn_implementation = twin.config._experts_implementation = "eager"
    batch, before = reading_its_padding(), state(model)
    direction = alignment.target_direction(model, batch)
    plain = alignment.gradient(twin, [(batch, batch.response / len(batch))])
    apart = alignment.norm({name: direction[name] - plain[name] for name in plain})
    assert apart < 1e-5 * alignment.norm(plain)
    _, expected = alignment.token_scores(twin, batch, plain, "backward")
    for method in ("forward", "backward"):
        _, scores = alignment.token_scores(model, batch, direction, method)
        assert (scores - expected).abs().max() < 1e-5 * expected.abs().max(), method
        assert state(model) == before
    with pytest.raises(ZeroDivisionError), faithful(model):
        assert state(model) != before
        raise ZeroDivisionError
    assert state(model) == before


@pytest.mark.parametrize("make", [lambda: build("mixtral"), with_fused_attention])
def test_why_kernels_are_replaced(make):
    """As transformers runs them they have no forward derivative: torch says so, it does not go wrong."""
    model, batch = make(), random_batch(2)
    direction = alignment.target_direction(model, batch)
    with pytest.raises(RuntimeError):
        alignment._forward(model, batch, direction, 1.0)


def test_log_probs_and_divergences_of_a_model_in_training_are_those_of_its_function():
    model, reference, batch = with_dropout(), build("gpt_neox", seed=1), random_batch(6)
    found = sequence_logps(model, batch), *likelihood.entropy_and_kl(model, reference, batch)
    model.eval()
    again = sequence_logps(model, batch), *likelihood.entropy_and_kl(model, reference, batch)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_embeddings_that_change_when_they_are_read_are_refused():
    model = build("llama")
    model.get_input_embeddings().max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm"):
        alignment.target_direction(model, random_batch(2))


def test_a_model_of_which_nothing_may_move_has_no_gradient():
    model = build("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        alignment.target_direction(model, random_batch(2))


def checked(model, method: str, rows: int = 16) -> float:
    """The part of what rounding explains that there is, with weights of both signs."""
    batch, direction = random_batch(rows, seed=1), alignment.target_direction(model, random_batch(5, seed=2))
    w = torch.randn(batch.ids.shape, generator=torch.Generator().manual_seed(0)) * batch.response
    scored = alignment.token_scores(model, batch, direction, method)
    return alignment.check("here", method, w, scored, alignment.gradient(model, [(batch, w)]), direction)


@pytest.mark.parametrize("precision", list(alignment.TOLERANCES["forward"]))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounding_is_well_within_what_it_may_do(architecture, precision):
    """In each precision as transformers computes in it: float64 passes through float32 here."""
    for method in alignment.TOLERANCES:
        if precision in alignment.TOLERANCES[method]:
            assert checked(build(architecture).to(precision), method) < 0.2, method


def test_rounding_is_within_it_for_a_policy_that_knows_its_answers():
    """Where p is near 1 a score is the small difference of two large numbers."""
    model, batch = build("gpt_neox"), random_batch(16, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        (-token_logps(model, batch).sum() / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    p = token_logps(model, batch).detach()[batch.response].exp()
    assert p.mean() > 0.99
    assert checked(model, "forward") < 0.2 and checked(model, "central") < 0.2


def test_a_measurement_that_is_wrong_is_found_out(monkeypatch):
    """By a hundredth, by the sign of one token, by a number that is none, or by modes that differ."""
    model, batch = build("gpt_neox"), random_batch(16, seed=1)
    direction = alignment.target_direction(model, random_batch(5, seed=2))
    logps, scores = alignment.token_scores(model, batch, direction)
    w = batch.response.float()
    ascent = alignment.gradient(model, [(batch, w)])
    assert alignment.check("step 7", "forward", w, (logps, scores), ascent, direction) < 0.2
    one_turned = torch.where(scores.abs() == scores.abs().max(), -scores, scores)
    for bad in (1.01 * scores, one_turned, scores / 0.0):
        with pytest.raises(alignment.MeasurementError, match=r"step 7, method='forward': .* G = .* backward pass"):
            alignment.check("step 7", "forward", w, (logps, bad), ascent, direction)
    padded, rows = build("llama, tied", **PADDED), reading_its_padding()
    monkeypatch.setattr(alignment, "faithful", lambda model: contextlib.nullcontext())
    direction = alignment.target_direction(padded, rows)
    w = rows.response.float()
    scored, ascent = alignment.token_scores(padded, rows, direction), alignment.gradient(padded, [(rows, w)])
    with pytest.raises(alignment.MeasurementError):
        alignment.check("step 7", "forward", w, scored, ascent, direction)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_central_differences_of_coarse_numbers_are_refused(precision):
    model, batch = build("gpt_neox"), random_batch(4)
    direction = alignment.target_direction(model, batch)
    coarse = {name: t.to(precision) for name, t in direction.items()}
    name = str(precision).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"method='central': .*{name}.*use method='forward' or a model in float32"):
        alignment.token_scores(build("gpt_neox").to(precision), batch, coarse, "central")


class Mixed(torch.nn.Module):
    """A table in one precision on frozen logits in another; `dtype` is that of its first parameter."""

    def __init__(self, moving: torch.dtype, frozen: torch.dtype, out: torch.dtype):
        super().__init__()
        self.base = torch.nn.Parameter(torch.zeros(3, 3, dtype=frozen), requires_grad=False)
        self.table, self.out = Table(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).to(moving), out

    dtype, device = property(lambda self: self.base.dtype), torch.device("cpu")

    def forward(self, input_ids, logits_to_keep=slice(None), **kwargs):
        result = self.table(input_ids, logits_to_keep)
        result.logits = (result.logits + self.base[input_ids[:, logits_to_keep]].to(result.logits.dtype)).to(self.out)
        return result


def test_what_moves_says_how_precise_central_differences_are():
    """Not the first parameter; and not what moves either, if the logits are coarser."""
    batch, direction = pad([[0, 1]], [[2, 1, 0]], 0), {"table.table": torch.ones(3, 3).triu()}
    model = Mixed(torch.float32, torch.bfloat16, torch.float32)
    assert model.dtype == torch.bfloat16
    _, scores = alignment.token_scores(model, batch, direction, "central")
    _, expected = alignment.token_scores(model, batch, direction, "backward")
    assert (scores - expected).abs().max() < 1e-3 * expected.abs().max()
    for coarse in (
        Mixed(torch.bfloat16, torch.float32, torch.float32),
        Mixed(torch.float32, torch.float32, torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=r"method='central': .*bfloat16"):
            alignment.token_scores(coarse, batch, direction, "central")


WORDS = [f"w{i}" for i in range(VOCAB - 4)]


@pytest.mark.parametrize(
    ("architecture", "method"), [("gpt_neox", "forward"), ("mixtral", "forward"), ("bloom", "central")]
)
def test_the_method_is_what_works(architecture, method):
    tokenizer = policy.word_tokenizer(WORDS)
    assert alignment.choose_method(build(architecture), tokenizer) == method


def test_forward_mode_that_is_wrong_is_not_chosen(monkeypatch):
    """An operation whose forward derivative is wrong by a tenth, as its author's mistake may be."""
    tokenizer, forward = policy.word_tokenizer(WORDS), alignment._forward
    monkeypatch.setitem(alignment.METHODS, "forward", lambda *args: tuple(1.1 * t for t in forward(*args)))
    assert alignment.choose_method(build("gpt_neox"), tokenizer) == "central"


def test_a_model_that_no_method_can_measure_is_refused_with_all_reasons():
    tokenizer = policy.word_tokenizer(WORDS)
    with pytest.raises(
        alignment.MeasurementError, match=r"forward: RuntimeError: .* \| central: ValueError: .*bfloat16"
    ):
        alignment.choose_method(build("bloom").to(torch.bfloat16), tokenizer)


@pytest.mark.parametrize("architecture", ["gptj", "phi"])
def test_tokens_that_are_never_drawn_change_nothing(exact, architecture):
    """Unused ids whose output bias is -inf: every number is that of the model without these tokens."""
    model, less = build(architecture), build(architecture)
    unused = slice(VOCAB - 5, VOCAB)
    batch, targets = random_batch(6, seed=1, vocab=VOCAB - 5), random_batch(3, seed=2, vocab=VOCAB - 5)
    with torch.no_grad():
        model.lm_head.bias[unused] = -torch.inf
        less.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[: unused.start].clone())
        less.lm_head.bias = torch.nn.Parameter(model.lm_head.bias[: unused.start].clone())
    direction, fewer = (alignment.target_direction(m, targets) for m in (model, less))
    assert alignment.norm(direction).item() == pytest.approx(alignment.norm(fewer).item(), rel=1e-8)
    _, expected = alignment.token_scores(less, batch, fewer, "backward")
    for method, bound in (("forward", 1e-8), ("backward", 1e-8), ("central", 1e-4)):
        _, scores = alignment.token_scores(model, batch, direction, method)
        assert (scores - expected).abs().max() < bound * expected.abs().max(), method
    assert model.lm_head.bias[unused].isneginf().all()
    tokenizer = policy.word_tokenizer(WORDS)
    assert alignment.choose_method(model.float(), tokenizer) == "forward"
