"""D' by choice: gradients in blocks that add up, G and its cosine from whole losses, how responses are drawn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prefdyn.book import plan
from prefdyn.book.params import check
from prefdyn.findings import measure, targets
from prefdyn.findings.targets import TargetSpec, TargetsRun, block_gradients
from prefdyn.lab import chat, evaluate, policy, recipes
from prefdyn.lab.runs import RunStore
from prefdyn.lens import alignment, likelihood
from prefdyn.lens.batch import pad
from prefdyn.methods.dpo import DPO
from prefdyn.methods.ppo import PPO
from prefdyn.methods.sft import SFT
from toys.models import Table, build, lift_float32, random_batch

# checkpoints at 2 * (i / 2)^1.5 = 0, 0.7, 2 for PPO, and likewise at 0, 2, 6 for DPO
SMALL = {
    "max_response": 28,
    "profile": "smoke",
    "pairs": 24,
    "check": 20,
    "demonstrations": 64,
    "validation": 8,
    "held_out": 12,
    "width": 16,
    "sft_steps": 30,
    "batch": 8,
    "epochs": 2.0,
    "lr": 5e-3,
    "checkpoints": 3,
    "probe": 20,
    "ppo_probe": 20,
    "choice_probe": 20,
    "iterations": 2,
    "rollouts": 10,
    "ppo_batch": 5,
    "ppo_lr": 3e-3,
    "temperature": 0.7,
}
WORLD = check(SMALL)


def changed(**given):
    return check(SMALL | given)


RUNS = {
    "sft": plan.sft_run,
    "dpo": lambda p, seed: plan.run(p, seed, "dpo"),
    "ppo": lambda p, seed: plan.run(p, seed, "ppo"),
}
CHOICES = plan.target_choices(WORLD)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def final(store):
    """The final policy of DPO and its tokenizer."""
    return recipes.final_policy(store.get(plan.run(WORLD, 0, "dpo")))


def log_likelihoods(model, batch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of response tokens, [N, T - 1], from the logits of all positions; 0 elsewhere."""
    positions = (batch.attention.long().cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=batch.ids, attention_mask=batch.attention.long(), position_ids=positions)
    table = (out.logits[:, :-1] / temperature).log_softmax(-1)
    return table.gather(-1, batch.ids[:, 1:, None]).squeeze(-1).masked_fill(~batch.response[:, 1:], 0.0)


def losses(model, objective, index: torch.Tensor) -> torch.Tensor:
    """What each example adds to the published loss, [B]."""
    logps = log_likelihoods(model, objective.batch(index), objective.temperature)
    if isinstance(objective, SFT):
        return -logps.sum(-1) / len(index)
    if isinstance(objective, DPO):
        chosen, rejected = logps.sum(-1).chunk(2)
        margin = chosen - objective.reference[0][index] - rejected + objective.reference[1][index]
        return -F.logsigmoid(objective.beta * margin) / len(index)
    ratio, a = (logps - objective.old_logps[index, 1:]).exp(), objective.advantages[index, 1:]
    inside = objective.rollouts.response[index, 1:]
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - objective.high, 1 + objective.high) * a)
    return -surrogate.masked_fill(~inside, 0.0).sum(-1) / inside.sum()


def toy(kind: str, model, size: int):
    """An objective on random examples, whose weights differ from one to the next."""
    rng, rows = torch.Generator().manual_seed(3), random_batch(size, seed=1)
    if kind == "sft":
        return SFT(rows)
    if kind == "dpo":
        reference = (-5 * torch.rand(size, generator=rng) for _ in range(2))
        return DPO(rows, random_batch(size, seed=2), *reference, beta=0.3)
    noise, advantages = (torch.randn(rows.ids.shape, generator=rng) for _ in range(2))
    with torch.no_grad():
        old = likelihood.token_logps(model, rows, 0.7) + 0.2 * noise
    return PPO(rows, old, advantages, clip=0.2, temperature=0.7)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize(("architecture", "size"), [("gpt_neox", 20), ("gpt_neox", 5), ("table", 1_100)])
def test_blocks_are_the_gradient_of_the_loss_in_parts(double, monkeypatch, kind, architecture, size):
    """Each is autograd's of its own examples' share of the loss, also where a block takes several passes."""
    lift_float32(monkeypatch)
    if architecture == "table":
        model = Table(torch.randn(23, 23, generator=torch.Generator().manual_seed(0)))
    else:
        model = build(architecture)
    objective = toy(kind, model, size)
    index = torch.randperm(size, generator=torch.Generator().manual_seed(5))[: size - 1]
    blocks = list(block_gradients(model, objective, index))
    parameters = dict(model.named_parameters())
    shares = losses(model, objective, index).tensor_split(min(8, len(index)))
    assert len(blocks) == len(shares)
    expected = [torch.autograd.grad(-own.sum(), list(parameters.values()), retain_graph=True) for own in shares]
    largest = max(g.abs().max() for block in expected for g in block)
    for (rows, w, block), grads in zip(blocks, expected, strict=True):
        assert rows.ids.shape == w.shape
        for name, grad in zip(parameters, grads, strict=True):
            assert (block[name] - grad).abs().max() < 1e-10 * largest, name
    batch = objective.batch(index)
    with torch.no_grad():
        w = objective.weights(likelihood.token_logps(model, batch, objective.temperature), batch, index).w
    whole = alignment.gradient(model, [(batch, w)], objective.temperature)
    for name in whole:
        assert (sum(block[name] for _, _, block in blocks) - whole[name]).abs().max() < 1e-10 * largest, name


@pytest.mark.parametrize("kind", RUNS)
def test_one_gradient_gives_what_token_scores_give(store, kind):
    """As declared, G is that of the measurement on the same probe, and its error that of the sums of 8 blocks.

    20 examples make blocks of 3, 3, 3, 3, 2, 2, 2, 2; the variance of a sum of 8 is 8 times that of one.
    """
    spec = RUNS[kind](WORLD, seed=0)
    made = store.get(plan.targets_run(WORLD, spec, {"as declared": CHOICES["as declared"]})).frame("targets")
    measured = store.get(plan.alignment_run(WORLD, spec, probe="check"))
    full = measured.frame("alignment").query("component == 'full'")
    assert made["step"].tolist() == full["step"].tolist() == spec.steps()
    assert (made["n"] == 20).all() and (made["g"] != 0).all()
    assert np.allclose(made["g"], full["g"], rtol=1e-4, atol=1e-5 * full["g"].abs().max())
    assert np.allclose(made["logp"], full["logp_targets"], rtol=1e-6)
    for row in made.itertuples():
        own = measured.frame("sequences").query("step == @row.step")["full"].to_numpy(np.float64)
        sums = [own[start:stop].sum() for start, stop in [(3 * i, 3 * i + 3) for i in range(4)]]
        sums += [own[start : start + 2].sum() for start in range(12, 20, 2)]
        assert row.se == pytest.approx(np.sqrt(8 * np.var(sums, ddof=1)), rel=1e-3)


def test_g_and_cosine_of_dpo_from_whole_losses(store, final):
    """G = <grad of the mean NLL of D', grad of the published loss>, both by autograd; the cosine is over both norms."""
    spec = plan.run(WORLD, 0, "dpo")
    table = store.get(plan.targets_run(WORLD, spec, CHOICES)).frame("targets")
    assert table.groupby("step")["choice"].agg(list).tolist() == [list(CHOICES)] * 3
    assert table["cosine"].between(-1, 1).all() and (np.sign(table["cosine"]) == np.sign(table["g"])).all()
    known, limits = recipes.dataset(spec.data), {"max_prompt": 24, "max_response": 28}
    reference, tokenizer = recipes.final_policy(store.get(spec.sft))
    model, _ = recipes.load_checkpoint(store.get(spec), spec.steps()[-1])
    parameters = list(model.parameters())

    def flat(value: torch.Tensor) -> np.ndarray:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]).double().numpy()

    chosen, rejected = (recipes.encode(spec.data, tokenizer, known.check, side) for side in ("chosen", "rejected"))
    ratios = []
    for batch in (chosen, rejected):
        with torch.no_grad():
            ref = log_likelihoods(reference, batch).sum(-1)
        ratios.append(log_likelihoods(model, batch).sum(-1) - ref)
    loss_gradient = flat(-F.logsigmoid(WORLD.beta * (ratios[0] - ratios[1])).mean())
    replies = pad(*evaluate.reply(final[0], tokenizer, known.prompts["held_out"], **limits), 0)
    drawn = {"as declared": replies, "reduction: mean": replies, "responses: chosen": chosen.rows(slice(12))}
    last = table[table["step"] == spec.steps()[-1]].set_index("choice")
    for name, batch in drawn.items():
        logps = log_likelihoods(model, batch).sum(-1)
        assert last.loc[name, "logp"] == pytest.approx(logps.mean().item(), rel=1e-5)
        if name == "reduction: mean":
            logps = logps / batch.response.sum(-1)
        nll_gradient = flat(-logps.mean())
        g = nll_gradient @ loss_gradient
        lengths = np.linalg.norm(nll_gradient) * np.linalg.norm(loss_gradient)
        assert last.loc[name, "g"] == pytest.approx(g, rel=1e-3, abs=1e-5 * lengths)
        assert last.loc[name, "cosine"] == pytest.approx(g / lengths, abs=1e-4)
    # so small a policy answers all prompts alike, and to others what it answers to these
    assert last.drop(index="responses: unrelated")["g"].nunique() == len(CHOICES) - 1


def test_g_of_ppo_from_its_whole_surrogate(store):
    """At temperature 0.7 the surrogate is that of softmax(logits / 0.7); D' is judged as a policy is read, at 1."""
    spec = plan.run(WORLD, 0, "ppo")
    table = store.get(plan.targets_run(WORLD, spec, CHOICES)).frame("targets").set_index(["step", "choice"])
    run, known = store.get(spec), recipes.dataset(spec.data)
    model, tokenizer = recipes.load_checkpoint(run, 1)
    objective, index = spec.prober(store, tokenizer, "check", 20)(1, model)
    assert objective.temperature == 0.7 and len(index) == 20
    parameters = list(model.parameters())
    loss = losses(model, objective, index).sum()
    nll = -log_likelihoods(model, recipes.encode(spec.data, tokenizer, known.check[:12], "chosen")).sum(-1).mean()
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]).double() for value in (loss, nll)]
    row, g = table.loc[(1, "responses: chosen")], (grads[0] @ grads[1]).item()
    assert row["g"] == pytest.approx(g, rel=1e-3)
    assert row["cosine"] == pytest.approx(g / (grads[0].norm() * grads[1].norm()).item(), abs=1e-4)


@pytest.fixture
def wrong_forward(monkeypatch):
    """Forward mode that is wrong by a hundredth, for whatever is measured on more than one row."""
    forward = alignment._forward

    def wrong(model, batch, direction, temperature):
        logps, scores = forward(model, batch, direction, temperature)
        return logps, (1.01 if len(batch) > 1 else 1.0) * scores

    monkeypatch.setitem(alignment.METHODS, "forward", wrong)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("aware", [True, False])
def test_a_measurement_that_is_wrong_is_not_kept(store, tmp_path, wrong_forward, kind, aware):
    """Every table that depends on it is refused, with the step and both numbers."""
    spec = RUNS[kind](WORLD, seed=0)
    store.get(spec)
    asked = plan.alignment_run(changed(probe=19, ppo_probe=19), spec, probe="check", aware=aware)
    with pytest.raises(alignment.MeasurementError, match=r"step 0, method='forward': .* G = .* backward pass"):
        store.get(asked)
    other = plan.targets_run(changed(choice_probe=19), spec, {"as declared": CHOICES["as declared"]})
    with pytest.raises(alignment.MeasurementError, match=r"step 0, method='forward': .* G = .* backward pass"):
        store.get(other)
    assert store.find(asked) is None and store.find(other) is None


@pytest.mark.parametrize(("aware", "rows"), [(True, [40, 40]), (False, [8])])
def test_what_is_checked(store, tmp_path, monkeypatch, aware, rows):
    """All rows of a probe, along d and along the optimiser's steps, where their gradient is there, else the first."""
    spec, seen, check_scores = plan.run(WORLD, 0, "dpo"), [], alignment.check

    def noted(where, method, w, *rest):
        seen.append((where, method, len(w)))
        return check_scores(where, method, w, *rest)

    store.get(spec)
    asked = plan.alignment_run(WORLD, spec, probe="train", aware=aware).model_copy(update={"method": "central"})
    monkeypatch.setattr(measure, "CHECKED", 8)
    monkeypatch.setattr(alignment, "check", noted)
    asked.compute(tmp_path, store, lambda work: None)  # not by its key, which knows no other number of rows
    names = ["", ", for the optimiser"]
    expected = [(f"step {s}{name}", "central", n) for s in spec.steps() for name, n in zip(names, rows, strict=False)]
    assert seen == expected


def test_what_is_infinite_and_stays_so_has_not_moved(monkeypatch):
    """An output bias of -inf: the way from one checkpoint to the next is that of all other parameters."""
    spec = plan.alignment_run(WORLD, plan.run(WORLD, 0, "dpo"))
    model, after = build("phi"), build("phi")
    with torch.no_grad():
        for one in (model, after):
            one.lm_head.bias[-3:] = -torch.inf
        after.lm_head.bias[:4] += 0.5
    monkeypatch.setattr(recipes, "load_checkpoint", lambda run, step: (after, None))
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert spec._moved(None, 0, model, direction) == pytest.approx(4 * 0.5)


@pytest.mark.parametrize(("size", "blocks"), [(3, 3), (1, 1)])
def test_there_are_no_more_blocks_than_examples(store, size, blocks):
    """One block has no spread, so no error is claimed."""
    spec, ticks = plan.run(WORLD, 0, "dpo"), []
    store.get(spec)
    asked = TargetsRun(run=spec, choices={"a": CHOICES["as declared"]}, probe="train", size=size)
    table = store.get(asked, ticks.append).frame("targets")
    assert (table["n"] == size).all() and np.isfinite(table[["g", "cosine"]]).all(axis=None)
    assert table["se"].isna().all() if blocks == 1 else (table["se"] > 0).all()
    assert sum(ticks) == pytest.approx(asked.work())


def texts(batch, tokenizer) -> list[tuple[str, str]]:
    """Prompt and response of each row."""
    asked = [
        ids[~mask & real].tolist() for ids, mask, real in zip(batch.ids, batch.response, batch.attention, strict=True)
    ]
    said = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.response, strict=True)]
    return list(zip(policy.decode(tokenizer, asked), policy.decode(tokenizer, said), strict=True))


@pytest.mark.parametrize("part", ["held_out", "train"])
def test_final_responses_are_what_the_final_policy_answers(final, part):
    model, tokenizer = final
    spec = plan.data_spec(WORLD, 0)
    prompts = recipes.dataset(spec).prompts[part][:7]
    drawn = texts(TargetSpec(prompts=part, count=7).draw(spec, model, tokenizer), tokenizer)
    assert [prompt for prompt, _ in drawn] == prompts
    for prompt, said in drawn:
        (ids,) = chat.prompt_ids(tokenizer, [prompt])
        (alone,) = policy.generate(model, [ids[-24:]], max_response=28, ends=(1,), pad_id=0)
        assert said == policy.decode(tokenizer, [alone])[0]


def test_sampled_responses_are_always_the_same(final):
    spec, sampled = plan.data_spec(WORLD, 0), TargetSpec(decoding="sampled")
    one, again = (texts(sampled.draw(spec, *final), final[1]) for _ in range(2))
    greedy = texts(TargetSpec().draw(spec, *final), final[1])
    assert one == again and len(one) == 12  # no more than there are prompts
    assert [prompt for prompt, _ in one] == [prompt for prompt, _ in greedy] and one != greedy


@pytest.mark.parametrize("count", [2, 3, 12])
def test_unrelated_responses_are_the_same_answers_each_to_another_prompt(final, monkeypatch, count):
    """With answers that are all different, so that it shows where each has gone."""
    spec, (model, tokenizer) = plan.data_spec(WORLD, 0), final

    def numbered(model, tokenizer, prompts, **kwargs):
        asked, _ = evaluate.reply(model, tokenizer, prompts, **kwargs)
        return asked, [[7 + i, 1] for i in range(len(prompts))]

    monkeypatch.setattr(targets, "reply", numbered)
    own, others = (
        texts(TargetSpec(responses=responses, count=count).draw(spec, model, tokenizer), tokenizer)
        for responses in ("final", "unrelated")
    )
    assert len(own) == count and len({said for _, said in own}) == count
    assert [prompt for prompt, _ in others] == [prompt for prompt, _ in own]
    assert sorted(said for _, said in others) == sorted(said for _, said in own)
    assert all(a != b for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize(("count", "expected"), [(6, 6), (500, 20)])
def test_chosen_responses_are_those_of_the_check_pairs(final, count, expected):
    spec = plan.data_spec(WORLD, 0)
    drawn = texts(TargetSpec(responses="chosen", count=count).draw(spec, *final), final[1])
    assert drawn == [(row["prompt"], row["chosen"]) for row in recipes.dataset(spec).check[:expected]]
