"""The trainer: the same step as autograd's, the same run when it was interrupted, schedules as worked by hand."""

import copy
import functools
import math
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prefdyn.lab import train
from prefdyn.lab.train import Controlled, Optimisation
from prefdyn.lens import controls
from prefdyn.lens.controls import Control
from prefdyn.lens.likelihood import sequence_logps, token_logps
from prefdyn.lens.weights import TokenWeights
from prefdyn.methods.dpo import DPO
from prefdyn.methods.ppo import PPO
from prefdyn.methods.sft import SFT
from toys.models import build, random_batch

CONFIG = Optimisation(steps=12, batch_size=4, lr=1e-2, seed=3)


def dpo() -> DPO:
    """Ten pairs, and as reference a model that is not trained here."""
    chosen, rejected, reference = random_batch(10, seed=1), random_batch(10, seed=2), build("gpt_neox", seed=9)
    return DPO(chosen, rejected, *(sequence_logps(reference, b) for b in (chosen, rejected)), beta=0.3)


def ppo() -> PPO:
    """Ten rollouts of another policy, a little different at temperature 0.7, some of them beyond the clip."""
    rollouts, rng = random_batch(10, seed=1), torch.Generator().manual_seed(0)
    noise, advantages = (torch.randn(rollouts.ids.shape, generator=rng) for _ in range(2))
    old = token_logps(build("gpt_neox"), rollouts, 0.7).detach() + 0.2 * noise
    return PPO(rollouts, old, advantages, clip=0.2, temperature=0.7)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], bound: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= bound, name


def fit(model, objective, config, **more):
    """`train.fit` without checkpoints unless they are asked for."""
    return train.fit(model, objective, config, **{"at": [], "on_checkpoint": lambda step, optimizer: None} | more)


class Crash(Exception):
    """What stops a run in the middle."""


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("control", ["full", "top"])
def test_an_interrupted_run_continues_bit_by_bit(tmp_path, optimizer, control):
    """Stopped twice, each time with fresh objects afterwards: same weights, log and checkpoints as in one go."""
    config, at = replace(CONFIG, optimizer=optimizer), [0, 2, 5, 9, 12]
    model = build("gpt_neox")
    whole: dict[int, dict] = {}
    log = fit(
        model,
        dpo(),
        config,
        control=Control(part=control),
        at=at,
        on_checkpoint=lambda s, _: whole.update({s: weights_of(model)}),
    )
    assert sorted(whole) == at
    seen: dict[int, dict] = {}
    for crash_at in (5, 9, None):
        again = build("gpt_neox")

        def on_checkpoint(step, optimizer, again=again, crash_at=crash_at):
            if step == crash_at:
                raise Crash
            seen[step] = weights_of(again)

        ticks: list[None] = []
        tick = functools.partial(ticks.append, None)
        settings = {"at": at, "on_checkpoint": on_checkpoint, "state": tmp_path, "tick": tick}
        if crash_at:
            with pytest.raises(Crash):
                fit(again, dpo(), config, control=Control(part=control), **settings)
        else:
            resumed = fit(again, dpo(), config, control=Control(part=control), **settings)
            assert len(ticks) == config.steps  # the bar reaches its end
    assert resumed == log and len(log) == config.steps
    assert sorted(seen) == at
    for step in at:
        assert_equal_weights(seen[step], whole[step])
    assert_equal_weights(weights_of(again), weights_of(model))


def test_state_is_left_at_checkpoints_and_only_the_last_is_kept(tmp_path):
    fit(build("gpt_neox"), dpo(), CONFIG, at=[0, 6, 12], state=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-12.safetensors", "state.json"]
    calls, model = [], build("gpt_neox", seed=5)
    log = fit(
        model, dpo(), CONFIG, at=[0, 6, 12], on_checkpoint=lambda step, optimizer: calls.append(step), state=tmp_path
    )
    assert calls == [] and [row["step"] for row in log] == list(range(12))  # it was finished


def test_half_written_state_is_not_read(tmp_path):
    """What a crash leaves before the last move, a tensor file without its JSON, is ignored and cleared away."""
    (tmp_path / "state-6.safetensors").write_bytes(b"half")
    (tmp_path / "state.json.new").write_text("{")
    calls: list[int] = []
    fit(
        build("gpt_neox"),
        dpo(),
        CONFIG,
        at=[0, 12],
        on_checkpoint=lambda step, optimizer: calls.append(step),
        state=tmp_path,
    )
    assert calls == [0, 12]
    assert not (tmp_path / "state-6.safetensors").exists()


@pytest.mark.parametrize("objective", ["sft", "dpo", "ppo"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_make_the_same_step(double, objective, micro_batch):
    """Weights of the whole batch, gradient in parts: DPO's pairs are split between parts, and nothing changes."""

    def trained(micro: int):
        model = build("gpt_neox")
        made = {"sft": lambda: SFT(random_batch(10)), "dpo": dpo, "ppo": ppo}[objective]()
        log = fit(
            model, made, replace(CONFIG, steps=3, micro_batch=micro, optimizer="sgd"), control=Control(part="positive")
        )
        return weights_of(model), log

    (whole, log), (parts, part_log) = trained(0), trained(micro_batch)
    # transformers' softmax rounds to float32, but the same numbers whatever the part
    assert_equal_weights(whole, parts, bound=1e-10)
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in part_log], abs=1e-10)
    assert [row["gradient_norm"] for row in log] == pytest.approx([r["gradient_norm"] for r in part_log], abs=1e-8)


def test_a_step_of_sgd_goes_down_the_gradient_of_the_published_loss(double):
    """theta - lr * grad of mean -log sigmoid(beta * margin), on the examples of that step, without clipping."""
    config = Optimisation(steps=1, batch_size=4, lr=0.05, optimizer="sgd", warmup=0.0, clip=0.0, seed=1)
    model, objective = build("gpt_neox"), dpo()
    expected = build("gpt_neox")
    index = train.example_order(10, 0, config)
    logps = token_logps(expected, objective.batch(index)).sum(-1)
    margin = logps[:4] - logps[4:] - (objective.reference[0][index] - objective.reference[1][index])
    loss = torch.log1p(torch.exp(-0.3 * margin)).mean()
    loss.backward()
    gradient_norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in expected.parameters()))
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.05 * parameter.grad
    (row,) = fit(model, objective, config)
    assert_equal_weights(weights_of(model), weights_of(expected), bound=1e-12)
    assert row == {
        "step": 0,
        "examples": zlib.crc32(b"".join(i.to_bytes(8, "little") for i in index.tolist())),
        "loss": pytest.approx(loss.item()),
        "margin": pytest.approx(margin.mean().item()),
        "accuracy": pytest.approx((margin > 0).double().mean().item()),
        "logp_chosen": pytest.approx(logps[:4].mean().item()),
        "logp_rejected": pytest.approx(logps[4:].mean().item()),
        "gradient_norm": pytest.approx(gradient_norm),
        "lr": 0.05,
    }


def test_a_digest_tells_examples_and_their_order():
    a, b = torch.tensor([3, 1, 2]), torch.tensor([1, 2, 3])
    assert train.digest(a) == train.digest(a.clone()) == train.digest(a.int())
    assert len({train.digest(a), train.digest(b), train.digest(b[:2])}) == 3


def test_the_scale_of_adamw_is_what_its_next_step_would_use(double):
    """After gradients g and h, what k gets: v = (0.999^2 g^2 + 0.999 h^2 + k^2) * 0.001 / (1 - 0.999^3).

    An optimiser whose momentum is forgotten steps by -lr * (1 - 0.9) / (1 - 0.9^3) * scale * k.
    """
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = train.make_optimizer(model, Optimisation(steps=2, batch_size=1, lr=0.1))
    assert train.second_moment(model, optimizer) == {}
    g, h, k = (torch.tensor([row]) for row in ([1.0, -2.0, 0.5], [3.0, 0.1, 0.0], [-1.0, 4.0, 2.0]))
    first = train.adamw_scale({"weight": g}, {}, clip=0.0)["weight"]
    assert torch.allclose(first, 1 / (g.abs() + 1e-8), rtol=1e-12)  # the first step goes along the sign
    for gradient in (g, h):
        model.weight.grad = gradient
        optimizer.step()
    moment = train.second_moment(model, optimizer)
    assert moment[train.UPDATES].item() == 2
    assert torch.allclose(moment["weight"], 0.999 * 0.001 * g**2 + 0.001 * h**2, rtol=1e-12)
    scale = train.adamw_scale({"weight": k}, moment, clip=0.0)["weight"]
    v = (0.999**2 * 0.001 * g**2 + 0.999 * 0.001 * h**2 + 0.001 * k**2) / (1 - 0.999**3)
    assert torch.allclose(scale, 1 / (v.sqrt() + 1e-8), rtol=1e-9)
    before = model.weight.detach().clone()
    optimizer.state[model.weight]["exp_avg"].zero_()
    model.weight.grad = k
    optimizer.step()
    assert torch.allclose(model.weight.detach() - before, -0.1 * 0.1 / (1 - 0.9**3) * scale * k, rtol=1e-6)
    plain = train.make_optimizer(model, Optimisation(steps=2, batch_size=1, lr=0.1, optimizer="sgd"))
    plain.step()
    assert train.second_moment(model, plain) == {}


def test_the_scale_of_adamw_holds_what_clipping_takes_away(double):
    """(3, 4) has norm 5: clipped to 1 it is (0.6, 0.8), and its first step has the same sign and size as before."""
    gradient = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    clipped, free = train.adamw_scale(gradient, {}, clip=1.0), train.adamw_scale(gradient, {}, clip=9.0)
    assert [clipped[n].item() * gradient[n].item() for n in "ab"] == pytest.approx([1, 1], rel=1e-6)
    moment = {train.UPDATES: torch.tensor([1.0]), "a": torch.tensor([0.001]), "b": torch.tensor([0.001])}
    clipped, free = (train.adamw_scale(gradient, moment, clip) for clip in (1.0, 9.0))
    v = {n: (0.999 * 0.001 + 0.001 * (g.item() / 5) ** 2) / (1 - 0.999**2) for n, g in gradient.items()}
    for n in "ab":
        assert clipped[n].item() == pytest.approx(0.2 / v[n] ** 0.5, rel=1e-6) and free[n] < 1.0


def test_no_parameter_seems_to_move_by_miles(double):
    """A gradient where there was almost none before: at most sqrt((1 - 0.999^3) / 0.001), about sqrt 3, times lr."""
    moment = {train.UPDATES: torch.tensor([2.0]), "w": torch.tensor([1e-20])}
    scale = train.adamw_scale({"w": torch.tensor([5.0])}, moment, clip=0.0)["w"]
    assert 5 * scale.item() == pytest.approx(math.sqrt((1 - 0.999**3) / 0.001), rel=1e-6)


def test_a_schedule_reaches_training_at_its_steps(double):
    """Negative learning left out until update 2: the first two steps are those of positive learning alone."""
    config = replace(CONFIG, steps=4, optimizer="sgd")
    late = Control(factors={"negative": ((0, 0.0), (2, 0.0), (2, 1.0))})
    ways = {"late": late, "positive": Control(part="positive"), "full": Control()}
    kept: dict[str, dict] = {}
    for name, control in ways.items():
        model = build("gpt_neox")
        seen = kept[name] = {}
        keep = lambda step, _, seen=seen, model=model: seen.update({step: weights_of(model)})  # noqa: E731
        fit(model, dpo(), config, control=control, at=[0, 1, 2, 3, 4], on_checkpoint=keep)
    for step in (1, 2):
        assert_equal_weights(kept["late"][step], kept["positive"][step])
    largest = [
        max((kept["late"][step][k] - kept[other][step][k]).abs().max() for k in kept["late"][step])
        for step, other in ((3, "positive"), (1, "full"))
    ]
    assert min(largest) > 1e-6


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_step_of_sgd_goes_down_the_surrogate_at_its_temperature(double, micro_batch):
    """theta - lr * grad of -mean of min(r A, clip(r) A), with r from softmax(logits / 0.7), on the whole logits."""
    config = replace(CONFIG, steps=1, batch_size=10, optimizer="sgd", warmup=0.0, clip=0.0, micro_batch=micro_batch)
    model, expected, objective = build("gpt_neox"), build("gpt_neox"), ppo()
    rollouts = objective.rollouts
    positions = (rollouts.attention.long().cumsum(-1) - 1).clamp(min=0)
    out = expected(input_ids=rollouts.ids, attention_mask=rollouts.attention.long(), position_ids=positions)
    table = (out.logits[:, :-1] / 0.7).log_softmax(-1)
    now, inside = table.gather(-1, rollouts.ids[:, 1:, None]).squeeze(-1), rollouts.response[:, 1:]
    ratio, a = (now - objective.old_logps[:, 1:]).exp()[inside], objective.advantages[:, 1:][inside]
    assert 0.1 < ((ratio - 1).abs() > 0.2).double().mean() < 0.9
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= config.lr * parameter.grad
    (row,) = fit(model, objective, config)
    # transformers' softmax rounds to float32
    assert_equal_weights(weights_of(model), weights_of(expected), bound=1e-8)
    moved = max((p - q).abs().max() for p, q in zip(expected.parameters(), build("gpt_neox").parameters(), strict=True))
    assert moved > 1e-3 and row["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_clipping_shortens_the_step_to_the_given_norm(double):
    """With a bound far below the gradient's norm, a step of SGD is lr * bound long."""
    model = build("gpt_neox")
    before = weights_of(model)
    config = Optimisation(steps=1, batch_size=4, lr=0.5, optimizer="sgd", warmup=0.0, clip=1e-3)
    (row,) = fit(model, dpo(), config)
    after = weights_of(model)
    length = math.sqrt(sum((after[name] - before[name]).pow(2).sum().item() for name in after))
    assert row["gradient_norm"] > 0.01
    assert length == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_controls_and_objectives_are_learnt_from():
    """SFT lowers the loss that it trains on; DPO's positive learning raises the chosen responses."""
    for objective, control in ((SFT(random_batch(10)), "full"), (dpo(), "full"), (dpo(), "positive")):
        log = fit(build("gpt_neox"), objective, replace(CONFIG, steps=25, batch_size=10), control=Control(part=control))
        assert log[-1]["loss"] < 0.9 * log[0]["loss"]
        if control == "positive":
            assert log[-1]["logp_chosen"] > log[0]["logp_chosen"] + 1


def test_learning_rates_by_hand():
    """Ten steps, a fifth of warm-up: 1/2, 2/2, then from 8/8 down by eighths; the step after the last would be 0."""
    config = Optimisation(steps=10, batch_size=1, lr=1.0, warmup=0.2)
    rates = [train.learning_rate(config, step) for step in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    constant = replace(config, schedule="constant")
    assert [train.learning_rate(constant, step) for step in range(10)] == [0.5] + [1.0] * 9
    no_warmup = replace(config, warmup=0.0, steps=2)
    assert [train.learning_rate(no_warmup, step) for step in range(2)] == [1.0, 0.5]


def test_the_log_says_which_learning_rate_was_used():
    log = fit(build("gpt_neox"), dpo(), CONFIG)
    assert [row["lr"] for row in log] == [train.learning_rate(CONFIG, step) for step in range(12)]


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 10), (7, 3), (5, 1), (4, 4)])
def test_every_epoch_sees_every_example_once(size, batch):
    config = Optimisation(steps=0, batch_size=batch, lr=1.0, seed=8)
    steps = 3 * size  # `batch` whole passes three times over
    stream = torch.cat([train.example_order(size, step, config) for step in range(steps)]).reshape(-1, size)
    assert stream.shape == (3 * batch, size)
    assert (stream.sort(1).values == torch.arange(size)).all()
    if size > 4:
        assert len({tuple(epoch) for epoch in stream.tolist()}) > 1


def test_the_order_depends_on_the_seed_alone():
    config = Optimisation(steps=0, batch_size=16, lr=1.0, seed=8)
    first = train.example_order(64, 5, config)
    torch.manual_seed(1)
    assert torch.equal(train.example_order(64, 5, replace(config, steps=99, lr=2.0)), first)
    assert not torch.equal(train.example_order(64, 5, replace(config, seed=9)), first)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        # 8 * (i / 4)^1.5 for i = 0 to 4: 0, 1, 2.83, 5.20, 8
        (8, 5, [0, 1, 3, 5, 8]),
        (100, 2, [0, 100]),
        (2, 9, [0, 1, 2]),  # no more checkpoints than steps
        (0, 4, [0]),
    ],
)
def test_checkpoints_by_hand(steps, count, expected):
    assert train.checkpoint_steps(steps, count) == expected


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: train.checkpoint_steps(9, 1), ValueError, "checkpoints=1"),
        (lambda: fit(build("gpt_neox"), dpo(), replace(CONFIG, batch_size=11)), ValueError, "batch_size=11: more than"),
        (lambda: fit(build("gpt_neox"), dpo(), replace(CONFIG, optimizer="lion")), ValueError, "optimizer='lion'"),
        (lambda: fit(build("gpt_neox"), dpo(), replace(CONFIG, schedule="cosine")), ValueError, "schedule='cosine'"),
        (lambda: Control(part="best"), ValueError, "control='best'"),
    ],
)
def test_impossible_settings_are_named(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm():
    model = build("gpt_neox")
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = torch.inf
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match=r"not finite.*smaller learning rate"):
        fit(model, SFT(random_batch(10)), CONFIG)
    for name, value in weights_of(model).items():
        assert torch.equal(value, before[name]), name


def test_nothing_is_written_without_a_state_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(build("gpt_neox"), dpo(), CONFIG, at=[0, 12])
    assert list(Path(tmp_path).iterdir()) == []


def weighed(objective) -> TokenWeights:
    """Weights of pairs 2, 0 and 7, away from the reference."""
    index = torch.tensor([2, 0, 7])
    batch = objective.batch(index)
    logps = -torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(0)) * batch.response
    return objective.weights(logps, batch, index)


LATE = {"negative": ((2, 0.5), (6, 1.0))}  # half of the way at update 4
JUMP = {"negative": ((0, 0.0), (3, 0.0), (3, 2.0)), "positive": ((0, 3.0),)}


@pytest.mark.parametrize(
    ("control", "step", "positive", "negative"),
    [
        (Control(part="positive"), 0, 1, 0),
        (Control(part="negative"), 9, 0, 1),
        (Control(factors=LATE), 0, 1, 0.5),
        (Control(factors=LATE), 4, 1, 0.75),
        (Control(factors=LATE), 6, 1, 1),
        (Control(factors=JUMP), 2, 3, 0),
        (Control(factors=JUMP), 3, 3, 2),
        (Control(part="positive", factors={"positive": ((0, 0.0), (4, 1.0))}), 1, 0.25, 0),
    ],
)
def test_an_objective_under_control_has_the_weights_that_training_steps_on(double, control, step, positive, negative):
    """Its positive weights times one factor and its negative ones times another; strengths and units stay."""
    plain, held = weighed(dpo()), weighed(Controlled(dpo(), control, step))
    assert (plain.w > 0).any() and (plain.w < 0).any()
    assert torch.equal(held.w, torch.where(plain.w > 0, positive * plain.w, negative * plain.w))
    assert torch.equal(held.w, controls.apply_in_training(control, plain, step))
    assert torch.equal(held.strength, plain.strength) and torch.equal(held.unit, plain.unit)


def test_thirds_that_are_not_defined_are_left_as_in_training(double):
    """At the reference every omega is 1/2: the top third is everything, not a NaN."""
    objective, index = dpo(), torch.arange(10)
    batch = objective.batch(index)
    logps = batch.response * (torch.cat(objective.reference) / batch.response.sum(-1))[:, None]
    plain, held = (o.weights(logps, batch, index).w for o in (objective, Controlled(objective, Control(part="top"), 0)))
    assert torch.equal(plain, held) and plain.abs().sum() > 0


def test_all_else_of_an_objective_under_control_is_the_objective(double):
    objective, index = ppo(), torch.tensor([1, 4])
    held = Controlled(objective, Control(part="positive"), 0)
    batch = held.batch(index)
    assert (held.size, held.temperature) == (10, 0.7) and torch.equal(batch.ids, objective.batch(index).ids)
    logps = 0.9 * objective.old_logps[index]
    assert held.metrics(logps, batch, index) == objective.metrics(logps, batch, index)
    with pytest.raises(AttributeError, match="weather"):
        held.weather()
    assert copy.copy(held).size == 10


def test_without_reweighting_there_is_nothing_left_to_reweight(double):
    """Taken out once more it changes nothing."""
    held = weighed(Controlled(dpo(), Control(part="uniform"), 3))
    assert torch.allclose(controls.apply("uniform", held), held.w, rtol=1e-12) and held.strength.unique().numel() == 1
    assert not torch.allclose(held.w, weighed(dpo()).w, rtol=1e-3)
