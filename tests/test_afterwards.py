"""The measurement after the fact, against brute force: autograd of published losses, pair by pair, in plain torch."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from prefdyn.findings import afterwards, asked
from prefdyn.findings.afterwards import Follow
from prefdyn.findings.asked import Question
from prefdyn.lab import data, folders, policy
from prefdyn.lab.layouts import DataError
from prefdyn.lens import memory, precision
from prefdyn.lens.alignment import MeasurementError
from prefdyn.methods import registry
from test_folders import (
    BETA,
    WORDS,
    checkpoints,
    dpo_loss,
    lora,
    make_run,
    read_pairs,
    sequence_logp,
    tiny,
    write_pairs,
)

PROBE = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run, with its start, pairs and three checkpoints; never changed."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, write_pairs(folder / "pairs.jsonl"))
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def question(run: Path, **changes) -> Question:
    known = {"pairs": str(run / "pairs.jsonl"), "settings": (("beta", BETA),), "probe": PROBE}
    return Question(**known | changes)


def follow(run: Path, out: Path, made: list[Path] | None = None, reference="start", base=None, **changes) -> Path:
    """Measure; of the methods that need one, the reference is run/start."""
    given = None if reference is None else str(run / reference)
    more = {name: changes.pop(name) for name in ("rows", "limit", "tell") if name in changes}
    series = folders.read(made or checkpoints(run), base)
    return Follow(series, question(run, **changes), out, reference=given, **{"tell": lambda line: None} | more).run()


def tables(out: Path) -> dict[str, pd.DataFrame]:
    return {name: pd.read_parquet(out / f"{name}.parquet") for name in (*afterwards.TABLES, "texts")}


def about(out: Path) -> dict:
    return json.loads((out / "about.json").read_text())


def where(table: pd.DataFrame, **values) -> pd.DataFrame:
    """The rows with these values."""
    return table[np.logical_and.reduce([table[name] == value for name, value in values.items()])]


def probed(found: dict[str, pd.DataFrame], run: Path) -> list[dict]:
    """The pairs of the file that were measured, in order, by their texts."""
    rows = {row["prompt"]: row for row in read_pairs(run / "pairs.jsonl")}
    prompts = found["texts"].query("side == 0").sort_values("example")["prompt"]
    return [rows[prompt] for prompt in prompts]


def moving(model) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gradient(value: torch.Tensor, model) -> torch.Tensor:
    """One vector of all that moves, in float64."""
    grads = torch.autograd.grad(value, moving(model), allow_unused=True, materialize_grads=True)
    return torch.cat([g.double().flatten() for g in grads])


def mean_logp(model, tokenizer, replies: list[tuple[str, str]]) -> torch.Tensor:
    return torch.stack([sequence_logp(model, tokenizer, prompt, reply) for prompt, reply in replies]).mean()


def greedy(model, tokenizer, prompts: list[str], most: int) -> list[tuple[list[int], list[int]]]:
    """Replies by transformers' own generation: ids of prompts and of replies."""
    found = []
    for prompt in prompts:
        ids = [tokenizer.convert_tokens_to_ids(w) for w in [*prompt.split(), "<reply>"]]
        out = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False, eos_token_id=1, pad_token_id=0)
        found.append((ids, out[0, len(ids) :].tolist()))
    return found


def logp_of(model, asked: list[int], told: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([asked + told])).logits[0].log_softmax(-1)
    return logits[len(asked) - 1 : -1].gather(-1, torch.tensor(told)[:, None]).sum()


# Against brute force


@pytest.fixture(scope="module")
def measured(whole, tmp_path_factory) -> Path:
    return follow(whole, tmp_path_factory.mktemp("lens") / "out")


def test_g_is_that_of_the_published_loss_by_autograd(whole, measured):
    """G, its halves, d's likelihood and the way to the next checkpoint; D' by transformers' own generation."""
    found = tables(measured)
    rows = probed(found, whole)
    others = [row for row in read_pairs(whole / "pairs.jsonl") if row not in rows]
    models = [policy.load(str(folder))[0] for folder in checkpoints(whole)]
    tokenizer, reference = policy.load_tokenizer(str(whole / "start")), policy.load(str(whole / "start"))[0]
    targets = json.loads(next((measured / "parts").glob("targets-*.json")).read_text())
    longest = max(len(row[side].split()) + 1 for row in rows for side in ("chosen", "rejected"))
    own = greedy(models[-1], tokenizer, [row["prompt"] for row in others], longest)
    assert len(targets["responses"]) == PROBE == len(rows)
    assert all(pair in own for pair in zip(targets["prompts"], targets["responses"], strict=True))
    pairs = list(zip(targets["prompts"], targets["responses"], strict=True))
    for place, (step, model) in enumerate(zip((2, 4, 6), models, strict=True)):
        table = found["alignment"].pipe(where, step=step).set_index("component")
        likelihood = torch.stack([logp_of(model, *pair) for pair in pairs]).mean()
        d, descent = gradient(likelihood, model), -gradient(dpo_loss(model, reference, tokenizer, rows), model)
        size = abs(table["g"]["positive"]) + abs(table["g"]["negative"])  # the halves nearly cancel
        assert table["g"]["full"] == pytest.approx((d @ descent).item(), rel=1e-5, abs=1e-5 * size)
        assert table["cosine"]["full"] == pytest.approx((d @ descent / d.norm() / descent.norm()).item(), abs=1e-5)
        assert table["logp_targets"].to_numpy() == pytest.approx(likelihood.item(), rel=1e-5)
        if place < 2:
            parameters = [torch.cat([p.double().flatten() for p in m.parameters()]) for m in models[place : place + 2]]
            moved = (d @ (parameters[1] - parameters[0])).item()
            assert table["moved"].to_numpy() == pytest.approx(moved, rel=1e-5)
        else:
            assert table["moved"].isna().all()
        # the halves: chosen responses are raised by omega beta / B, rejected ones lowered, by hand
        chosen = torch.stack([sequence_logp(model, tokenizer, row["prompt"], row["chosen"]) for row in rows])
        sequences = found["sequences"].pipe(where, step=step)
        omega = torch.tensor(sequences["omega"].to_numpy())
        raised = gradient((BETA / PROBE * omega * chosen).sum(), model)
        assert table["g"]["positive"] == pytest.approx((d @ raised).item(), rel=1e-5)
        assert omega.numpy() == pytest.approx(1 / (1 + np.exp(BETA * sequences["margin"].to_numpy())), rel=1e-5)


def test_parts_add_up_to_the_whole(measured):
    found = tables(measured)
    for step in (2, 4, 6):
        g = found["alignment"].pipe(where, step=step).set_index("component")["g"]
        size = abs(g["positive"]) + abs(g["negative"])
        close = {"rel": 1e-5, "abs": 1e-5 * size}
        assert g["positive"] + g["negative"] == pytest.approx(g["full"], **close)
        assert g["top"] + g["middle"] + g["bottom"] == pytest.approx(g["full"], **close)
        groups = found["groups"].pipe(where, step=step).groupby("part")["g"].sum()
        sequences = found["sequences"].pipe(where, step=step)
        tokens = found["tokens"].pipe(where, step=step)
        for half in ("full", "positive", "negative"):
            assert groups[half] == pytest.approx(g[half], **close)
            assert sequences[half].sum() == pytest.approx(g[half], **close)
        assert (tokens["w"] * tokens["a"]).sum() == pytest.approx(g["full"], **close)
        se = math.sqrt(PROBE * sequences["full"].var(ddof=1))
        row = found["alignment"].pipe(where, step=step, component="full").iloc[0]
        assert row["se"] == pytest.approx(se, rel=1e-4) and row["n"] == PROBE
    layers = [f"layer {i} {kind}" for i in range(2) for kind in ("attention", "mlp", "norms")]
    assert list(found["groups"]["group"].unique()) == ["embedding", *layers, "final norm", "head"]


def test_likelihoods_are_those_of_the_texts(whole, measured):
    found = tables(measured)
    rows, tokenizer = probed(found, whole), policy.load_tokenizer(str(whole / "start"))
    model = policy.load(str(whole / "checkpoint-4"))[0]
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            logps = torch.stack([sequence_logp(model, tokenizer, row["prompt"], row[side]) for row in rows])
        row = found["likelihood"].pipe(where, step=4, kind=side).iloc[0]
        length = sum(len(row[side].split()) + 1 for row in rows)
        assert row["logp"] == pytest.approx(logps.mean().item(), rel=1e-5)
        assert row["se"] == pytest.approx((logps.std() / math.sqrt(PROBE)).item(), rel=1e-4)
        assert row["per_token"] == pytest.approx(logps.sum().item() / length, rel=1e-5) and row["n"] == PROBE
    summary = found["alignment"].query("step == 4")["logp_targets"].iloc[0]
    assert found["likelihood"].query("step == 4 and kind == 'target'")["logp"].item() == pytest.approx(summary)


def test_tables_have_the_columns_that_were_agreed_on(measured):
    found = tables(measured)
    columns = {
        "alignment": "step component g se g_opt se_opt n weight cosine cosine_opt logp_targets moved",
        "sequences": "step example full positive negative omega margin a_chosen a_rejected",
        "tokens": "step example side position token logp w a a_opt strength third",
        "groups": "step part group g cosine",
        "likelihood": "step kind logp se per_token n",
        "texts": "example side prompt response",
    }
    assert {name: " ".join(table.columns) for name, table in found.items()} == columns
    assert all(found[name]["step"].unique().tolist() == [2, 4, 6] for name in afterwards.TABLES)
    keys = "kind title made command method targets models reference model data accuracy cost versions hardware notes"
    told = about(measured)
    assert " ".join(told) == keys and told["kind"] == "after" and told["reference"] == "start"
    assert [(m["step"], m["name"], len(m["sha256"])) for m in told["models"]] == [
        (step, f"checkpoint-{step}", 64) for step in (2, 4, 6)
    ]
    assert told["model"] == {
        "class": "LlamaForCausalLM",
        "parameters": sum(p.numel() for p in tiny()[0].parameters()),
        "moving": sum(p.numel() for p in tiny()[0].parameters()),
        "dtype": "float32",
        "adapter": None,
    }
    assert told["method"]["settings"] == {"beta": BETA} and "eq. 7" in told["method"]["loss"]
    data = told["data"]
    assert data["records"] == data["used"] + sum(data["left_out"].values()) == 24 and data["used"] == PROBE
    assert told["targets"]["sentence"].startswith(
        f"What checkpoint-6 answers greedily to {PROBE} prompts of pairs.jsonl"
    )
    assert any("away from checkpoint-2" in note for note in told["notes"])
    assert any("stored as float32" in note for note in told["notes"])
    assert "At each of 3 checkpoints" in told["accuracy"]["sentence"] and told["accuracy"]["method"] == "forward"


def test_the_rows_of_a_pass_change_nothing(whole, measured, tmp_path):
    one = tables(follow(whole, tmp_path / "other", rows=3))["alignment"]
    pd.testing.assert_frame_equal(one, tables(measured)["alignment"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["simpo", "kto", "ipo", "orpo"])
def test_other_methods_agree_with_their_loss_by_autograd(whole, tmp_path, method):
    """Losses as their papers write them; KTO's divergence is one number without gradient."""
    needs = registry.find(method).reference
    out = follow(whole, tmp_path, reference="start" if needs else None, method=method, settings=(), targets="chosen")
    found, tokenizer = tables(out), policy.load_tokenizer(str(whole / "start"))
    rows, model = probed(found, whole), policy.load(str(whole / "checkpoint-4"))[0]
    reference = policy.load(str(whole / "start"))[0]
    known, beta = about(out)["method"]["settings"], about(out)["method"]["settings"]["beta"]

    def logps(policy_, side, rows=rows):
        return torch.stack([sequence_logp(policy_, tokenizer, row["prompt"], row[side]) for row in rows])

    lengths = {side: torch.tensor([len(row[side].split()) + 1 for row in rows]) for side in ("chosen", "rejected")}
    chosen, rejected = logps(model, "chosen"), logps(model, "rejected")
    with torch.no_grad():
        ratios = chosen - logps(reference, "chosen"), rejected - logps(reference, "rejected")
        shifted = [row | {"chosen": other["chosen"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
        kl = (logps(model, "chosen", shifted) - logps(reference, "chosen", shifted)).mean().clamp(min=0)
    one, other = chosen - (chosen - ratios[0]).detach(), rejected - (rejected - ratios[1]).detach()
    each = [side / lengths[name] for name, side in (("chosen", chosen), ("rejected", rejected))]
    sigmoid = torch.sigmoid
    if method == "simpo":  # Meng et al. 2024, eq. 6
        loss = -torch.log(sigmoid(beta * (each[0] - each[1]) - known["gamma"])) if "gamma" in known else None
    elif method == "kto":  # Ethayarajh et al. 2024, eq. 8
        loss = (2 - sigmoid(beta * (one - kl)) - sigmoid(beta * (kl - other))) / 2
    elif method == "ipo":  # Azar et al. 2023, eq. 17
        loss = (one - other - 1 / (2 * beta)) ** 2
    else:  # Hong et al. 2024, eqs. 4, 6 and 7
        odds = [torch.log(p.exp() / (1 - p.exp())) for p in each]
        loss = -each[0] - beta * torch.log(sigmoid(odds[0] - odds[1]))
    targets = json.loads(next((out / "parts").glob("targets-*.json")).read_text())
    pairs = zip(targets["prompts"], targets["responses"], strict=True)
    d = gradient(torch.stack([logp_of(model, *pair) for pair in pairs]).mean(), model)
    expected = -(d @ gradient(loss.mean(), model)).item()
    g = found["alignment"].query("step == 4").set_index("component")["g"]
    size = abs(g["positive"]) + abs(g["negative"])
    assert g["full"] == pytest.approx(expected, rel=1e-5, abs=1e-5 * size)
    assert set(found["tokens"]["side"]) == {0, 1} and len(found["sequences"]) == 3 * PROBE
    notes = " ".join(about(out)["notes"])
    assert needs or f"{method} reads no reference; margins are differences of plain log-probs" in notes


def test_sft_is_measured_on_chosen_responses(whole, tmp_path):
    out = follow(whole, tmp_path, reference=None, method="sft", settings=(), targets="chosen")
    found, tokenizer = tables(out), policy.load_tokenizer(str(whole / "start"))
    rows, model = probed(found, whole), policy.load(str(whole / "checkpoint-2"))[0]
    targets = json.loads(next((out / "parts").glob("targets-*.json")).read_text())
    pairs = zip(targets["prompts"], targets["responses"], strict=True)
    d = gradient(torch.stack([logp_of(model, *pair) for pair in pairs]).mean(), model)
    ascent = gradient(mean_logp(model, tokenizer, [(row["prompt"], row["chosen"]) for row in rows]), model)
    g = found["alignment"].query("step == 2").set_index("component")["g"]
    assert g["full"] == pytest.approx((d @ ascent).item(), rel=1e-5) and g["negative"] == 0
    rejected = mean_logp(model, tokenizer, [(row["prompt"], row["rejected"]) for row in rows]).item()
    assert found["likelihood"].query("step == 2 and kind == 'rejected'")["logp"].item() == pytest.approx(
        rejected, rel=1e-5
    )
    assert "omega" not in found["sequences"] and g[["top", "middle", "bottom"]].isna().all()
    with pytest.raises(ValueError, match="method='sft' reads no reference; leave it out"):
        follow(whole, tmp_path / "other", method="sft", settings=())


# Targets


def test_targets_of_a_file_are_all_taken(whole, tmp_path):
    file = tmp_path / "answers.jsonl"
    rows = [
        {"prompt": "w1 w2", "response": "w3 w4 w5"},
        {"prompt": [{"role": "user", "content": "w6"}], "response": "w7"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    out = follow(whole, tmp_path / "out", targets=str(file))
    targets = json.loads(next((out / "parts").glob("targets-*.json")).read_text())
    assert targets["prompts"] == [[5, 6, 3], [10, 3]] and targets["responses"] == [[7, 8, 9, 1], [11, 1]]
    assert about(out)["targets"] == {
        "what": "answers.jsonl",
        "count": 2,
        "sentence": "The 2 responses of answers.jsonl.",
    }


def test_a_target_that_the_model_cannot_read_whole_is_refused(whole, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": "w1", "response": "w2 " * 48}))
    with pytest.raises(DataError, match="number 1 has 51 tokens with its prompt, and the model reads 48"):
        follow(whole, tmp_path / "out", targets=str(file))


def test_several_pairs_of_one_prompt_leave_other_prompts_to_be_answered(run, tmp_path):
    """30 pairs of one prompt, and 10 others: the file is read on until there are 3 of these."""
    rows = [{"prompt": "w1", "chosen": f"w2 w{i}", "rejected": f"w3 w{i}"} for i in range(30)]
    rows += [{"prompt": f"w{i} w4", "chosen": "w5", "rejected": "w6"} for i in range(10, 20)]
    (run / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = about(follow(run, tmp_path, probe=3))
    assert "to 3 prompts of pairs.jsonl that are not of the probe" in told["targets"]["sentence"]
    assert told["data"]["records"] == 40 == told["data"]["used"] + sum(told["data"]["left_out"].values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "w1"}', r"line 2: needs `prompt`, .* and `response`, a text; given \{'prompt': 'w1'\}"),
        ('{"prompt": "w1", "response": " "}', "line 2: needs `prompt`"),
        ('{"prompt": [{"role": "king", "content": "w1"}], "response": "w1"}', "line 2: needs `prompt`"),
        ("{", "line 2: not valid JSON"),
    ],
)
def test_a_target_that_cannot_be_read_is_named(tmp_path, line, message):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "w1", "response": "w2"}\n' + line)
    with pytest.raises(DataError, match=message):
        asked.read_targets(str(file))


def test_where_no_prompts_are_left_the_probe_s_own_are_answered(whole, tmp_path):
    out = follow(whole, tmp_path, probe=100)
    told = about(out)
    assert "the 24 prompts of the probe itself, as pairs.jsonl has only 0 others" in told["targets"]["sentence"]
    (kept,) = (out / "parts").glob("targets-*.json")
    replies = json.loads(kept.read_text())["responses"]
    different = len(set(map(tuple, replies)))
    said = f"Of the 24 replies {different} are different." in told["targets"]["sentence"]
    assert len(replies) == 24 and said == (different < 24)
    assert told["data"]["used"] == 24 and told["data"]["left_out"] == {}
    assert any("was to have 100 pairs; the file has 24 that can be used" in note for note in told["notes"])


def test_cuts_are_made_and_counted(whole, tmp_path):
    out = follow(whole, tmp_path, max_prompt=3, max_response=2, targets="chosen")
    found, told = tables(out), about(out)
    rows = probed(found, whole)
    cut = {
        "prompts": sum(len(row["prompt"].split()) + 1 > 3 for row in rows),
        "chosen": sum(len(row["chosen"].split()) + 1 > 2 for row in rows),
        "rejected": sum(len(row["rejected"].split()) + 1 > 2 for row in rows),
    }
    assert told["data"]["cut"] == cut and cut["chosen"] > 0
    assert found["tokens"]["position"].max() == 1 and "of them are cut to 2 tokens" in told["targets"]["sentence"]
    assert told["data"]["records"] == told["data"]["used"] + sum(told["data"]["left_out"].values())


def test_what_is_longer_than_the_model_reads_is_left_out_and_counted(run, tmp_path):
    with (run / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "w1 " * 30, "chosen": "w2 " * 30, "rejected": "w3"}) + "\n")
    told = about(follow(run, tmp_path, probe=100, targets="chosen"))
    assert told["data"]["left_out"] == {"longer than the 48 tokens that the model reads": 1}
    assert "0 others that can be used; G holds what each of them does to itself." in told["targets"]["sentence"]


def test_words_that_the_tokenizer_does_not_know_are_counted(run, tmp_path):
    rows = [{"prompt": f"w{i}", "chosen": "w1 zebra", "rejected": f"w2 w{i}"} for i in range(8)]
    (run / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    notes = " ".join(about(follow(run, tmp_path, targets="chosen"))["notes"])
    assert "8 of 64 tokens of the probe (12.5%) stand for words that the tokenizer does not know" in notes


def test_tokens_beyond_the_embeddings_are_refused(run, tmp_path):
    """A tokenizer that has grown by control tokens is no fault until one of them is used."""
    for folder in (*checkpoints(run), run / "start"):
        tokenizer = policy.load_tokenizer(str(folder))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<reply>", "<end>"]})
        tokenizer.save_pretrained(folder)
    model, words = tiny()
    batch = data.encode(words, ["w1"], ["w35"], max_prompt=9, max_response=9)
    model.resize_token_embeddings(38)
    with pytest.raises(DataError, match=r"1 tokens of chosen in 1 of 1 rows have ids from 39 on, .* 38 embeddings"):
        afterwards._require_words(model, {"chosen": batch})
    assert about(follow(run, tmp_path, targets="chosen"))["data"]["used"] == PROBE


# Going on after a crash


def count_loads(monkeypatch) -> list[str]:
    """Names of the folders that are loaded from now on."""
    loaded, load = [], folders.load
    monkeypatch.setattr(folders, "load", lambda name, *rest: loaded.append(Path(name).name) or load(name, *rest))
    return loaded


def count_measurements(monkeypatch, fails_at: int | None = None) -> list[str]:
    """Names of the checkpoints that are measured from now on; at one of them the power fails."""
    measured, passes = [], afterwards._passes

    def counted(where, *rest):
        if len(measured) == fails_at:
            raise KeyboardInterrupt
        measured.append(where)
        return passes(where, *rest)

    monkeypatch.setattr(afterwards, "_passes", counted)
    return measured


def test_after_a_crash_the_rest_is_computed_and_nothing_else(whole, measured, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        done = count_measurements(patch, fails_at=2)
        with pytest.raises(KeyboardInterrupt):
            follow(whole, tmp_path / "out")
        assert done == ["checkpoint-2", "checkpoint-4"]
    half = tables(tmp_path / "out")
    assert half["alignment"]["step"].unique().tolist() == [2, 4] and half["alignment"]["moved"].notna().all()
    assert any("2 of 3 checkpoints are measured so far" in note for note in about(tmp_path / "out")["notes"])
    loaded, done = count_loads(monkeypatch), count_measurements(monkeypatch)
    follow(whole, tmp_path / "out")
    assert done == ["checkpoint-6"] and loaded == ["checkpoint-6"]  # the reference and D' are kept too
    for name, table in tables(measured).items():
        pd.testing.assert_frame_equal(table, tables(tmp_path / "out")[name], rtol=1e-6)
    follow(whole, tmp_path / "out")
    assert len(done) == 1 and len(loaded) == 1


def test_what_depends_on_other_settings_is_computed_again(run, tmp_path, monkeypatch):
    follow(run, tmp_path, targets="chosen")
    done = count_measurements(monkeypatch)
    follow(run, tmp_path, targets="chosen", settings=(("beta", 0.1),))
    assert len(done) == 3 and set(about(tmp_path)["method"]["settings"].values()) == {0.1}
    follow(run, tmp_path, targets="chosen")
    assert len(done) == 3  # the results of the first question are still there
    follow(run, tmp_path, made=checkpoints(run)[:2], targets="chosen")
    assert done[3:] == ["checkpoint-4"]  # from which it is no longer known how far the run moved
    shutil.copy(run / "checkpoint-2" / "model.safetensors", run / "checkpoint-6" / "model.safetensors")
    follow(run, tmp_path, targets="chosen")
    assert done[4:] == ["checkpoint-4", "checkpoint-6"]


def test_scores_that_a_backward_pass_does_not_confirm_are_refused(whole, tmp_path, monkeypatch):
    scores = precision.token_scores

    def wrong(*given, **more):
        logps, a = scores(*given, **more)
        return logps, 1.01 * a

    monkeypatch.setattr(precision, "token_scores", wrong)
    with pytest.raises(MeasurementError, match="checkpoint-2, method='forward': the scores give G ="):
        follow(whole, tmp_path)


# References and adapters


def test_a_reference_that_is_needed_is_asked_for(run, tmp_path):
    with pytest.raises(ValueError, match=r"reference='no-such-model': neither a folder nor a model that the hub knows"):
        Follow(folders.read(checkpoints(run)), question(run), tmp_path, reference="no-such-model")
    with pytest.raises(
        ValueError, match="method='dpo' compares with a reference policy and none was given; allowed: --ref"
    ):
        follow(run, tmp_path, reference=None)
    shutil.copytree(run / "start", run / "checkpoint-0")
    out = follow(run, tmp_path, reference=None)
    assert about(out)["reference"] == "checkpoint-0"
    assert tables(out)["sequences"].query("step == 0")["margin"].abs().max() < 1e-5
    assert any("checkpoint-0, the checkpoint of step 0" in note for note in about(out)["notes"])


def test_adapters_are_measured_over_their_own_weights(run, tmp_path):
    """Against autograd on the PeftModel; the reference is the base without the adapter."""
    peft = pytest.importorskip("peft")
    made = lora(run)
    out = follow(run, tmp_path, made=made, reference=None, targets="chosen")
    found, tokenizer = tables(out), policy.load_tokenizer(str(run / "start"))
    rows, reference = probed(found, run), policy.load(str(run / "start"))[0]
    targets = json.loads(next((out / "parts").glob("targets-*.json")).read_text())
    pairs = list(zip(targets["prompts"], targets["responses"], strict=True))
    vectors, directions = [], []
    for step, folder in zip((2, 4), made, strict=True):
        model = peft.PeftModel.from_pretrained(
            policy.load(str(run / "start"))[0], str(folder), is_trainable=True
        ).eval()
        d = gradient(torch.stack([logp_of(model, *pair) for pair in pairs]).mean(), model)
        g = found["alignment"].pipe(where, step=step).set_index("component")["g"]
        expected = -(d @ gradient(dpo_loss(model, reference, tokenizer, rows), model)).item()
        size = abs(g["positive"]) + abs(g["negative"])
        assert g["full"] == pytest.approx(expected, rel=1e-5, abs=1e-5 * size)
        groups = found["groups"].pipe(where, step=step, part="full").set_index("group")["g"]
        assert list(groups.index) == ["layer 0 attention", "layer 1 attention"]
        assert groups.sum() == pytest.approx(g["full"], rel=1e-5, abs=1e-5 * size)
        vectors.append(torch.cat([p.detach().double().flatten() for p in moving(model)]))
        directions.append(d)
    moved = found["alignment"].query("step == 2")["moved"].iloc[0]
    assert moved == pytest.approx((directions[0] @ (vectors[1] - vectors[0])).item(), rel=1e-5)
    told = about(out)
    assert told["reference"] == "start" and told["model"]["adapter"] == "LORA of rank 2 on q_proj, v_proj"
    assert told["model"]["moving"] == len(vectors[0]) < told["model"]["parameters"]
    assert any("The reference is the base model without the adapter" in note for note in told["notes"])


def test_the_final_replies_of_adapters_are_those_with_the_last_one(run, tmp_path):
    peft = pytest.importorskip("peft")
    made = lora(run)
    out = follow(run, tmp_path, made=made, reference=None)
    targets = json.loads(next((out / "parts").glob("targets-*.json")).read_text())
    last = peft.PeftModel.from_pretrained(policy.load(str(run / "start"))[0], str(made[-1])).eval()
    tokenizer = policy.load_tokenizer(str(run / "start"))
    asked = [tokenizer.decode(ids[:-1]) for ids in targets["prompts"]]
    most = max(map(len, targets["responses"]))
    assert list(zip(targets["prompts"], targets["responses"], strict=True)) == greedy(last, tokenizer, asked, most)


# Precision and memory


def test_bfloat16_is_measured_with_its_error(whole, measured, tmp_path):
    out = follow(whole, tmp_path, dtype="bfloat16", targets="chosen")
    exact = tables(follow(whole, tmp_path / "exact", targets="chosen"))["alignment"]
    rounded = tables(out)["alignment"]
    for half in ("positive", "negative"):
        pair = (t.pipe(where, component=half)["g"].to_numpy() for t in (rounded, exact))
        assert next(pair) == pytest.approx(next(pair), rel=0.2)
    told = about(out)
    assert told["model"]["dtype"] == "bfloat16" and "bfloat16 is off by" in told["accuracy"]["sentence"]
    assert any("stored as float32, and were computed with in bfloat16" in note for note in told["notes"])


def test_weights_stored_in_bfloat16_are_measured_in_float32(run, tmp_path):
    """The weights of the copy are those of the file, cast up: log-probs are those of float32 arithmetic on them."""
    for folder in checkpoints(run):
        policy.load(str(folder))[0].to(torch.bfloat16).save_pretrained(folder)
    out = follow(run, tmp_path, targets="chosen")
    assert about(out)["model"]["dtype"] == "float32"
    assert any("stored as bfloat16, and were computed with in float32" in note for note in about(out)["notes"])
    model, tokenizer = policy.load(str(run / "checkpoint-2"))[0], policy.load_tokenizer(str(run / "start"))
    rows = probed(tables(out), run)
    with torch.no_grad():
        chosen = mean_logp(model, tokenizer, [(row["prompt"], row["chosen"]) for row in rows]).item()
    found = where(tables(out)["likelihood"], step=2, kind="chosen")["logp"].item()
    assert found == pytest.approx(chosen, rel=1e-5)


def test_memory_that_runs_out_halves_the_rows(whole, measured, tmp_path, monkeypatch):
    passes, tried = afterwards._passes, []

    def narrow(where, model, targets, batch, weigh, method, rows):
        tried.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("out of memory")
        return passes(where, model, targets, batch, weigh, method, rows)

    monkeypatch.setattr(afterwards, "_passes", narrow)
    out = follow(whole, tmp_path, rows=8)
    assert tried == [8, 4, 2, 2, 2] and about(out)["cost"]["rows"] == 2
    pd.testing.assert_frame_equal(tables(out)["alignment"], tables(measured)["alignment"], rtol=1e-4, atol=1e-6)


def test_a_limit_on_memory_gives_the_rows(whole, tmp_path, monkeypatch):
    limits = []

    def within(limit, cost, most, device):
        cost(2)
        limits.append((limit, most))
        return memory.Rows(5, limit, 0.1, 0.0, 1.0, {1: 1})

    monkeypatch.setattr(memory, "rows_within", within)
    out = follow(whole, tmp_path, limit=memory.held() + 10**9, targets="chosen")
    assert len(limits) == 1 and limits[0][1] == 3 * PROBE and about(out)["cost"]["rows"] == 5
    assert any("Memory: 5 rows a pass" in note for note in about(out)["notes"])
    with pytest.raises(memory.DoesNotFit, match="less than what is in use once a model is loaded"):
        follow(whole, tmp_path / "small", limit=1000, targets="chosen")


# What is refused


def test_a_method_of_rollouts_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"method='ppo': its weights come from replies sampled while it trains .* rewards"
    ):
        Question("pairs.jsonl", method="ppo").found()
    with pytest.raises(ValueError, match=r"method='dpoo': no such method. Did you mean 'dpo'"):
        Question("pairs.jsonl", method="dpoo").found()
    with pytest.raises(ValueError, match="dpo: no such setting: gamma; there are: beta"):
        Question("pairs.jsonl", settings=(("gamma", 1.0),)).found()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probe": 0}, "probe=0: must be at least 1"),
        ({"max_response": 0}, "max_response=0: must be"),
        ({"dtype": "int8"}, "dtype='int8': must be one of float32, bfloat16"),
    ],
)
def test_questions_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Question("pairs.jsonl", **given)


def test_single_completions_do_not_fit_a_method_of_pairs(run, tmp_path):
    rows = [
        {"prompt": f"w{i}", "completion": f"w{i} w{i + label}", "label": bool(label)}
        for i in range(9)
        for label in (0, 1)
    ]
    (run / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"holds single completions with labels, and method='dpo' compares .* \(kto\)"):
        follow(run, tmp_path)
    told = about(follow(run, tmp_path, method="kto"))
    assert told["data"]["layout"] == "unpaired" and told["data"]["records"] == 18 and told["data"]["used"] == PROBE


def test_pairs_of_which_nothing_is_left_are_refused(run, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        follow(run, tmp_path, pairs="nothing.jsonl")
    rows = [{"prompt": f"w{i}", "chosen": "w1 w2", "rejected": "w1 w3"} for i in range(4)]
    (run / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="none of 4 pairs can be used: 4 x cut to max_response=1 tokens, chosen and"):
        follow(run, tmp_path, max_response=1)


def test_a_folder_with_something_else_is_not_written_over(run, tmp_path):
    (tmp_path / "about.json").write_text('{"kind": "live"}')
    with pytest.raises(ValueError, match=r"its about.json is not of a measurement after the fact"):
        follow(run, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; allowed: a folder"):
        follow(run, tmp_path / "file")


def test_a_template_that_asks_for_the_date_is_told_the_same_one_when_resumed(run, tmp_path):
    template = "{{ strftime_now('%Y') }} " + policy.CHAT_TEMPLATE
    for folder in checkpoints(run):
        tokenizer = policy.load_tokenizer(str(folder))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    tmp_path.joinpath("about.json").write_text(
        '{"kind": "after", "command": null, "made": "2019-05-06T07:08:09+00:00"}'
    )
    told = about(follow(run, tmp_path, targets="chosen"))
    assert told["made"].startswith("2019-05-06")
    assert any("asks for the date, and was told 2019-05-06" in note for note in told["notes"])


def test_one_pair_has_no_standard_error(whole, tmp_path):
    found = tables(follow(whole, tmp_path, probe=1, targets="chosen"))
    assert found["alignment"]["se"].isna().all() and found["alignment"]["g"].notna().sum() == 9
    assert len(WORDS) == 36 and found["tokens"]["example"].unique().tolist() == [0]
