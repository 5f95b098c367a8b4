"""A policy: saved and loaded without loss, scored as by a plain loop, decoded as by the library it comes from."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from prefdyn.lab import chat, policy
from prefdyn.lab.worlds import EASY
from prefdyn.lens import likelihood
from prefdyn.lens.batch import pad
from safetensors.torch import load_file, save_file
from scipy import stats
from toys.models import ARCHITECTURES, Table, build, lift_float32, random_batch, tiny_policy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXTS = ["Hello, wörld! 你好 🙂", "two\n\nlines and  spaces ", "dear ann , the fox lives in the den ."]


@pytest.fixture(params=["words", "byte pairs"])
def tokenizer(request):
    if request.param == "words":
        return policy.word_tokenizer(EASY.vocabulary())
    return policy.bpe_tokenizer(["the fox lives in the den ."] * 9, 320)


def test_tokenizers_survive_saving(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
        assert chat.prompt_ids(loaded, [text]) == chat.prompt_ids(tokenizer, [text])
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_byte_pairs_lose_nothing():
    tokenizer = policy.bpe_tokenizer(["the fox lives in the den ."] * 9, 320)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_word_of_the_world_is_one_token_and_comes_back():
    tokenizer = policy.word_tokenizer(EASY.vocabulary())
    reply = "dear ann , the fox lives in the den . with love ."
    (ids,) = chat.response_ids(tokenizer, [reply])
    assert len(ids) == len(reply.split()) + 1 and tokenizer.unk_token_id not in ids
    assert policy.decode(tokenizer, [ids]) == [reply]


def test_policies_survive_saving(tmp_path, policy_and_tokenizer):
    model, tokenizer = policy_and_tokenizer
    policy.save(model, tokenizer, tmp_path)
    loaded, loaded_tokenizer = policy.load(str(tmp_path))
    ids = torch.tensor([loaded_tokenizer("dear ann , the fox")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(loaded(ids).logits, logits)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    assert not loaded.training


def test_seeds_make_models_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (tiny_policy(seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_width_must_suit_the_heads():
    with pytest.raises(ValueError, match=r"width=18, heads=2.*multiple"):
        tiny_policy(width=18)


def test_a_checkpoint_that_is_not_there_is_an_error_that_helps(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*no such folder; allowed"):
        policy.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("damage", ["empty folder", "no weights", "cut weights", "cut config"])
def test_a_checkpoint_that_cannot_be_read_is_an_error_that_helps(tmp_path, policy_and_tokenizer, damage):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if damage != "empty folder":
        policy.save(*policy_and_tokenizer, folder)
        weights = folder / "model.safetensors"
        if damage == "no weights":
            weights.unlink()
        elif damage == "cut weights":
            weights.write_bytes(weights.read_bytes()[:5_000])
        else:
            (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"could not be loaded; allowed: 'scratch'"):
        policy.load(str(folder))


def test_a_tokenizer_without_padding_is_given_its_end_of_text(tmp_path, policy_and_tokenizer):
    policy.save(*policy_and_tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    _, tokenizer = policy.load(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


VOCAB = 23
WORDS = [f"w{i}" for i in range(VOCAB - 4)]  # beside the four special tokens


def saved(folder: Path, architecture: str = "llama", **config) -> Path:
    """A checkpoint of a tiny model and a tokenizer of as many words."""
    model = build(architecture, **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1} | config)
    policy.save(model, policy.word_tokenizer(WORDS), folder)
    return folder


def rename(folder: Path, change) -> None:
    """Let `change` make other weights of the saved ones."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configure(folder: Path, name: str = "config.json", **settings) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as error:
        policy.load(str(folder))
    assert str(error.value).startswith(f"model={str(folder)!r}: ")


def without(part: str):
    return lambda weights: {key: w for key, w in weights.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            without("q_proj"),
            r"2 of the model's weights are not in the checkpoint and would be random: model.layers.0.*",
        ),
        (without("lm_head"), r"1 of the model's weights .*: lm_head.weight; save it with save_pretrained"),
        (lambda w: w | {f"head.{i}": torch.zeros(2) for i in range(5)}, r"5 weights .*: head.0, .* and 2 more; remove"),
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, r"begin with '_orig_mod.', .* strip it"),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, r"begin with 'module.', .* strip it"),
        (lambda w: w | {"lm_head.weight": torch.zeros(25, 16)}, r"lm_head.weight \[25, 16\], not \[23, 16\]; take"),
        (lambda w: w | {"model.norm.weight": torch.full((16,), torch.nan)}, r"its logits are not numbers \(NaN\)"),
    ],
)
def test_weights_that_would_not_be_used_as_they_are_are_refused(tmp_path, change, pattern):
    rename(saved(tmp_path), change)
    refused(tmp_path, pattern)


def test_buffers_of_older_versions_and_absent_tied_heads_are_nothing_to_complain_of(tmp_path):
    """What GPT-2, GPT-NeoX and Llama checkpoints of earlier years hold and lack."""
    old = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4), "transformer.h.1.attn.bias": torch.ones(1, 1, 4, 4)}
    rename(saved(tmp_path / "gpt2", "gpt2"), lambda w: w | old)
    old = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4)}
    old |= {f"gpt_neox.layers.0.attention.{name}": torch.ones(4) for name in ("masked_bias", "rotary_emb.inv_freq")}
    rename(saved(tmp_path / "gpt_neox", "gpt_neox"), lambda w: w | old)
    rename(saved(tmp_path / "llama", "llama, tied"), without("lm_head"))
    for folder in tmp_path.iterdir():
        policy.load(str(folder))
    model, _ = policy.load(str(tmp_path / "llama"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("settings", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gptq"}])
def test_quantised_weights_are_refused(tmp_path, settings):
    configure(saved(tmp_path), quantization_config=settings)
    refused(tmp_path, "its weights are quantised.*dequantise them first")


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_refused(tmp_path, alone):
    """Also where a whole model lies beside it, of which it would not be a part."""
    if not alone:
        saved(tmp_path)
    configure(tmp_path, "adapter_config.json", peft_type="LORA", base_model_name_or_path="somewhere")
    refused(tmp_path, "holds an adapter.*merge it into its base model")


def test_pickled_weights_are_refused(tmp_path):
    weights = load_file(saved(tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    refused(tmp_path, r"pickled \(.bin\).*save it again with save_pretrained")


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    saved(tmp_path)
    configure(tmp_path, model_type="own", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    refused(tmp_path, "could not be loaded")
    assert not (tmp_path / "run").exists()


def test_tokens_without_an_embedding_are_refused(tmp_path):
    """The tokenizer of another model, and a padding token that was added; other control tokens may lie beyond."""
    saved(tmp_path)
    policy.word_tokenizer([*WORDS, "more", "words"]).save_pretrained(tmp_path)
    refused(tmp_path, rf"its tokenizer has 2 tokens with ids from {VOCAB} on, and there are {VOCAB} embeddings")
    tokenizer = policy.word_tokenizer(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": [policy.REPLY, "<image>"]})
    tokenizer.save_pretrained(tmp_path)
    policy.load(str(tmp_path))
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, rf"its padding token '<added>' has the id {VOCAB + 1}, and there are {VOCAB} embeddings")


def endless(folder: Path) -> Path:
    """A checkpoint whose tokenizer knows no end of text and no padding."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("eos_token", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("ends", [5, [5, 6]])
def test_the_end_of_text_of_generation_is_taken_where_the_tokenizer_has_none(tmp_path, ends):
    configure(endless(saved(tmp_path)), "generation_config.json", eos_token_id=ends)
    _, tokenizer = policy.load(str(tmp_path))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 5


@pytest.mark.parametrize("with_generation", [True, False])
def test_without_any_end_of_text_no_reply_could_end(tmp_path, with_generation):
    endless(saved(tmp_path))
    configure(tmp_path, eos_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    if with_generation:
        configure(tmp_path, "generation_config.json", eos_token_id=None)
    refused(tmp_path, "neither its tokenizer nor its generation configuration names an end of text")


def test_a_revision_is_that_of_all_parts(tmp_path, monkeypatch):
    """Of configuration, tokenizer and weights, and never with code from outside."""
    folder, asked = saved(tmp_path), []
    for loader in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        real = loader.from_pretrained

        def noted(source, *args, real=real, name=loader.__name__, **kwargs):
            asked.append((name, kwargs["revision"], kwargs["trust_remote_code"]))
            return real(source, *args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", noted)
    policy.load(str(folder), revision="abc")
    ours = [call for call in asked if call[0] != "AutoConfig"] + [asked[0]]
    assert ours == [(name, "abc", False) for name in ("AutoTokenizer", "AutoModelForCausalLM", "AutoConfig")]


@pytest.mark.parametrize("architecture", ["llama", "llama, tied", "opt", "gemma"])
def test_training_moves_the_row_of_the_padding_token(tmp_path, architecture):
    """Where it is the end of text too, by what a change of that row does to the log-probs."""
    words = build(architecture, pad_token_id=1).get_input_embeddings()
    assert words.padding_idx == 1  # as transformers has it
    model, _ = policy.load(str(saved(tmp_path, architecture, pad_token_id=1)))
    model.double()
    row, batch = model.get_input_embeddings().weight[1], pad([[5, 1, 6], [1, 7]], [[8, 1], [9, 5, 1]], 1)
    (grad,) = torch.autograd.grad(likelihood.token_logps(model, batch).sum(), model.get_input_embeddings().weight)
    step = 1e-3 * torch.nn.functional.normalize(grad[1], dim=0)
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            row += sign * step
            values.append(likelihood.token_logps(model, batch).sum().item())
    change = (values[0] - values[1]) / 2e-3
    assert change == pytest.approx(grad[1].norm().item(), rel=1e-2) and change > 0.1


def test_dropout_and_checkpointing_of_a_configuration_have_no_effect(tmp_path):
    """Models are in evaluation mode from the start."""
    folder, batch = saved(tmp_path, "gpt_neox"), random_batch(4)
    plain = likelihood.token_logps(policy.load(str(folder))[0], batch)
    configure(folder, hidden_dropout=0.5, attention_dropout=0.5, gradient_checkpointing=True)
    model, _ = policy.load(str(folder))
    assert model.config.hidden_dropout == 0.5 and not any(module.training for module in model.modules())
    logps = likelihood.token_logps(model, batch)
    assert torch.equal(logps, plain)
    logps.sum().backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_log_probs_of_a_table_by_hand(double):
    # row 0 gives probabilities 1/4 and 3/4, row 1 gives 1/2 each; prompt 0, response 1 0: log 3/4 + log 1/2
    model = Table([[0.0, math.log(3)], [0.0, 0.0]])
    logps = likelihood.token_logps(model, pad([[0], [1, 0]], [[1, 0], [0]], 0))
    expected = [[0, math.log(3 / 4), math.log(1 / 2)], [0, 0, math.log(1 / 4)]]
    assert torch.allclose(logps, torch.tensor(expected), atol=1e-15)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_and_a_plain_loop_agrees(architecture, side):
    model = build(architecture)
    batch = random_batch(6, side=side)
    with torch.no_grad():
        logps = likelihood.token_logps(model, batch)
        for row in range(len(batch)):
            ids = batch.ids[row][batch.attention[row]]  # unpadded
            answered = int(batch.response[row].sum())
            table = F.log_softmax(model(ids[None]).logits[0], -1)
            expected = [table[t - 1, ids[t]] for t in range(len(ids) - answered, len(ids))]
            assert torch.allclose(logps[row][batch.response[row]], torch.stack(expected), atol=1e-5)
        assert (logps[~batch.response] == 0).all() and logps.shape == batch.ids.shape
        totals = likelihood.sequence_logps(model, batch, size=4)
    assert torch.allclose(totals, logps.sum(-1), atol=1e-5)


def test_log_probs_are_at_least_float32():
    model = Table([[0.0, 1.0], [0.5, 0.0]]).to(torch.bfloat16)
    assert likelihood.token_logps(model, pad([[0]], [[1]], 0)).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_log_probs_at_a_temperature_are_those_of_the_logits_over_it(double, monkeypatch, temperature):
    lift_float32(monkeypatch)
    model, batch = build("qwen3"), random_batch(6)
    logps = likelihood.token_logps(model, batch, temperature)
    logits, columns = likelihood.response_logits(model, batch, temperature)
    for row in range(len(batch)):
        ids = batch.ids[row][batch.attention[row]]
        answered = int(batch.response[row].sum())
        table = model(ids[None]).logits[0] / temperature
        own = torch.arange(len(ids) - answered, len(ids))
        expected = F.log_softmax(table, -1)[own - 1, ids[own]]
        assert (logps[row][batch.response[row]] - expected).abs().max() < 1e-12
        assert (logits[row][batch.response[row, columns]] - table[own - 1]).abs().max() < 1e-11
    assert (logps[~batch.response] == 0).all()


def greedy_without_cache(model, prompt: list[int], steps: int, eos: int) -> list[int]:
    """The most probable next token, again and again, each from a whole pass."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_decoding_with_a_cache(architecture):
    """It equals whole passes one prompt at a time, and transformers' own generation."""
    model = build(architecture, seed=3)
    prompts, limits = [[3], [5, 6, 7, 8], [9, 4]], {"max_response": 7, "ends": (1,), "pad_id": 0}
    out = policy.generate(model, prompts, **limits)
    with torch.no_grad():
        assert out == [greedy_without_cache(model, p, 7, eos=1) for p in prompts]
    assert out == [policy.generate(model, [p], **limits)[0] for p in prompts]
    assert out == policy.generate(model, prompts, size=2, **limits)
    for prompt, response in zip(prompts, out, strict=True):
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=7,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert made[0, len(prompt) :].tolist() == response


def test_a_reply_ends_with_its_end_of_text():
    """A table that counts up: 2 -> 3 -> 4 -> 1 (the end); what was answered first waits for the others."""
    successor = {0: 0, 1: 2, 2: 3, 3: 4, 4: 1}
    model = Table([[9.0 * (successor[x] == y) for y in range(5)] for x in range(5)])
    limits = {"ends": (1,), "pad_id": 0}
    assert policy.generate(model, [[2], [4], [3]], max_response=9, **limits) == [[3, 4, 1], [1], [4, 1]]
    assert policy.generate(model, [[2], [4]], max_response=2, **limits) == [[3, 4], [1]]
    # padding with the end of text, as tokenizers without a padding token do
    assert policy.generate(model, [[2], [4]], max_response=9, ends=(1,), pad_id=1) == [[3, 4, 1], [1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax_at_its_temperature(temperature):
    """4,000 draws against softmax(logits / T); a chi-square this large has a probability below 1 in 10,000."""
    logits = torch.tensor([-9.0, 0.0, 0.5, 1.0, 2.0])
    model = Table(logits.expand(5, 5).clone())
    drawn = policy.generate(
        model, [[2]] * 4_000, max_response=1, ends=(1,), pad_id=0, temperature=temperature, seed=1, size=1_000
    )
    seen = torch.bincount(torch.tensor(drawn).flatten(), minlength=5)[1:].double()
    p = (logits[1:].double() / temperature).softmax(-1)
    assert seen.sum() > 3_990  # the first token has a probability of at most a thousandth
    assert stats.chisquare(seen, p * seen.sum()).pvalue > 1e-4


def test_sampling_depends_on_the_seed_alone(policy_and_tokenizer):
    model, _ = policy_and_tokenizer
    settings = {"max_response": 6, "ends": (1,), "pad_id": 0, "temperature": 1.0}
    prompts = [[5, 6], [7]] * 5
    one = policy.generate(model, prompts, seed=0, **settings)
    torch.manual_seed(99)
    assert policy.generate(model, prompts, seed=0, **settings) == one
    assert policy.generate(model, prompts, seed=1, **settings) != one
    with pytest.raises(ValueError, match="temperature=-1"):
        policy.generate(model, prompts, **settings | {"temperature": -1})


def test_greedy_and_sampled_replies_in_one_batch_are_those_of_two(policy_and_tokenizer):
    model, _ = policy_and_tokenizer
    settings = {"max_response": 6, "ends": (1,), "pad_id": 0, "seed": 3}
    prompts = [[5, 6], [7], [4, 8]] * 4
    greedy = policy.generate(model, prompts, **settings)
    sampled = policy.generate(model, prompts, temperature=1.0, **settings)
    both = policy.generate(model, prompts + prompts, temperature=[0.0] * 12 + [1.0] * 12, **settings)
    assert both == greedy + sampled and greedy != sampled


def test_entropy_and_kl_by_hand(double):
    """p = (1/4, 3/4), q = (1/2, 1/2): H = log 4 - 3/4 log 3 and KL = log 2 - H, at each of two tokens."""
    model, reference = Table([[0.0, math.log(3)]] * 2), Table([[0.0, 0.0]] * 2)
    entropy, kl = likelihood.entropy_and_kl(model, reference, pad([[0]], [[1, 0]], 0))
    by_hand = math.log(4) - 0.75 * math.log(3)
    assert entropy.item() == pytest.approx(2 * by_hand, abs=1e-6)
    assert kl.item() == pytest.approx(2 * (math.log(2) - by_hand), abs=1e-6)


def test_entropy_and_kl_of_tokens_that_are_never_drawn(double):
    """The same by hand with a third token of probability 0 in p, and in q too; only in q, KL is infinite."""
    batch = pad([[0], [0]], [[1, 0], [0]], 0)
    model = Table([[0.0, math.log(3), -math.inf]] * 3)
    entropy, kl = likelihood.entropy_and_kl(model, Table([[0.0, 0.0, -math.inf]] * 3), batch)
    by_hand = math.log(4) - 0.75 * math.log(3)
    assert entropy.tolist() == pytest.approx([2 * by_hand, by_hand], abs=1e-6)
    assert kl.tolist() == pytest.approx([2 * (math.log(2) - by_hand), math.log(2) - by_hand], abs=1e-6)
    _, kl = likelihood.entropy_and_kl(model, Table([[0.0, 0.0, 0.0]] * 3), batch)
    assert kl.tolist() == pytest.approx([2 * (math.log(3) - by_hand), math.log(3) - by_hand], abs=1e-6)
    _, kl = likelihood.entropy_and_kl(model, Table([[0.0, -math.inf, 0.0], *[[0.0] * 3] * 2]), batch)
    assert kl.isposinf().all()


def test_positions_without_a_token_of_the_response_count_for_nothing(double):
    """Whatever a model says there: an infinite KL, or no number at all."""
    prompts, replies = [[0], [2]], [[1], [1, 1]]
    model, reference = Table([[0.0, 0.0, 0.0]] * 3), Table([[0.0] * 3, [-math.inf, 0.0, 0.0], [0.0] * 3])
    entropy, kl = likelihood.entropy_and_kl(model, reference, pad(prompts, replies, 0))
    assert kl[0] == 0 and kl[1].isposinf() and entropy.isfinite().all()


def test_entropy_and_kl_against_brute_force():
    model, reference = build("llama", seed=0), build("llama", seed=1)
    batch = random_batch(7)
    entropy, kl = likelihood.entropy_and_kl(model, reference, batch, size=3)
    with torch.no_grad():
        for row in range(len(batch)):
            ids = batch.ids[row][batch.attention[row]]
            first = (
                len(ids) - int(batch.response[row].sum()) - 1
            )  # the position that predicts the response's first token
            p, q = (F.log_softmax(m(ids[None]).logits[0, first:-1].double(), -1) for m in (model, reference))
            assert entropy[row].item() == pytest.approx(-(p.exp() * p).sum().item(), abs=1e-4)
            assert kl[row].item() == pytest.approx(F.kl_div(q, p, log_target=True, reduction="sum").item(), abs=1e-4)
    assert (kl > 0).all()
    assert (likelihood.entropy_and_kl(model, model, batch)[1] == 0).all()


def test_a_template_whose_tokens_have_no_embedding_is_refused(tmp_path):
    """Control tokens that were added, and a model that was not resized: training would end with an IndexError."""
    model, tokenizer = tiny_policy()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<stop>"]})
    policy.save(model, tokenizer, tmp_path / "unused")
    policy.load(str(tmp_path / "unused"))  # which nothing is encoded as
    messages = "{% for m in messages %}<start>{{ m['content'] }}<stop>{% endfor %}"
    tokenizer.chat_template = messages + "{% if add_generation_prompt %}<start>{% endif %}"
    policy.save(model, tokenizer, tmp_path / "used")
    with pytest.raises(ValueError, match="its chat template uses '<start>', '<stop>', and there are"):
        policy.load(str(tmp_path / "used"))
