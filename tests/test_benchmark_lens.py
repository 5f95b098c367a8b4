"""The benchmark of the lens: what it times is what it says, on tiny models; no test looks at a time itself."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from prefdyn.lens import alignment, likelihood
from prefdyn.lens.batch import concatenate
from prefdyn.methods import dpo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[1] / "benchmarks"


def loaded():
    """benchmarks/lens.py as a module; it imports its sibling by name, as a script does."""
    spec = importlib.util.spec_from_file_location("benchmark_lens", FOLDER / "lens.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


lens = loaded()
TINY = lens.SIZES["tiny"]


def tick() -> None:
    pass


def run(path: Path, *options: str) -> dict:
    lens.main(["--sizes", "tiny", "--repeats", "2", "--json", str(path / "out.json"), *options])
    return json.loads((path / "out.json").read_text())


def refusal(capsys, *options: str) -> str:
    with pytest.raises(SystemExit):
        lens.main(list(options))
    return " ".join(capsys.readouterr().err.split())


# Arithmetic of times


def test_ratios_are_to_the_first_name_in_the_same_round():
    rows = lens.ratios({"base": [1.0, 2.0, 4.0], "other": [2.0, 2.0, 2.0]})
    assert rows["other"] == {"ms": 2000.0, "ratio": 1.0, "ratios": [2.0, 1.0, 0.5]}
    assert rows["base"]["ms"] == 2000.0 and rows["base"]["ratios"] == [1.0, 1.0, 1.0]


def test_calls_take_turns_and_the_first_round_is_not_counted():
    said, numbers = [], iter(range(10))

    def call(name: str):
        def spend() -> dict[str, float]:
            said.append(name)
            return {name: float(next(numbers))}

        return spend

    ticks = []
    assert lens.turns([call("a"), call("b")], 2, lambda: ticks.append(1)) == {"a": [2.0, 4.0], "b": [3.0, 5.0]}
    assert said == ["a", "b"] * 3 and len(ticks) == 6


def test_steps_between_measurements_keep_the_lens_at_a_tenth_of_the_time():
    """A tenth of all is 1/9 of the rest: with 1/90 for each step, 1/10 of a step is left, and 25 steps take 250."""
    rows = {"cheap tier": {"ratio": 1 / 90}, "measurement": {"ratio": 24.99}}
    apart = lens.steps_between(rows)
    assert apart == 250
    assert (1 / 90 + 24.99 / apart) / (1 + 1 / 90 + 24.99 / apart) <= 0.1
    assert lens.steps_between(rows | {"cheap tier": {"ratio": 0.2}}) is None


# What is timed


def test_the_plain_loss_is_dpo_s_and_log_2_at_its_own_reference():
    loop = lens.PlainLoop(TINY)
    (batch, *_), model = loop.batches, loop.model
    own = likelihood.sequence_logps(model, batch)
    assert lens.dpo_loss(model, batch, own).item() == pytest.approx(0.693147, rel=1e-4)
    known = likelihood.sequence_logps(loop.reference, batch)
    margin = dpo.dpo_margin(*own.chunk(2), *known.chunk(2))
    expected = dpo.dpo_loss(margin, lens.BETA).mean().item()
    assert lens.dpo_loss(model, batch, known).item() == pytest.approx(expected, rel=1e-5)


def test_the_plain_loop_measures_what_the_offline_route_does():
    """G of the probe by tokens and by a backward pass is that of the scores and the weights as they are written."""
    loop = lens.PlainLoop(TINY)
    _, by_tokens, by_gradient = lens.measurement(loop.model, loop.reference, loop.batches, loop.targets)
    sides = [concatenate(list(each)) for each in zip(*(b.slices(TINY.pairs) for b in loop.batches), strict=True)]
    batch = concatenate(sides)
    assert len(sides[0]) == TINY.probe and torch.equal(sides[0].ids, loop.targets.ids)
    d = alignment.target_direction(loop.model, loop.targets)
    logps, scores = alignment.token_scores(loop.model, batch, d)
    known = likelihood.sequence_logps(loop.reference, batch)
    omega = dpo.dpo_omega(dpo.dpo_margin(*logps.sum(-1).chunk(2), *known.chunk(2)), lens.BETA)
    expected = (dpo.dpo_weights(batch.response, omega, lens.BETA).w * scores).sum().item()
    assert by_tokens == pytest.approx(expected, rel=1e-3)
    assert by_gradient == pytest.approx(expected, rel=1e-3)


def test_the_cheap_tier_of_the_plain_loop_reads_the_gradient_that_is_there():
    loop = lens.PlainLoop(TINY)
    assert loop.round().keys() == {"training step", "cheap tier", "measurement"}
    for p in loop.model.parameters():
        p.grad = torch.full_like(p, -2.0)
    g, norm = loop.cheap()
    sizes = sum(p.numel() for p in loop.model.parameters())
    assert norm == pytest.approx(2 * sizes**0.5, rel=1e-4)
    assert g == pytest.approx(2 * sum(t.double().sum().item() for t in loop.direction.values()), rel=1e-3, abs=1e-4)


def test_an_epoch_is_on_the_pairs_that_are_measured(tmp_path):
    afterwards = lens.Afterwards(TINY, tmp_path)
    assert [path.name for path in afterwards.made] == ["checkpoint-0", "checkpoint-3"]
    before = [p.detach().clone() for p in afterwards.model.parameters()]
    afterwards.epoch()
    moved = [not torch.equal(p, old) for p, old in zip(afterwards.model.parameters(), before, strict=True)]
    assert all(moved)
    written = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(written) == 2 * TINY.probe
    assert sum(len(batch) for batch in afterwards.batches) == 2 * TINY.probe
    assert {batch.ids.shape[1] for batch in afterwards.batches} == {TINY.prompt + 1 + TINY.response}
    seconds = afterwards.follow()
    assert 0 < seconds["a checkpoint, its passes"] < seconds["a checkpoint, all of it"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0", "checkpoint-3", "pairs.jsonl"]


def test_without_the_trainer_this_is_said_and_a_plain_loop_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lens, "missing", lambda: ["trl", "datasets"])
    found = run(tmp_path)["sizes"]["tiny"]
    assert "no trl, datasets here: a plain loop" in capsys.readouterr().out
    live = found["while it trains"]["rows"]
    assert list(live) == ["training step", "cheap tier", "measurement"]
    assert all(len(row["ratios"]) == 2 and row["ms"] > 0 for row in live.values())
    assert list(found["afterwards"]["rows"]) == [
        "an epoch on the probe",
        "a checkpoint, its passes",
        "a checkpoint, all of it",
    ]
    assert list(found["gradients of rows"]["rows"])[:3] == [
        "forward+backward",
        "our pass",
        "per sample, torch.func.vmap",
    ]
    assert found["gradients of rows"]["off"] < 1e-3


def test_the_callback_is_timed_in_the_trainer_and_measures_after_every_step(tmp_path, monkeypatch):
    for name in lens.NEEDED:
        pytest.importorskip(name)
    made, plain = [], lens.Timed.__init__

    def kept(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(lens.Timed, "__init__", kept)
    measured = []
    write = lens.LensCallback._write
    monkeypatch.setattr(
        lens.LensCallback, "_write", lambda self, step, *rest: measured.append(step) or write(self, step, *rest)
    )
    elapsed = lens.with_trainer(TINY, 2, tick)
    assert measured == [0, 1, 2, 3]
    assert {name: len(spent) for name, spent in elapsed.items()} == {
        "training step": 2,
        "cheap tier": 2,
        "measurement": 2,
    }
    assert min(min(spent) for spent in elapsed.values()) > 0
    (callback,) = made
    assert callback._used == TINY.probe and not callback.quiet
    shape = (2 * TINY.pairs, TINY.prompt + TINY.response)  # tokens as they are meant to be, the end of text included
    for count, inputs in callback._data.batches:
        assert (count, tuple(inputs["input_ids"].shape)) == (TINY.pairs, shape)
        assert int(inputs["completion_mask"].sum()) == 2 * TINY.pairs * TINY.response


# Libraries of influence


def test_only_a_library_with_the_same_numbers_is_timed(monkeypatch):
    case, targets = lens.make_case(TINY), lens.random_batch(TINY.vocab, seed=3)
    assert torch.allclose(lens.ours(case), lens.vmapped(case), rtol=1e-3, atol=1e-7)

    def fails(case, targets):
        raise TypeError("other arguments")

    given = {"json": lambda case, targets: lens.vmapped(case), "csv": lambda case, targets: -lens.vmapped(case)}
    monkeypatch.setattr(lens, "LIBRARIES", given | {"math": fails, "no_such_library": fails})
    monkeypatch.setattr(lens, "OTHERS", {"random": "is something else", "nor_this_one": "is something else"})
    found, told = lens.comparable(case, targets)
    assert list(found) == ["json"] and torch.equal(found["json"](), lens.vmapped(case))
    assert told == [
        "csv: not timed, its numbers are off by 2.0e+00 of the largest",
        "math: not timed, TypeError: other arguments",
        "no_such_library: not installed",
        "random: not timed, it is something else",
        "nor_this_one: not installed",
    ]


@pytest.mark.parametrize("name", lens.LIBRARIES)
def test_a_library_that_is_installed_gives_the_same_numbers(name):
    pytest.importorskip(name)
    case, targets = lens.make_case(TINY), lens.random_batch(TINY.vocab, seed=3)
    expected = lens.vmapped(case)
    assert torch.allclose(lens.LIBRARIES[name](case, targets), expected, rtol=1e-3, atol=1e-6 * expected.abs().max())


# On a card


def test_products_are_those_that_torch_counts():
    case, _ = lens.card_case(TINY, torch.device("cpu"))
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            likelihood.token_logps(case.model, case.batch)
        with FlopCounterMode(display=False) as both:
            alignment.gradient(case.model, [(case.batch, case.weights.w)])
    # rotary angles are made by a small product beside them
    assert forward.get_total_flops() == pytest.approx(lens.products(TINY), rel=2e-3)
    assert both.get_total_flops() == pytest.approx(lens.PASSES["forward+backward"] * lens.products(TINY), rel=2e-3)


def test_the_path_of_a_card_is_in_bfloat16_and_complete(tmp_path, capsys):
    found = run(tmp_path, "--device", "cpu", "--peak-tflops", "0.001")
    result, out = found["sizes"]["tiny"], capsys.readouterr().out
    assert "6 x" not in out and "4 x 10 tokens in bfloat16" in out
    assert list(result["rows"]) == list(lens.PASSES) and result["excess"] <= 1
    for name, row in result["rows"].items():
        assert row["tokens_a_second"] == pytest.approx(
            1000 * 2 * TINY.pairs * (TINY.prompt + TINY.response) / row["ms"]
        )
        operations = lens.PASSES[name] * lens.products(TINY)
        assert row["share"] == pytest.approx(operations / (row["ms"] / 1000) / 1e9)
        assert row["bytes"] is None and len(row["ratios"]) == 2
    case, targets = lens.card_case(TINY, torch.device("cpu"))
    assert {p.dtype for p in case.model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in case.direction.values()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
    _, scores = lens.card_calls(case, targets)["our pass"]()
    assert scores.dtype == torch.float32 and scores.shape == case.batch.ids.shape


def test_an_unknown_peak_is_said_and_gives_no_share(tmp_path, capsys):
    found = run(tmp_path, "--device", "cpu")
    assert found["peak_tflops"] is None and found["sizes"]["tiny"]["rows"]["our pass"]["share"] is None
    assert "--peak-tflops gives shares of it" in capsys.readouterr().out


def test_a_size_that_does_not_fit_is_left_out_by_a_sentence(monkeypatch):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(lens, "card_case", too_much)
    result = lens.on_card(TINY, 1, torch.device("cpu"), None, tick)
    assert lens.report_card("tiny", TINY, result | {"repeats": 1}) == (
        "tiny: does not fit: CUDA out of memory. Tried to allocate 2 GiB"
    )


# What is refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_without_a_card_its_benchmark_is_refused(capsys):
    assert "--device cuda: torch finds no CUDA card on this machine" in refusal(capsys, "--device", "cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "3M,4M"], "--sizes '4M': must be of tiny,0.4M,3M,70M"),
        (["--device", "cpu", "--sizes", "3M"], "--sizes '3M': must be of tiny,0.1B,0.4B,1.4B,2.8B"),
        (["--peak-tflops", "300"], "--peak-tflops 300: must be above 0, and given with --device"),
        (["--device", "cpu", "--peak-tflops", "-1"], "--peak-tflops -1: must be above 0"),
        (["--repeats", "0"], "--threads and --repeats must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(options, message, capsys):
    assert message in refusal(capsys, *options)
