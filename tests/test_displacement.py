"""When a chosen response falls: the condition by hand, against backward passes per token, and against real steps."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from prefdyn.lens import alignment, displacement
from prefdyn.lens.batch import Batch, pad
from prefdyn.lens.likelihood import sequence_logps
from toys.models import ARCHITECTURES, Table, build, lift_float32, random_batch


@pytest.fixture
def exact(double, monkeypatch):
    """Float64 from end to end: transformers' own classes would pass through float32 on the way."""
    lift_float32(monkeypatch)


def test_condition_by_hand(double):
    """All logits of two tokens equal: the gradient of log pi(y | x) is u = (-1/2, 1/2) in row x for y = 1, -u for 0.

    Chosen 0 -> 1 has g_c = u in row 0, of squared length 1/2. Rejected, in turn:
      0 -> 0:        -u in row 0, so <g_r, g_c> = -1/2: both halves of a step raise the chosen response.
      0 -> 1 0 1:    u in row 0, twice, for the text comes back to it, and -u in row 1: 1, more than 1/2: it falls.
      0 -> 1 1:      u in both rows: 1/2, and to first order nothing changes.
    """
    model = Table([[0.0, 0.0], [0.0, 0.0]])
    chosen, rejected = pad([[0]] * 3, [[1]] * 3, 0), pad([[0]] * 3, [[0], [1, 0, 1], [1, 1]], 0)
    own, shared = displacement.condition(model, chosen, rejected)
    assert own.tolist() == pytest.approx([0.5] * 3)
    assert shared.tolist() == pytest.approx([-0.5, 1.0, 0.5])
    for row, slope in enumerate((1.0, -0.5, 0.0)):
        step = {
            "table": sum(
                s * displacement.response_gradient(model, b, row)["table"] for s, b in ((1, chosen), (-1, rejected))
            )
        }
        change = displacement.after_moving(model, step, [1e-6], chosen.rows(slice(row, row + 1)))
        assert change.item() / 1e-6 == pytest.approx(slope, abs=1e-5)


def sides(rows: int = 4, side: str = "right") -> tuple[Batch, Batch]:
    """Chosen and rejected responses to the same prompts, of different lengths."""
    rng = torch.Generator().manual_seed(5)

    def tokens() -> list[int]:
        return torch.randint(1, 23, (int(torch.randint(1, 7, (1,), generator=rng)),), generator=rng).tolist()

    prompts = [tokens() for _ in range(rows)]
    return tuple(pad(prompts, [tokens() for _ in range(rows)], 0, side) for _ in range(2))


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3, tied"])
def test_condition_is_the_change_by_a_small_step(exact, architecture):
    """(change by a step of size s along g_c - g_r) / (s * condition) goes to 1, and what is missing falls as s^2."""
    model = build(architecture)
    chosen, rejected = sides()
    own, shared = displacement.condition(model, chosen, rejected)
    for row in range(len(chosen)):
        g_c, g_r = (displacement.response_gradient(model, side, row) for side in (chosen, rejected))
        step = {name: g_c[name] - g_r[name] for name in g_c}
        slope = (own - shared)[row].item()
        assert alignment.inner(step, g_c).item() == pytest.approx(slope, rel=1e-10)
        sizes = [2e-4 / float(alignment.inner(step, step)) / 2**k for k in range(4)]
        changes = displacement.after_moving(model, step, sizes, chosen.rows(slice(row, row + 1)))[:, 0].tolist()
        errors = [abs(change - size * slope) for change, size in zip(changes, sizes, strict=True)]
        assert changes[-1] / (sizes[-1] * slope) == pytest.approx(1, abs=1e-2)
        orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
        assert orders[-1] == pytest.approx(2, abs=0.1), (row, orders)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_condition_against_a_backward_pass_per_token(exact, architecture):
    """Scores of tokens along g_c, by one backward pass a token and by forward mode, sum to both inner products."""
    model = build(architecture)
    chosen, rejected = sides()
    own, shared = displacement.condition(model, chosen, rejected)
    for row in range(len(chosen)):
        g_c = displacement.response_gradient(model, chosen, row)
        for method in ("backward", "forward"):
            for batch, expected in ((chosen, own), (rejected, shared)):
                _, scores = alignment.token_scores(model, batch.rows(slice(row, row + 1)), g_c, method)
                assert scores.sum().item() == pytest.approx(expected[row].item(), rel=1e-8), (method, row)


class States(torch.nn.Module):
    """A policy of which only the last hidden states matter here: one vector a token, whatever is before it."""

    def __init__(self, states):
        super().__init__()
        self.states = torch.as_tensor(states, dtype=torch.get_default_dtype())

    @property
    def base_model(self):
        return lambda input_ids, **kwargs: SimpleNamespace(last_hidden_state=self.states[input_ids])


def test_ches_by_hand():
    """States of tokens 0, 1, 2: (1, 0), (0, 2), (3, 1). What predicts a token is the state of the one before it.

    Chosen 0 -> 1 2: states of 0 and 1, sum (1, 2), squared length 5. Rejected, in turn:
      0 -> 2:      that of 0, (1, 0):                    1 - 5 = -4;     with means: (1/2, 1).(1, 0) - 5/4 = -3/4.
      0 -> 2 2 1:  those of 0, 2 and 2, sum (7, 2):      7 + 4 - 5 = 6;  with means: (1/2, 1).(7/3, 2/3) - 5/4 = 7/12.
    """
    model = States([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    chosen, rejected = pad([[0], [0]], [[1, 2], [1, 2]], 0), pad([[0], [0]], [[2], [2, 2, 1]], 0)
    assert displacement.ches(model, chosen, rejected).tolist() == [-4.0, 6.0]
    assert displacement.ches(model, chosen, rejected, normalised=True).tolist() == pytest.approx([-0.75, 7 / 12])
    sums, count = displacement.summed_states(model, rejected, size=1)
    assert sums.tolist() == [[1.0, 0.0], [7.0, 2.0]] and count.tolist() == [1, 3]
    same = torch.tensor([[1.0, 2.0]])
    assert displacement.centred_similarity(same, same).tolist() == [0.0]


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3, tied", "gpt2"])
def test_states_are_those_that_the_logits_are_made_of(exact, architecture):
    """The output layer, applied to the states of a response of one token, gives its logits."""
    model = build(architecture)
    prompts = [[1, 2, 3], [4, 5]]
    sums, _ = displacement.summed_states(model, pad(prompts, [[6], [7]], 0))
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
        assert torch.allclose(model.get_output_embeddings()(sums), expected, atol=1e-10)


def wider(batch: Batch, columns: int = 3) -> Batch:
    """With columns of padding on the right whose tokens are not the padding token."""
    grown = [
        torch.nn.functional.pad(t, (0, columns), value=v)
        for t, v in ((batch.ids, 7), (batch.attention, 0), (batch.response, 0))
    ]
    return Batch(grown[0], grown[1].bool(), grown[2].bool())


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_padding_changes_nothing(exact, architecture):
    model = build(architecture)
    plain = sides()
    expected = [
        *displacement.condition(model, *plain),
        displacement.ches(model, *plain),
        displacement.ches(model, *plain, True),
    ]
    peaks = displacement.peaks(model, plain[0])
    for other in (sides(side="left"), tuple(wider(side) for side in plain)):
        found = [
            *displacement.condition(model, *other),
            displacement.ches(model, *other),
            displacement.ches(model, *other, True),
        ]
        for x, y in zip(found, expected, strict=True):
            assert torch.allclose(x, y, rtol=1e-9)
        for x, y in zip(displacement.peaks(model, other[0], size=2), peaks, strict=True):
            assert torch.allclose(x[other[0].response], y[plain[0].response], atol=1e-12)
            assert (x[~other[0].response] == 0).all()


def test_peaks_by_hand(double):
    """Row 0 of probabilities (1/2, 1/4, 1/4), of 3/2 log 2 nats; row 1 of (0, 0, 1), which has none; then row 2."""
    model = Table([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [0.1, 0.6, 0.3]])
    model.table.data.log_()
    batch = pad([[0], [0]], [[1, 2, 1], [0]], 0)
    likeliest, own, entropy = displacement.peaks(model, batch)
    third = -sum(p * math.log(p) for p in (0.1, 0.6, 0.3))
    assert likeliest.tolist() == [pytest.approx([0, 0.5, 1, 0.6]), pytest.approx([0, 0.5, 0, 0])]
    assert own.tolist() == [pytest.approx([0, 0.25, 1, 0.6]), pytest.approx([0, 0.5, 0, 0])]
    first = 1.5 * math.log(2)
    assert entropy.tolist() == [pytest.approx([0, first, 0, third]), pytest.approx([0, first, 0, 0])]


def test_peaks_belong_to_the_policy():
    """The product of a response's own probabilities is its probability; none is larger than the likeliest."""
    model, batch = build("llama"), random_batch(7, seed=3)
    likeliest, own, entropy = displacement.peaks(model, batch, size=3)
    inside = batch.response
    assert (own[inside] <= likeliest[inside] * (1 + 1e-6)).all() and (entropy[inside] > 0).all()
    total = torch.where(inside, own.clamp(min=1e-38).log(), 0.0).sum(-1)
    assert torch.allclose(total, sequence_logps(model, batch), rtol=1e-4)


def test_a_model_that_was_moved_is_put_back():
    model, (chosen, _) = build("gpt_neox"), sides()
    before = {name: p.clone() for name, p in model.named_parameters()}
    step = displacement.response_gradient(model, chosen, 0)
    changes = displacement.after_moving(model, step, [0.0, 1e-4], chosen)
    assert changes.shape == (2, 4) and (changes[0] == 0).all() and changes[1, 0] > 0
    with pytest.raises(RuntimeError):
        displacement.after_moving(model, {name: g[..., :1, None] for name, g in step.items()}, [1.0], chosen)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("score", [displacement.condition, displacement.ches])
def test_pairs_that_are_none_are_refused(score):
    chosen, rejected = sides()
    with pytest.raises(ValueError, match="4 chosen and 3 rejected"):
        score(build("gpt_neox"), chosen, rejected.rows(slice(0, 3)))
