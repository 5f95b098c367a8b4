"""Alignment of a model that two processes share: the numbers of one process, whichever way it is sharded."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from prefdyn.lens import alignment
from prefdyn.lens.likelihood import token_logps
from toys.sharded_worker import CASES, ROWS, WORLD, setting

PATIENCE = 240  # seconds for both processes, imports and all
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch without processes that talk by gloo"
)


def results_of(folder: Path, what: str) -> list[dict]:
    """What two processes leave, of `toys.sharded_worker`, in order."""
    path = os.pathsep.join(p for p in (str(Path(__file__).parent), *sys.path) if p)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "toys.sharded_worker"]
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            arguments = [*call, str(rank), str(folder), what]
            processes.append(subprocess.Popen(arguments, env=environment, stdout=out, stderr=subprocess.STDOUT))
    end = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join(f"--- process {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert [process.returncode for process in processes] == [0] * WORLD, said
    return loaded(folder)


def loaded(folder: Path) -> list[dict]:
    """The results in `folder`, by process."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of two processes, of models sharded by torch; workers of pytest share them."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "sharded.lock"):
        place = shared / "sharded"  # a name for the folder, once all is in it
        if not place.exists():
            folder = tmp_path_factory.mktemp("processes")
            results_of(folder, "torch")
            folder.rename(place)
    return loaded(place)


def gathered(found: list[dict], name: str, kind: str) -> torch.Tensor:
    """A direction's numbers for one parameter, from the shards; where there are replicas, each process has all."""
    shards = [process["direction"][name] for process in found]
    if kind == "within replicas":
        assert torch.equal(*shards)
        return shards[0]
    return torch.cat(shards)


def compare(found: list[dict], kind: str, name: str) -> None:
    """Direction, components, scores and log-probs against `alignment` on one process."""
    model, batch, w, targets = setting(name)
    direction = alignment.target_direction(model, targets)
    _, forward = alignment.token_scores(model, batch, direction)
    logps, central = alignment.token_scores(model, batch, direction, "central")
    length = alignment.norm(direction).item()
    size = forward.abs().max()
    expected = {"full": w, "positive": w.clamp(min=0), "negative": w.clamp(max=0)}
    for rank, process in enumerate(found):
        rows = torch.tensor(ROWS[rank])
        assert process["norm"] == pytest.approx(length, rel=1e-5)
        assert process["parts"].keys() == expected.keys()
        for part, weights in expected.items():
            assert process["parts"][part] == pytest.approx((weights * forward).sum().item(), rel=1e-4), part
        assert (process["logps"] - logps[rows]).abs().max() < 1e-5
        assert (process["scores"] - central[rows]).abs().max() < 1e-4 * size  # the same method
        assert (process["scores"] - forward[rows]).abs().max() < 1e-3 * size  # and what it is meant to give
        assert (process["scores"][~batch.response[rows]] == 0).all()
        assert 0 < process["share of rounding"] < 0.1
        assert process["parameters as they were"] and process["gradients as they were"]
        assert process["gradients"] > 0
    if kind == "classic, flat":  # its parameters have no names of their own
        return
    assert found[0]["direction"].keys() == direction.keys()
    for parameter, whole in direction.items():
        own = gathered(found, parameter, kind)
        assert (own - whole.flatten()).norm() <= 1e-5 * length, parameter


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_processes_measure_what_one_does(two, kind, name):
    compare([process[kind, name] for process in two], kind, name)


def test_components_are_those_of_dpo_by_its_loss():
    """The weights that both processes share are those of DPO: a mean over all pairs of -log sigmoid(beta * margin).

    With omega = sigmoid(-beta * margin), dL/dlogp of a chosen token of pair i is -beta * omega_i / B.
    """
    model, batch, w, _ = setting("gpt_neox")
    margins = -torch.logit(torch.linspace(0.2, 0.7, 4)) / 0.3
    logps = token_logps(model, batch).detach().requires_grad_()
    moving = logps.sum(-1) - logps.sum(-1).detach()
    loss = -torch.nn.functional.logsigmoid(0.3 * (margins + moving[:4] - moving[4:])).mean()
    expected = -torch.autograd.grad(loss, logps)[0] * batch.response
    assert torch.allclose(w, expected, atol=1e-7)


REFUSED = {
    "plain": "ValueError: parameter gpt_neox.embed_in.weight is not sharded; a model that is whole",
    "frozen": "ValueError: no parameter of the model requires a gradient",
    "bfloat16": "ValueError: a sharded measurement needs parameters in float32, given gpt_neox.embed_in.weight",
    "mixed": "ValueError: a sharded measurement needs passes in float32, and the model computes Embedding in torch.",
    "mixed scores": "ValueError: a sharded measurement needs passes in float32",
    "replicated": "ValueError: sharding_strategy: given NO_SHARD; allowed: one of FULL_SHARD, SHARD_GRAD_OP",
    "total": "ValueError: targets: all processes together give 3 responses, and total=6",
    "group": "ValueError: group: given 1 processes; the model is shared by 2",
    "direction": "ValueError: direction and model differ in the parameters [",
    "inner": "ValueError: inner: two directions of the same parameters are needed; they differ in [",
    "silent": "RuntimeError: no gradient arrived: FSDP is told not to synchronise them",
    "averaged otherwise": "MeasurementError: step 7, full: the scores give G = ",
    "averaged": "nothing",
    "no direction": "0.0",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(two, case):
    for process in two:
        assert process["refused"][case].startswith(REFUSED[case])


def test_weights_of_another_shape_are_refused(two):
    for rows, process in zip(ROWS, two, strict=True):
        said = process["refused"]["shape"]
        assert said.startswith(f"ValueError: w: given ({len(rows)}, ") and "allowed: the shape of the batch" in said


def test_a_wrong_factor_of_gradients_is_said_in_numbers(two):
    """Gradients that are summed, not averaged, are 2 times too long: so are scores, and inner products 4 times."""
    said = two[0]["refused"]["averaged otherwise"]
    scores, products = (float(said.split(before)[1].split(",")[0]) for before in ("G = ", "shards "))
    assert products == pytest.approx(2 * scores, rel=1e-2) and said == two[1]["refused"]["averaged otherwise"]


def test_models_that_accelerate_shards(tmp_path):
    pytest.importorskip("accelerate")
    found = results_of(tmp_path, "accelerate")
    assert {process["its own choice"] for process in found} == {"DistributedType.MULTI_CPU"}
    for name in ("gpt_neox", "llama"):
        compare([process["accelerate", name] for process in found], "accelerate", name)
