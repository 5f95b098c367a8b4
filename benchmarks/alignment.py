"""What per-token alignment scores cost: one forward-mode pass against the other ways to the same numbers.

    python benchmarks/alignment.py [--sizes 0.4M,3M,70M] [--repeats N] [--threads N] [--json FILE]

For each size, a GPT-NeoX with random weights and a batch of random tokens: 8 preference pairs, so 16 responses of
96 tokens after prompts of 32. All methods run on that same batch.

Time: the methods take turns, round by round, so that other load on the machine hits all of them alike. "ms" is the
median over rounds, "x f+b" the median (and range) over rounds of the ratio to forward+backward in the same round.

Memory: "MB" is how far the peak of resident memory rose above what model, batch and direction held, in a fresh
process for each method, its code paths warmed up before on a tiny model. It includes the work space of the kernels.
Without /proc the peak is getrusage's.

A target that is missed is reported and is no error: times depend on the machine.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from prefdyn.lab import policy
from prefdyn.lens import alignment, controls, likelihood
from prefdyn.lens.batch import Batch
from prefdyn.lens.weights import TokenWeights
from prefdyn.methods.dpo import dpo_weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedModel

PAIRS, PROMPT, RESPONSE, BETA = 8, 32, 96, 0.1
SIGNS = ("full", "positive", "negative")
FEW = 2  # tokens that "one backward a token" is timed on


@dataclass(frozen=True)
class Size:
    """Shape of a model, how many rounds to time by default, and the target: our pass in units of forward+backward."""

    layers: int
    width: int
    heads: int
    vocab: int
    repeats: int
    target: float | None = None


SIZES = {
    "0.4M": Size(layers=2, width=128, heads=4, vocab=128, repeats=25),
    "3M": Size(layers=4, width=256, heads=8, vocab=256, repeats=9, target=1.5),
    "70M": Size(layers=6, width=512, heads=8, vocab=50_304, repeats=3, target=1.1),  # the shape of Pythia-70m
}
TINY = Size(layers=1, width=16, heads=2, vocab=16, repeats=1)
NINE_TARGET = 1 / 3  # our pass with all nine components, in units of nine backwards through one graph


@dataclass(frozen=True)
class Case:
    """What all methods are given: model, batch, direction d, and DPO's weights with random omega."""

    model: PreTrainedModel
    batch: Batch
    direction: alignment.Direction
    weights: TokenWeights

    def components(self) -> list[torch.Tensor]:
        """Weights of the nine components: all, positive and negative learning on each third of pairs by omega."""
        thirds = [dataclasses.replace(self.weights, w=controls.apply(third, self.weights)) for third in controls.THIRDS]
        return [controls.apply(sign, third) for third in thirds for sign in SIGNS]


def random_batch(vocab: int, seed: int) -> Batch:
    """Random tokens without padding, chosen rows first."""
    shape = (2 * PAIRS, PROMPT + RESPONSE)
    ids = torch.randint(4, vocab, shape, generator=torch.Generator().manual_seed(seed))  # 4 special tokens
    return Batch(ids, torch.ones(shape, dtype=torch.bool), (torch.arange(shape[1]) >= PROMPT).expand(shape))


def make_model(size: Size) -> PreTrainedModel:
    """Random weights from a fixed seed."""
    tokenizer = policy.word_tokenizer(f"w{i}" for i in range(size.vocab - 4))
    shape = {"layers": size.layers, "width": size.width, "heads": size.heads}
    return policy.scratch_model(tokenizer, **shape, context=PROMPT + RESPONSE, seed=0)


def make_case(size: Size, real_direction: bool = True) -> Case:
    """A case; d is the gradient on another random batch or, where only its memory matters, a copy of the weights."""
    model, batch = make_model(size), random_batch(size.vocab, seed=1)
    omega = 0.05 + 0.9 * torch.rand(PAIRS, generator=torch.Generator().manual_seed(2))
    if real_direction:
        direction = alignment.target_direction(model, random_batch(size.vocab, seed=3))
    else:
        direction = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Case(model, batch, direction, dpo_weights(batch.response, omega, BETA))


@torch.no_grad()
def forward(case: Case) -> torch.Tensor:
    """Log-probs of all tokens."""
    return likelihood.token_logps(case.model, case.batch)


def forward_backward(case: Case) -> alignment.Direction:
    """The gradient of one objective: what a training step needs."""
    return alignment.gradient(case.model, [(case.batch, case.weights.w)])


def forward_mode(case: Case) -> torch.Tensor:
    """Our pass: the scores of all tokens, and from them the nine components."""
    _, scores = alignment.token_scores(case.model, case.batch, case.direction)
    return torch.stack([(w * scores).sum() for w in case.components()])


def central(case: Case) -> torch.Tensor:
    """The same from central differences."""
    _, scores = alignment.token_scores(case.model, case.batch, case.direction, method="central")
    return torch.stack([(w * scores).sum() for w in case.components()])


def nine_backwards(case: Case) -> torch.Tensor:
    """One forward pass, then a backward pass for each component, and the inner product with d."""
    params, components, out = dict(case.model.named_parameters()), case.components(), []
    logps = likelihood.token_logps(case.model, case.batch)
    for i, w in enumerate(components, 1):
        grads = torch.autograd.grad((w * logps).sum(), list(params.values()), retain_graph=i < len(components))
        out.append(alignment.inner(dict(zip(params, grads, strict=True)), case.direction))
    return torch.stack(out)


def row_by_row(case: Case) -> torch.Tensor:
    """Per-sample gradients, one row after the other, each dotted with d."""
    rows = zip(case.batch.slices(1), case.weights.w.split(1), strict=True)
    return torch.stack([alignment.inner(alignment.gradient(case.model, [row]), case.direction) for row in rows])


class _Logps(torch.nn.Module):
    """Log-probs of the tokens of one unpadded row; without a mask, which `vmap` could not look into."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return torch.nn.functional.pad(logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0], (1, 0))


def vmapped(case: Case) -> torch.Tensor:
    """Per-sample gradients of all rows at once with torch.func, each dotted with d."""
    wrapped = _Logps(case.model)
    params = {name: p.detach() for name, p in wrapped.named_parameters()}

    def weighted(moved: dict[str, torch.Tensor], ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (w * torch.func.functional_call(wrapped, moved, (ids,))).sum()

    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.func.vmap(torch.func.grad(weighted), (None, 0, 0))(params, case.batch.ids, case.weights.w)
    flat = {name: t.flatten() for name, t in case.direction.items()}
    return sum(grads[f"model.{name}"].flatten(1) @ t for name, t in flat.items())


def a_few_tokens(case: Case) -> float:
    """One backward pass a token, timed on FEW tokens; returns the seconds that all tokens would take."""
    params = dict(case.model.named_parameters())
    tokens = case.batch.response.nonzero()
    start = time.perf_counter()
    logps = likelihood.token_logps(case.model, case.batch)
    middle = time.perf_counter()
    for row, col in tokens[:: len(tokens) // FEW][:FEW].tolist():
        grads = torch.autograd.grad(logps[row, col], list(params.values()), retain_graph=True)
        alignment.inner(dict(zip(params, grads, strict=True)), case.direction)
    return middle - start + (time.perf_counter() - middle) * len(tokens) / FEW


METHODS: dict[str, Callable[[Case], object]] = {
    "forward": forward,
    "forward+backward": forward_backward,
    "our pass": forward_mode,
    "central differences": central,
    "nine backwards": nine_backwards,
    "per sample, row by row": row_by_row,
    "per sample, vmap": vmapped,
    "per token": a_few_tokens,
}
PER_SAMPLE = ("per sample, row by row", "per sample, vmap")  # two ways to the same
GIVES = {
    "forward": "log-probs",
    "forward+backward": "one gradient",
    "our pass": "all token scores, nine components",
    "central differences": "the same, with rounding and truncation error",
    "nine backwards": "nine components, one graph",
    "per sample": "sixteen row scores ({way}, the faster way)",
    "per token": f"all token scores (extrapolated from {FEW} tokens)",
}


def timed(method: str, case: Case) -> tuple[float, object]:
    """Seconds and result of one call; "per token" times itself, because it extrapolates."""
    start = time.perf_counter()
    result = METHODS[method](case)
    return (result if method == "per token" else time.perf_counter() - start), result


def resident(key: str) -> int:
    """Bytes of resident memory now ("VmRSS") or at its peak ("VmHWM")."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: there a process inherits the peak of the one that started it
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak(name: str, method: str, threads: int) -> int:
    """Bytes that `method` needs beyond model, batch and direction; for a process of its own."""
    torch.set_num_threads(threads)
    METHODS[method](make_case(TINY))
    case = make_case(SIZES[name], real_direction=False)
    before = resident("VmRSS")
    METHODS[method](case)
    return max(0, resident("VmHWM") - before)


def peaks(name: str, threads: int, bar: tqdm) -> dict[str, int]:
    """`peak` of every method."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prefdyn.lens.alignment"])
    out = {}
    with context.Pool(1, maxtasksperchild=1) as pool:
        for method in METHODS:
            bar.set_description(f"{name}: memory of {method}")
            out[method] = pool.apply(peak, (name, method, threads))
            bar.update()
    return out


def times(name: str, case: Case, repeats: int, bar: tqdm) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds of every method in every round, and the last results; code paths are warmed up on a tiny model."""
    tiny = make_case(TINY)
    for method in METHODS.values():
        method(tiny)
    elapsed: dict[str, list[float]] = {method: [] for method in METHODS}
    results: dict[str, object] = {}
    for round_ in range(repeats):
        for method in METHODS:
            bar.set_description(f"{name}: round {round_ + 1} of {repeats}, {method}")
            spent, results[method] = timed(method, case)
            elapsed[method].append(spent)
            bar.update()
    return elapsed, results


def differences(results: dict[str, object]) -> dict[str, float]:
    """How far the results agree that should be equal: the largest difference of any entry."""
    ours, exact = results["our pass"], results["nine backwards"]
    central, rows, vmap = (results[m] for m in ("central differences", *PER_SAMPLE))
    return {
        "each": ((ours - exact) / exact).abs().max().item(),
        "largest": ((ours - exact).abs().max() / exact.abs().max()).item(),
        "central": ((central - exact).abs().max() / exact.abs().max()).item(),
        "rows": (rows.sum() - (exact[0::3]).sum()).abs().item() / exact.abs().max().item(),
        "ways": ((vmap - rows).abs().max() / rows.abs().max()).item(),
    }


def measure(name: str, repeats: int, threads: int, bar: tqdm) -> dict:
    """Everything about one size. Memory comes first, while this process is small."""
    memory = peaks(name, threads, bar)
    case = make_case(SIZES[name])
    elapsed, results = times(name, case, repeats, bar)
    ratios = {
        method: [t / base for t, base in zip(spent, elapsed["forward+backward"], strict=True)]
        for method, spent in elapsed.items()
    }
    rows = {
        method: {
            "ms": 1000 * median(elapsed[method]),
            "ratio": median(ratios[method]),
            "ratios": ratios[method],
            "bytes": memory[method],
        }
        for method in METHODS
    }
    shares = [ours / nine for ours, nine in zip(ratios["our pass"], ratios["nine backwards"], strict=True)]
    return {
        "parameters": sum(p.numel() for p in case.model.parameters()),
        **dataclasses.asdict(SIZES[name]),
        "repeats": repeats,
        "methods": rows,
        "share_of_nine_backwards": median(shares),
        "differences": differences(results),
    }


def verdict(value: float, limit: float | None) -> str:
    """Whether a target holds."""
    if limit is None:
        return f"{value:.2f} (no target)"
    return f"{value:.2f} ({'holds' if value <= limit else 'MISSED'}: at most {limit:.2f})"


def table(rows: dict[str, dict]) -> list[str]:
    """One line a method; of the two ways to per-sample gradients the faster one."""
    slower = max(PER_SAMPLE, key=lambda method: rows[method]["ratio"])
    lines = [f"  {'':21}{'ms':>12}{'x f+b':>10}{'(range)':>20}{'MB':>8}  gives"]
    for method, row in rows.items():
        if method == slower:
            continue
        label, _, way = method.partition(", ")
        spread = f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        numbers = f"{row['ms']:12,.1f}{row['ratio']:10.2f}{spread:>20}{row['bytes'] / 1e6:8,.0f}"
        lines.append(f"  {label:21}{numbers}  {GIVES[label].format(way=way)}")
    return lines


def report(name: str, result: dict) -> str:
    """All that is said about one size."""
    differ = result["differences"]
    ours, share = result["methods"]["our pass"]["ratio"], result["share_of_nine_backwards"]
    head = [
        f"{name}: {result['parameters']:,} parameters ({result['layers']} layers, width {result['width']}, "
        f"vocabulary {result['vocab']:,}); {2 * PAIRS} x {PROMPT + RESPONSE} tokens, {2 * PAIRS * RESPONSE:,} of them "
        f"in responses; rounds: {result['repeats']}"
    ]
    tail = [
        f"  check: our nine components equal those of the nine backwards to a relative {differ['each']:.1e} each, "
        f"{differ['largest']:.1e} of the largest;\n         central differences to {differ['central']:.1e} of the "
        f"largest; per-sample rows add up to their sum to {differ['rows']:.1e}",
        f"  targets: our pass / forward+backward {verdict(ours, result['target'])};",
        f"           our pass with nine components / nine backwards {verdict(share, NINE_TARGET)}",
    ]
    return "\n".join(head + table(result["methods"]) + tail)


def arguments(description: str, sizes: Iterable[str]) -> argparse.Namespace:
    """The command line of a benchmark of `sizes`; sets torch's threads."""
    sizes = ",".join(sizes)
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--sizes", default=sizes, help=f"of {sizes} (default: all)")
    parser.add_argument("--repeats", type=int, help="rounds of timing (default: 25, 9 and 3 for the three sizes)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--json", type=Path, help="also write all numbers there")
    args = parser.parse_args()
    args.sizes = args.sizes.split(",")
    if unknown := set(args.sizes) - set(sizes.split(",")):
        parser.error(f"--sizes {sorted(unknown)[0]!r}: must be of {sizes}")
    if args.threads < 1 or (args.repeats is not None and args.repeats < 1):
        parser.error("--threads and --repeats must be at least 1")
    torch.set_num_threads(args.threads)
    return args


def environment() -> dict[str, str | int]:
    """Where the times were taken: packages, machine, threads."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure the sizes asked for and print one table each."""
    args = arguments(__doc__, SIZES)
    where = environment()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rounds = {name: args.repeats or SIZES[name].repeats for name in args.sizes}
    results = {}
    with tqdm(total=sum(len(METHODS) * (n + 1) for n in rounds.values()), disable=None, leave=False) as bar:
        for name in args.sizes:
            results[name] = measure(name, rounds[name], args.threads, bar)
            with bar.external_write_mode():
                print(f"\n{report(name, results[name])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"where": where, "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
