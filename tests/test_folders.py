"""Checkpoint folders of trainers: steps, one run or several, bases and references, and what is loaded of them."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from prefdyn.lab import folders, policy
from prefdyn.lab.folders import FolderError
from safetensors.torch import load_file, save_file

WORDS = [f"w{i}" for i in range(36)]
BETA = 0.5


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def write_pairs(path: Path, count: int = 24, seed: int = 0) -> Path:
    """A file of pairs of random words, no two of one prompt."""
    rng = random.Random(seed)
    rows = [{"prompt": f"w{i % 36} {words(rng, 3)}", "chosen": words(rng, 6)} for i in range(count)]
    lines = [json.dumps(row | {"rejected": f"w{i % 36} {words(rng, 5)}"}) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny(seed: int = 0, vocabulary: list[str] = WORDS, **sizes):
    """A random llama of two layers and its tokenizer."""
    tokenizer = policy.word_tokenizer(vocabulary)
    sizes = {"layers": 2, "width": 16, "heads": 2, "context": 48, "architecture": "llama"} | sizes
    return policy.scratch_model(tokenizer, seed=seed, **sizes), tokenizer


def sequence_logp(model, tokenizer, prompt: str, reply: str) -> torch.Tensor:
    """The log-prob of a reply and its end, by the words' ids and a plain log-softmax, independent of the library."""
    asked = [tokenizer.convert_tokens_to_ids(w) for w in [*prompt.split(), "<reply>"]]
    told = [tokenizer.convert_tokens_to_ids(w) for w in [*reply.split(), "<eos>"]]
    logits = model(input_ids=torch.tensor([asked + told])).logits[0].log_softmax(-1)
    return logits[len(asked) - 1 : -1].gather(-1, torch.tensor(told)[:, None]).sum()


def dpo_loss(model, reference, tokenizer, rows: list[dict], beta: float = BETA) -> torch.Tensor:
    """Rafailov et al. 2023, eq. 7, pair by pair."""
    losses = []
    for row in rows:
        chosen, rejected = (sequence_logp(model, tokenizer, row["prompt"], row[s]) for s in ("chosen", "rejected"))
        with torch.no_grad():
            known = [sequence_logp(reference, tokenizer, row["prompt"], row[s]) for s in ("chosen", "rejected")]
        losses.append(-torch.nn.functional.logsigmoid(beta * ((chosen - known[0]) - (rejected - known[1]))))
    return torch.stack(losses).mean()


def read_pairs(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_run(folder: Path, pairs: Path, *, steps=(2, 4, 6), rate: float = 0.02, **saving) -> list[Path]:
    """DPO in plain torch from folder/start; checkpoint-N at each of `steps`, as transformers saves a model."""
    model, tokenizer = tiny()
    reference, _ = tiny()
    policy.save(model, tokenizer, folder / "start")
    rows, optimizer = read_pairs(pairs)[:6], torch.optim.AdamW(model.parameters(), lr=rate)
    made = []
    for step in range(max(steps) + 1):
        if step in steps:
            made.append(folder / f"checkpoint-{step}")
            model.save_pretrained(made[-1], **saving)
            tokenizer.save_pretrained(made[-1])
        optimizer.zero_grad()
        dpo_loss(model, reference, tokenizer, rows).backward()
        optimizer.step()
    return made


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


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, change) -> None:
    save_file({name: change(t).contiguous() for name, t in load_file(path).items()}, path, {"format": "pt"})


def loader_of(series: folders.Series, reference: str | None = None) -> folders.Loader:
    _, where = folders.tokenizer_of(series, reference)
    return folders.Loader(series, where, torch.device("cpu"))


# Steps and series


def test_checkpoints_come_by_step_and_not_by_name(run):
    """As texts, checkpoint-10 stands before checkpoint-2."""
    (run / "checkpoint-6").rename(run / "checkpoint-10")
    series = folders.read(checkpoints(run))
    assert [c.step for c in series.checkpoints] == [2, 4, 10]
    assert series.adapter is None and series.stored == ("float32",)


def test_the_step_of_another_name_is_that_of_the_trainer_state(run):
    (run / "checkpoint-6").rename(run / "best")
    with pytest.raises(FolderError, match=r"best: of which step\? Call it checkpoint-N, or leave its trainer_state"):
        folders.read([run / "best"])
    (run / "best" / "trainer_state.json").write_text(json.dumps({"global_step": 6, "epoch": 1.0}))
    assert [c.step for c in folders.read([run / "best", run / "checkpoint-2"]).checkpoints] == [2, 6]


@pytest.mark.parametrize(
    ("told", "message"),
    [(7, "step 6 by its name and of step 7 by its trainer_state"), ("x", "global_step is 'x'; allowed: a number")],
)
def test_a_state_that_says_otherwise_is_refused(run, told, message):
    (run / "checkpoint-6" / "trainer_state.json").write_text(json.dumps({"global_step": told}))
    with pytest.raises(FolderError, match=message):
        folders.read(checkpoints(run))


def test_two_of_one_step_are_refused(run):
    shutil.copytree(run / "checkpoint-2", run / "copy")
    (run / "copy" / "trainer_state.json").write_text('{"global_step": 2}')
    with pytest.raises(FolderError, match="are both of step 2; give one"):
        folders.read([run / "checkpoint-2", run / "copy"])


def test_what_is_no_checkpoint_is_named(run, tmp_path):
    with pytest.raises(FolderError, match="given none; at least one folder is needed"):
        folders.read([])
    with pytest.raises(FolderError, match=r"checkpoint-9: no such folder; allowed: folders such as RUN/checkpoint-\*"):
        folders.read([run / "checkpoint-9"])
    with pytest.raises(
        FolderError, match=r"is no checkpoint: .*holds checkpoint-2, checkpoint-4, .*: give .*/checkpoint-\*"
    ):
        folders.read([run])


def test_pickled_weights_are_refused_and_not_read(run):
    file = run / "checkpoint-2" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(FolderError, match="its weights are pickled, which could run code"):
        folders.read(checkpoints(run))
    file.with_name("pytorch_model.bin").rename(file.with_name("training_args.bin"))  # which every trainer leaves
    with pytest.raises(FolderError, match=r"has no weights; needed: model.safetensors"):
        folders.read(checkpoints(run))


def test_damaged_weights_are_named(run):
    (run / "checkpoint-4" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FolderError, match=r"checkpoint-4/model.safetensors: is damaged"):
        folders.read(checkpoints(run))


def test_shards_are_read_and_a_missing_one_is_named(whole, tmp_path):
    model = policy.load(str(whole / "checkpoint-4"))[0]
    folder = tmp_path / "checkpoint-4"
    model.save_pretrained(folder, max_shard_size="8KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    series = folders.read([folder, whole / "checkpoint-2"])
    found = loader_of(series).model(series.checkpoints[1])
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in found.named_parameters())
    off, size = folders.distance(folder, whole / "checkpoint-2")
    assert size == pytest.approx(sum(p.square().sum().item() for p in model.parameters()) ** 0.5, rel=1e-6) and off > 0
    shards[1].unlink()
    with pytest.raises(FolderError, match=f"lacks weights that its index names: {shards[1].name}"):
        folders.read([folder])


def test_distance_is_that_of_all_weights(run):
    change_weights(run / "checkpoint-4" / "model.safetensors", lambda t: t + 0.5)
    shutil.copy(run / "checkpoint-2" / "model.safetensors", run / "checkpoint-6" / "model.safetensors")
    change_weights(run / "checkpoint-6" / "model.safetensors", lambda t: t + 0.25)
    count = sum(t.numel() for t in load_file(run / "checkpoint-2" / "model.safetensors").values())
    off, _ = folders.distance(run / "checkpoint-2", run / "checkpoint-6")
    assert off == pytest.approx(0.25 * count**0.5, rel=1e-5)


def test_checkpoints_of_different_models_are_refused(run, tmp_path):
    change_json(run / "checkpoint-4" / "config.json", num_attention_heads=4)
    with pytest.raises(FolderError, match=r"different models: their config.json differ in num_attention_heads: 2, 4"):
        folders.read(checkpoints(run))
    change_json(
        run / "checkpoint-4" / "config.json", num_attention_heads=2, use_cache=False, transformers_version="4.0"
    )
    assert len(folders.read(checkpoints(run)).checkpoints) == 3  # what does not change the function
    weights = load_file(run / "checkpoint-6" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:5].clone()}, run / "checkpoint-6" / "model.safetensors")
    with pytest.raises(FolderError, match=rf"different weights: {name}: \(64, 16\), \(5, 16\)"):
        folders.read(checkpoints(run))


# Tokenizers


def test_a_tokenizer_that_changes_is_refused(run):
    file = run / "checkpoint-4" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w3"', '"other"'))
    with pytest.raises(FolderError, match=r"the tokenizers of .*checkpoint-2 and .*checkpoint-4 differ: their vocab"):
        folders.tokenizer_of(folders.read(checkpoints(run)))


def test_how_a_trainer_last_padded_is_no_difference(run):
    file = run / "checkpoint-4" / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    change_json(file, truncation=truncation)
    tokenizer, where = folders.tokenizer_of(folders.read(checkpoints(run)))
    assert where == str(run / "checkpoint-2") and tokenizer("w1").input_ids == [5]


def test_without_one_of_its_own_the_reference_s_tokenizer_is_taken(run):
    for checkpoint in checkpoints(run):
        for file in checkpoint.glob("*token*"):
            file.unlink()
        (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    series = folders.read(checkpoints(run))
    with pytest.raises(FolderError, match="has no tokenizer; save it there, or give a --reference or --base"):
        folders.tokenizer_of(series)
    start = str(run / "start")
    assert folders.tokenizer_of(series, start)[1] == start
    found = loader_of(series, start).model(series.checkpoints[1])
    kept = load_file(run / "checkpoint-4" / "model.safetensors")
    assert torch.equal(found.lm_head.weight, kept["lm_head.weight"])
    (run / "checkpoint-4" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(FolderError, match=rf"model='{run}/checkpoint-4': "):  # and not where both were put together
        loader_of(series, start).model(series.checkpoints[1])


def test_a_reference_with_other_words_is_refused(run):
    model, _ = tiny()
    policy.save(model, policy.word_tokenizer(WORDS[::-1]), run / "other")
    with pytest.raises(FolderError, match="36 ids are other tokens; 4 is 'w35' there and 'w0' here"):
        folders.tokenizer_of(folders.read(checkpoints(run)), str(run / "other"))


# References


def test_the_start_of_a_run_is_its_reference_and_the_distance_is_told(run):
    series = folders.read(checkpoints(run))
    model, told = loader_of(series).reference(str(run / "start"))
    off, size = folders.distance(run / "checkpoint-2", run / "start")
    assert torch.equal(model.lm_head.weight, tiny()[0].lm_head.weight)
    assert told == f"The reference is {off:.3g} ({off / size:.2%} of the length of the weights) away from checkpoint-2."


@pytest.mark.parametrize("count", [3, 1])
def test_other_weights_of_the_same_shapes_are_refused_with_the_numbers(run, count):
    """Of a run that moved little; weights of two random models are about 1.4 of their length apart."""
    for checkpoint in checkpoints(run):
        start = load_file(run / "start" / "model.safetensors")
        change = load_file(checkpoint / "model.safetensors")
        moved = {name: t + 0.01 * (change[name] - t) for name, t in start.items()}
        save_file(moved, checkpoint / "model.safetensors", {"format": "pt"})
    model, tokenizer = tiny(seed=1)
    policy.save(model, tokenizer, run / "other")
    series = folders.read(checkpoints(run)[:count])
    loader_of(series).reference(str(run / "start"))
    why = (
        "20 times what the run moved from step 2 to step 6"
        if count > 1
        else "10% of the length .* one checkpoint alone"
    )
    with pytest.raises(FolderError, match=rf"other weights: it is .* away from checkpoint-2; allowed: .*{why}"):
        loader_of(series).reference(str(run / "other"))


def test_how_far_a_reference_may_be():
    """By hand: the run moved 3 from step 10 to step 20, and as many steps were before: 20 * 3; of one, a tenth."""
    many = folders.Series((folders.Checkpoint(Path("a"), 10), folders.Checkpoint(Path("b"), 20)), None, None, None, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "distance", lambda one, other: (3.0, 50.0))
        assert folders.farthest(many, 50.0)[0] == 60.0
        assert folders.farthest(many, 9000.0)[0] == 90.0  # a hundredth of the length is never suspicious
    assert folders.farthest(folders.Series(many.checkpoints[:1], None, None, None, ()), 50.0)[0] == 5.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": [*WORDS, "w36"]}, "it has 41 embeddings of tokens, and the checkpoints have 40"),
        ({"layers": 1}, "its configuration differs from that of the checkpoints in .*num_hidden_layers: 1, 2"),
        ({"architecture": "gpt-neox"}, "a GPTNeoXForCausalLM, and the checkpoints are LlamaForCausalLM"),
    ],
)
def test_a_reference_of_another_architecture_is_refused(run, change, message):
    policy.save(*tiny(**change), run / "other")
    series = folders.read(checkpoints(run))
    with pytest.raises(FolderError, match=message):
        loader_of(series).reference(str(run / "other"))


def test_a_reference_that_is_not_there_is_named(run):
    with pytest.raises(FolderError, match=r"reference='./nowhere': no such folder"):
        loader_of(folders.read(checkpoints(run))).reference("./nowhere")


# Adapters


def lora(run: Path, steps=(2, 4), **settings) -> list[Path]:
    """A LoRA run on run/start, in plain torch; steps are of a fixed size in random directions."""
    peft = pytest.importorskip("peft")
    base, tokenizer = policy.load(str(run / "start"))
    base.name_or_path = str(run / "start")
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config)
    made = []
    for step in range(max(steps) + 1):
        if step in steps:
            made.append(run / "adapters" / f"checkpoint-{step}")
            model.save_pretrained(made[-1])
            tokenizer.save_pretrained(made[-1])
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
    return made


def test_adapters_and_whole_models_are_not_one_run(run):
    made = lora(run)
    with pytest.raises(FolderError, match=r"checkpoint-2 holds a whole model and .*checkpoint-4 an adapter"):
        folders.read([run / "checkpoint-2", made[1]])
    shutil.copy(run / "checkpoint-2" / "config.json", made[0])
    shutil.copy(run / "checkpoint-2" / "model.safetensors", made[0])
    with pytest.raises(FolderError, match="holds a whole model and an adapter; which of them is meant"):
        folders.read(made)


def test_adapters_change_on_one_base_and_only_theirs_move(run):
    peft = pytest.importorskip("peft")
    made = lora(run, modules_to_save=["lm_head"])
    series = folders.read(made)
    assert series.base == str(run / "start") and series.adapter["r"] == 2
    loader = loader_of(series)
    ids = torch.tensor([[4, 5, 6, 7]])
    for checkpoint in (*series.checkpoints, series.checkpoints[0]):
        model = loader.model(checkpoint)
        fresh = peft.PeftModel.from_pretrained(policy.load(str(run / "start"))[0], str(checkpoint.folder))
        assert torch.equal(model(ids).logits, fresh(ids).logits)
        moving = {name for name, p in model.named_parameters() if p.requires_grad}
        assert moving and all("lora_" in name or "modules_to_save" in name for name in moving)
        assert not model.training and type(model).__name__ == "LlamaForCausalLM"
    assert folders.adapter_sentence(series.adapter) == "LORA of rank 2 on q_proj, v_proj, lm_head whole"


def test_a_base_that_is_missing_or_another_one_is_refused(run):
    made = lora(run)
    shutil.copytree(run / "start", run / "copy")
    assert folders.read(made, str(run / "copy")).base == str(run / "copy")  # the same weights
    policy.save(*tiny(seed=1), run / "other")
    with pytest.raises(FolderError, match=r"other': is another model than .*start', which the adapters name: .* apart"):
        folders.read(made, str(run / "other"))
    shutil.move(run / "start", run / "moved")
    with pytest.raises(FolderError, match=r"the base model '.*start' of its adapter is missing; give .* --base"):
        folders.read(made)
    (note,) = folders.read(made, str(run / "moved")).notes
    assert "which is not there to compare with; 'moved' was given" in note
    for folder in made:
        change_json(folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(FolderError, match="names no base model; give it with --base"):
        folders.read(made)
    with pytest.raises(FolderError, match=r"base=.*no such folder; allowed: a folder, or the name"):
        folders.read(made, "./nowhere")


def test_a_base_is_not_taken_for_whole_models(run):
    with pytest.raises(FolderError, match="holds a whole model, which has no base; leave it out"):
        folders.read(checkpoints(run), str(run / "start"))


def test_an_adapter_that_does_not_fit_its_base_is_refused(run):
    made = lora(run)
    policy.save(*tiny(width=32), run / "wide")
    shutil.rmtree(run / "start")
    series = folders.read(made, str(run / "wide"))
    with pytest.raises(FolderError, match=r"its adapter does not fit its base .*wide"):
        loader_of(series).model(series.checkpoints[0])


def test_an_adapter_that_lacks_weights_is_refused(run):
    made = lora(run)
    for folder in made:
        file = folder / "adapter_model.safetensors"
        kept = load_file(file)
        dropped = sorted(kept)[0]
        save_file({name: t for name, t in kept.items() if name != dropped}, file)
    series = folders.read(made)
    with pytest.raises(FolderError, match=f"only one of them has {dropped}"):
        loader_of(series).model(series.checkpoints[0])


def test_without_peft_an_adapter_is_refused_with_what_to_do(run, monkeypatch):
    made = lora(run)
    series = folders.read(made)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(FolderError, match="holds an adapter; to read it: pip install peft"):
        loader_of(series).model(series.checkpoints[0])


def test_a_pickled_adapter_is_refused(run):
    made = lora(run)
    file = made[0] / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(FolderError, match=r"its weights are pickled, .* needed: adapter_model.safetensors"):
        folders.read(made)


def test_references_of_adapters(run):
    """Their base, an adapter with the same settings, and nothing else."""
    made = lora(run)
    policy.save(*tiny(seed=1), run / "other")
    series = folders.read(made)
    assert "the base of the adapters" in loader_of(series).reference(str(run / "start"))[1]
    with pytest.raises(FolderError, match=r"other weights: .* away from the base of the adapters; allowed: 1% "):
        loader_of(series).reference(str(run / "other"))
    model, told = loader_of(series).reference(str(made[0]))
    assert told.startswith("The reference is 0 (0.00% ") and any("lora_" in n for n, _ in model.named_parameters())
    change_json(made[1] / "adapter_config.json", r=3)
    with pytest.raises(FolderError, match=r"its adapter_config.json differs from the run's in r: 3, 2"):
        loader_of(folders.read(made[:1])).reference(str(made[1]))
    with pytest.raises(FolderError, match="holds an adapter, and the checkpoints are whole models; merge it"):
        loader_of(folders.read(checkpoints(run))).reference(str(made[0]))


def test_the_identity_is_that_of_what_is_loaded(run):
    series = folders.read(checkpoints(run))
    before = [folders.identity(series, c) for c in series.checkpoints]
    assert len(set(before)) == 3
    (run / "checkpoint-4" / "README.md").write_text("nothing that is loaded")
    change_weights(run / "checkpoint-6" / "model.safetensors", lambda t: t + 1)
    after = [folders.identity(series, c) for c in series.checkpoints]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, False]
