"""What our training and sampling cost: DPO steps, PPO steps and rollouts beside their plain counterparts.

    python benchmarks/training.py [--sizes 0.1M,3M,70M] [--repeats N] [--threads N] [--json FILE]

For each size, a GPT-NeoX with random weights. A step is `train.update` with AdamW, on 16 pairs (DPO) or 32 rollouts
(PPO) of random tokens, 32 of a prompt and 96 of a response. "plain" is the same step without the library, as most
trainers write it: log-softmax of all logits, the loss, backward, clipping, AdamW, a few numbers for the log.
"plain, responses only" has the model compute logits only where responses need them, as ours does. A rollout is
`policy.generate` at temperature 1 beside `model.generate` of transformers, on left-padded prompts of 16 to 32 tokens.

The methods take turns, round by round, so that other load on the machine hits all of them alike; a first round warms
up and is not counted. "ms" is the median over rounds, "ours/it" the median (and range) over rounds of the ratio of
our time to that of a method in the same round. Before that, one SGD step from the same weights must lead to the same
weights, and greedy replies must be the same, token for token; else there is an error.

At the end: where the time of an iteration of PPO goes (medians over iterations), in a real run of the book's reader
profile, cut short by what BOOK says; its model has the size "0.1M".

A target that is missed is reported and is no error: times depend on the machine.
"""

import contextlib
import copy
import functools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F
from alignment import BETA, PROMPT, RESPONSE, Size, arguments, environment, make_model, random_batch
from prefdyn.book import params, plan
from prefdyn.lab import policy, ppo
from prefdyn.lab.runs import RunStore
from prefdyn.lab.train import update
from prefdyn.lens import likelihood
from prefdyn.lens.batch import Batch, concatenate
from prefdyn.methods.dpo import DPO
from prefdyn.methods.ppo import PPO, ppo_surrogate
from tqdm import tqdm
from transformers import PreTrainedModel

CLIP, NORM = 0.2, 1.0  # of PPO's ratio, of the gradient
TARGETS = {"plain": 1.1, "transformers": 1.0}  # our time in units of theirs, at most
SAME = 1e-4  # differences up to here, relative to the largest update, are float32 noise


@dataclass(frozen=True, kw_only=True)
class Setting(Size):
    """A size, and its rollout: how many prompts, and how many new tokens for each."""

    prompts: int
    tokens: int


SIZES = {
    "0.1M": Setting(layers=2, width=64, heads=4, vocab=93, repeats=25, prompts=64, tokens=RESPONSE),  # the book's
    "3M": Setting(layers=4, width=256, heads=8, vocab=256, repeats=9, prompts=64, tokens=RESPONSE),
    "70M": Setting(layers=6, width=512, heads=8, vocab=50_304, repeats=3, prompts=16, tokens=48),  # Pythia-70m's shape
}
BOOK = {"profile": "reader", "seeds": [0], "sft_steps": 20, "demonstrations": 512, "pairs": 256, "check": 64}
BOOK |= {"iterations": 8, "checkpoints": 2}
# Parts of an iteration and the functions that do them. The first two hold others: what is left of them is counted.
PARTS = {
    "other": (ppo.PPORun, "_iterate"),
    "scores, rewards, advantages": (ppo.PPORun, "collect"),
    "sampling": (ppo, "reply"),
    "log-probs, old and reference": (likelihood, "token_logps"),
    "values": (ppo, "token_values"),
    "policy updates": (ppo, "update"),
    "value updates": (ppo.PPORun, "_value_step"),
}
ITERATION, COLLECT = list(PARTS)[:2]

Step = Callable[[PreTrainedModel, torch.optim.Optimizer], dict[str, float]]
Logged = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor], tuple[torch.Tensor, Logged]]  # of token log-probs


def plain_step(
    batch: Batch, loss_of: Loss, keep: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One step by autograd through the loss itself, with logits of the last `keep` positions (0: of all)."""
    optimizer.zero_grad(set_to_none=True)
    out = model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False, logits_to_keep=keep)
    logits = out.logits[:, :-1]
    last = slice(-logits.shape[1], None)
    logps = logits.log_softmax(-1).gather(-1, batch.ids[:, last, None]).squeeze(-1)
    loss, logged = loss_of(logps * batch.response[:, last])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
    optimizer.step()
    return {name: value.item() for name, value in (logged | {"loss": loss, "gradient_norm": norm}).items()}


def steps(objective: DPO | PPO, loss_of: Loss) -> dict[str, Step]:
    """Our step on all examples of an objective, and the plain ones on the same batch."""
    index = torch.arange(objective.size)
    batch = objective.batch(index)
    return {
        "ours": lambda model, optimizer: update(model, objective, optimizer, index, clip=NORM),
        "plain": functools.partial(plain_step, batch, loss_of, 0),
        "plain, responses only": functools.partial(plain_step, batch, loss_of, RESPONSE + 1),
    }


def dpo_steps(model: PreTrainedModel, chosen: Batch, rejected: Batch) -> dict[str, Step]:
    """Steps of DPO; the reference is near the policy, so that margins are neither 0 nor large."""
    rng = torch.Generator().manual_seed(3)
    exact = [likelihood.sequence_logps(model, side) for side in (chosen, rejected)]
    ref_chosen, ref_rejected = (logps + torch.randn(logps.shape, generator=rng) for logps in exact)

    def loss_of(logps: torch.Tensor) -> tuple[torch.Tensor, Logged]:
        pi_chosen, pi_rejected = logps.sum(-1).chunk(2)
        margin = (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected)
        return -F.logsigmoid(BETA * margin).mean(), {"margin": margin.mean(), "accuracy": (margin > 0).float().mean()}

    return steps(DPO(chosen, rejected, ref_chosen, ref_rejected, BETA), loss_of)


def ppo_steps(model: PreTrainedModel, rollouts: Batch) -> dict[str, Step]:
    """Steps of PPO with random advantages, from near the policy that sampled: most ratios are inside the clip."""
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        exact = likelihood.token_logps(model, rollouts)
    old_logps = exact + 0.1 * torch.randn(exact.shape, generator=rng) * rollouts.response
    advantages = torch.randn(exact.shape, generator=rng) * rollouts.response

    def loss_of(logps: torch.Tensor) -> tuple[torch.Tensor, Logged]:
        old, given, inside = (t[:, -logps.shape[1] :] for t in (old_logps, advantages, rollouts.response))
        moved = (logps.detach() - old)[inside]
        logged = {"moved": -moved.mean(), "clip_fraction": ((moved.exp() - 1).abs() > CLIP).float().mean()}
        return ppo_surrogate(logps, old, given, inside, CLIP), logged

    return steps(PPO(rollouts, old_logps, advantages, CLIP), loss_of)


def disagreement(model: PreTrainedModel, methods: dict[str, Step]) -> float:
    """How far weights differ after one step of each method, relative to the largest update of a weight.

    By SGD: AdamW's first step is the sign of the gradient, even of rounding. Raises RuntimeError beyond SAME.
    """
    updates = []
    for step in methods.values():
        moved = copy.deepcopy(model)
        step(moved, torch.optim.SGD(moved.parameters(), lr=1.0))
        pairs = zip(moved.parameters(), model.parameters(), strict=True)
        updates.append(torch.cat([(new - old).detach().flatten() for new, old in pairs]))
    worst = (max((other - updates[0]).abs().max() for other in updates[1:]) / updates[0].abs().max()).item()
    if not worst <= SAME:
        raise RuntimeError(f"our step and the plain ones differ by {worst:.1e} of the largest update")
    return worst


def trained(model: PreTrainedModel, step: Step) -> Callable[[], object]:
    """A step on a copy of the model, with an optimiser of its own."""
    own = copy.deepcopy(model)
    return functools.partial(step, own, torch.optim.AdamW(own.parameters(), lr=1e-4, weight_decay=0.0))


def generators(model: PreTrainedModel, setting: Setting) -> dict[str, Callable[[float], list[list[int]]]]:
    """Replies to the same random prompts at a temperature, by our function and by transformers.

    All replies have full length: the token that would end them is one that the vocabulary does not have. Raises
    RuntimeError if greedy replies differ.
    """
    rng, pad_id, eos_id = torch.Generator().manual_seed(5), 0, setting.vocab
    lengths = torch.randint(PROMPT // 2, PROMPT + 1, (setting.prompts,), generator=rng).tolist()
    prompts = [torch.randint(4, setting.vocab, (length,), generator=rng).tolist() for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def ours(temperature: float) -> list[list[int]]:
        limits = {"max_response": setting.tokens, "ends": [eos_id], "pad_id": pad_id}
        return policy.generate(model, prompts, temperature=temperature, **limits)

    def theirs(temperature: float) -> list[list[int]]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        limits = {"max_new_tokens": setting.tokens, "eos_token_id": eos_id, "pad_token_id": pad_id}
        way = sampling if temperature else {"do_sample": False}
        return model.generate(input_ids=ids, attention_mask=attention, **limits, **way)[:, width:].tolist()

    greedy = ours(0.0)
    if greedy != theirs(0.0) or {len(reply) for reply in greedy} != {setting.tokens}:
        raise RuntimeError("our greedy replies and those of transformers differ")
    return {"ours": ours, "transformers": theirs}


def race(title: str, methods: dict[str, Callable[[], object]], repeats: int, bar: tqdm) -> dict[str, dict]:
    """The time of every method, and the ratio of our time to it."""
    elapsed: dict[str, list[float]] = {method: [] for method in methods}
    for round_ in range(repeats + 1):
        for method, call in methods.items():
            bar.set_description(f"{title}: round {round_} of {repeats}, {method}")
            start = time.perf_counter()
            call()
            elapsed[method].append(time.perf_counter() - start)
            bar.update()
    rows = {}
    for method, (_, *spent) in elapsed.items():  # without the round that warms up
        ratios = [ours / its for ours, its in zip(elapsed["ours"][1:], spent, strict=True)]
        rows[method] = {"ms": 1000 * median(spent), "ratio": median(ratios), "ratios": ratios}
    return rows


def measure(name: str, repeats: int, bar: tqdm) -> dict:
    """Everything about one size."""
    setting = SIZES[name]
    model, chosen, rejected = make_model(setting), *(random_batch(setting.vocab, seed) for seed in (1, 2))
    rollouts = concatenate([chosen, rejected])
    steps_of = {"DPO step": dpo_steps(model, chosen, rejected), "PPO step": ppo_steps(model, rollouts)}
    result = {"parameters": sum(p.numel() for p in model.parameters()), "repeats": repeats}
    result["differences"] = {kind: disagreement(model, methods) for kind, methods in steps_of.items()}
    for kind, methods in steps_of.items():
        racers = {method: trained(model, step) for method, step in methods.items()}
        result[kind] = race(f"{name}: {kind}", racers, repeats, bar)
    sampling = {method: functools.partial(replies, 1.0) for method, replies in generators(model, setting).items()}
    result["rollout"] = race(f"{name}: rollout", sampling, repeats, bar)
    for row in result["rollout"].values():
        row["tokens_a_second"] = 1000 * setting.prompts * setting.tokens / row["ms"]
    return result


class Clock:
    """Seconds of each iteration by part; time of a part inside another counts for the inner one alone."""

    def __init__(self):
        self.iterations: list[dict[str, float]] = []
        self.open: list[str] = []
        self.since = 0.0

    def lap(self) -> None:
        """Count the time since the last call for the part that is open."""
        now = time.perf_counter()
        if self.open:
            self.iterations[-1][self.open[-1]] += now - self.since
        self.since = now

    def wrap(self, part: str, function: Callable) -> Callable:
        """`function`, timed as `part` if ITERATION or COLLECT calls it."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            if part == ITERATION:
                self.iterations.append(dict.fromkeys(PARTS, 0.0))
            elif self.open[-1:] not in ([ITERATION], [COLLECT]):
                return function(*args, **kwargs)
            self.lap()
            self.open.append(part)
            result = function(*args, **kwargs)
            self.lap()
            self.open.pop()
            return result

        return timed


def iteration() -> dict:
    """Where the time of an iteration of PPO goes."""
    clock, spec = Clock(), plan.run(params.check(BOOK), 0, "ppo")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        for part, (owner, name) in PARTS.items():
            patches.enter_context(mock.patch.object(owner, name, clock.wrap(part, getattr(owner, name))))
        log = RunStore(folder).get(spec).frame("steps")
    spent = pd.DataFrame(clock.iterations)
    shares = spent.div(spent.sum(axis=1), axis=0)
    rows = {
        part: {"ms": 1000 * spent[part].median(), "share": shares[part].median(), "shares": shares[part].tolist()}
        for part in shares.median().sort_values(ascending=False).index
    }
    said = {"rollouts": spec.rollouts, "updates": log["updates"].mean(), "length": log["length"].mean()}
    return {"ms": 1000 * spent.sum(axis=1).median(), "iterations": len(spent), **said, "parts": rows}


def line(title: str, row: dict, ratio: str = "ratio", form: str = ".2f") -> str:
    """A line of a table: milliseconds, a ratio and its range."""
    low, high = min(row[f"{ratio}s"]), max(row[f"{ratio}s"])
    return f"  {title:32}{row['ms']:12,.1f}{row[ratio]:10{form}}{f'({low:{form}} to {high:{form}})':>20}"


def report(name: str, result: dict) -> str:
    """All that is said about one size."""
    setting, lines = SIZES[name], []
    for kind in ("DPO step", "PPO step", "rollout"):
        for method, row in result[kind].items():
            speed = f"{row['tokens_a_second']:,.0f}" if kind == "rollout" else ""
            how = "holds" if row["ratio"] <= TARGETS.get(method, 0) else "MISSED"
            target = f"  {how}: at most {TARGETS[method]:.2f}" if method in TARGETS else ""
            lines.append(f"{line(f'{kind:10}{method}', row)}{speed:>12}{target}".rstrip())
    head = [
        f"{name}: {result['parameters']:,} parameters ({setting.layers} layers, width {setting.width}, vocabulary "
        f"{setting.vocab:,}); rollouts: {setting.prompts} x {setting.tokens} tokens; rounds: {result['repeats']}",
        f"  {'':32}{'ms':>12}{'ours/it':>10}{'(range)':>20}{'tokens/s':>12}  target",
    ]
    differ = " and ".join(f"{worst:.1e} ({kind})" for kind, worst in result["differences"].items())
    check = f"  check: after one SGD step weights differ by {differ} of the largest update; greedy replies are equal"
    return "\n".join([*head, *lines, check])


def report_iteration(result: dict) -> str:
    """All that is said about an iteration of PPO."""
    lines = [
        f"an iteration of PPO in the book: {result['ms']:,.0f} ms for {result['rollouts']} replies of "
        f"{result['length']:.0f} tokens and {result['updates']:.0f} updates; iterations: {result['iterations']}",
        f"  {'':32}{'ms':>12}{'share':>10}{'(range)':>20}",
    ]
    return "\n".join(lines + [line(part, row, "share", ".1%") for part, row in result["parts"].items()])


def main() -> None:
    """Measure the sizes asked for and an iteration of PPO; print one table each."""
    args = arguments(__doc__, SIZES)
    where = environment()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rounds = {name: args.repeats or SIZES[name].repeats for name in args.sizes}
    results = {}
    calls = sum(8 * (n + 1) for n in rounds.values())  # three methods a kind of step, two of rollouts
    with tqdm(total=calls + 1, disable=None, leave=False) as bar:
        for name in args.sizes:
            results[name] = measure(name, rounds[name], bar)
            with bar.external_write_mode():
                print(f"\n{report(name, results[name])}", flush=True)
        bar.set_description("an iteration of PPO")
        parts = iteration()
        bar.update()
    print(f"\n{report_iteration(parts)}")
    if args.json:
        args.json.write_text(json.dumps({"where": where, "sizes": results, "iteration": parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
