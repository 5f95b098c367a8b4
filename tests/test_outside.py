"""For and from outside: replies for a judge, annotations counted by hand, a reward model by its path."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
import typer
from prefdyn.book import outside_cli
from prefdyn.lab import chat, outside, policy
from prefdyn.lab.layouts import DataError
from prefdyn.lens.batch import pad
from safetensors.torch import load_file, save_file
from scipy import stats
from toys.models import build
from transformers import AutoConfig, AutoModelForSequenceClassification
from typer.testing import CliRunner

ALPACA = Path(__file__).resolve().parents[2] / "shared/data/alpaca-eval-prefs/test.jsonl.gz"
WORDS = [f"w{i}" for i in range(36)]  # and four special tokens
app = typer.Typer()
app.command()(outside_cli.replies)
app.command()(outside_cli.judged)


def call(*arguments: str) -> list[str]:
    """The lines that a command prints; its error is raised."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tuned"
    tokenizer = policy.word_tokenizer(WORDS)
    policy.save(policy.scratch_model(tokenizer, layers=1, width=16, heads=2, context=24, seed=1), tokenizer, folder)
    return folder


def user(text: str) -> dict:
    return {"role": "user", "content": text}


PROMPTS = [
    {"instruction": "w1 w2 w3", "dataset": "helpful_base", "output": "an old one", "generator": "someone"},
    {"prompt": "w4 w5"},
    {"prompt": [user("w6")]},
    {"instruction": "w1 w2 w3"},
    {"prompt": [user("w1"), {"role": "assistant", "content": "w2"}, user("w3")]},
    {"prompt": [{"role": "system", "content": "w9"}, user("w3")]},
    {"prompt": "w1", "system_prompt": "w2"},
    {"instruction": "w1", "input": "w2", "output": "w3"},
    {"question": "w1"},
    {"prompt": "  "},
    {"prompt": 7},
    {"prompt": [{"from": "human", "value": "w1"}]},
    {"prompt": " ".join(WORDS[:20])},
]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "eval_set.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    return path


def test_instructions_are_used_once_and_what_cannot_be_one_is_left_out_by_name(prompts):
    asked = outside.prompts_of(str(prompts))
    texts = ("w1 w2 w3", "helpful_base"), ("w4 w5", "eval_set"), ("w6", "eval_set"), (PROMPTS[-1]["prompt"], "eval_set")
    assert asked.instructions == texts and (asked.records, asked.repeated) == (13, 1)
    assert [left.where for left in asked.left_out] == [f"line {n}" for n in range(5, 13)]
    assert [left.reason for left in asked.left_out] == [
        "a conversation of several turns",
        "a system message",
        "a system message",
        "an 'input' beside the instruction",
        "neither an 'instruction' nor a 'prompt'",
        "the prompt is empty",
        "the prompt is neither a text nor a conversation",
        "a message without a role and a text",
    ]


def test_prompts_of_pairs(tmp_path):
    path, pair = tmp_path / "prefs.jsonl", {"chosen": "w1", "rejected": "w2"}
    several = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    rows = [{"prompt": "w1"} | pair, {"prompt": "w1", "chosen": "w3", "rejected": "w4"}, {"prompt": several} | pair]
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "w2", "chosen": "w5", "rejected": "w5"}])))
    asked = outside.prompts_of_pairs(str(path))
    assert asked.instructions == (("w1", "prefs"),) and (asked.records, asked.repeated) == (4, 1)
    assert sorted(left.reason for left in asked.left_out) == [
        "'chosen' and 'rejected' are the same text",
        "a conversation of several turns",
    ]


def test_sources_without_an_instruction_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.json', no such file"):
        outside.prompts_of(str(tmp_path / "nowhere.json"))
    path = tmp_path / "p.json"
    path.write_text('[{"question": "w1"}]')
    with pytest.raises(DataError, match=r"of whose 1 records none is an instruction; first, record 1: neither"):
        outside.prompts_of(str(path))


def test_replies_are_those_of_the_policy_one_by_one(checkpoint, prompts):
    """Greedy, as if each prompt were alone; of the long prompt the last 16 tokens; what was cut is counted."""
    model, tokenizer = policy.load(str(checkpoint))
    asked = outside.prompts_of(str(prompts))
    made = outside.replies(model, tokenizer, asked, name="tuned", max_response=8)
    assert [list(row) for row in made.rows] == [["instruction", "output", "generator", "dataset"]] * 4
    unended = 0
    for row, (text, dataset) in zip(made.rows, asked.instructions, strict=True):
        (ids,) = chat.prompt_ids(tokenizer, [text])
        limits = {"max_response": 8, "ends": (1,), "pad_id": 0}
        (told,) = policy.generate(model, [ids[-16:]], **limits)
        unended += told[-1] != 1
        expected = {"instruction": text, "output": policy.decode(tokenizer, [told])[0], "generator": "tuned"}
        assert row == expected | {"dataset": dataset}
    assert (made.max_prompt, made.cut, made.unended, made.unasked) == (16, 1, unended, 0)
    again = outside.replies(model, tokenizer, asked, name="tuned", max_response=8, rows=1)
    assert again == made
    few = outside.replies(model, tokenizer, asked, name="tuned", max_response=8, count=2)
    assert few.rows == made.rows[:2] and (few.unasked, few.cut) == (2, 0)


def test_sampled_replies_depend_on_the_seed_alone(checkpoint, prompts):
    model, tokenizer = policy.load(str(checkpoint))
    asked = outside.prompts_of(str(prompts))
    one, same, other = (
        outside.replies(model, tokenizer, asked, name="t", max_response=8, temperature=1.0, seed=seed).rows
        for seed in (0, 0, 1)
    )
    assert one == same != other


def test_limits_that_do_not_fit_the_model_are_refused(checkpoint, prompts):
    model, tokenizer = policy.load(str(checkpoint))
    asked = outside.prompts_of(str(prompts))
    for limits in ({"max_response": 24}, {"max_prompt": 20, "max_response": 5}):
        with pytest.raises(ValueError, match=r"max_prompt=.*, max_response=.*: the model has 24 positions for both"):
            outside.replies(model, tokenizer, asked, name="t", **limits)
    with pytest.raises(ValueError, match="max_response=0: must be at least 1"):
        outside.replies(model, tokenizer, asked, name="t", max_response=0)
    odd = outside.Asked((("\U000f0000", "d"),), 1, 0, ())
    with pytest.raises(DataError, match="none of 1 can be encoded; first, instruction 1: the text holds private-use"):
        outside.replies(model, tokenizer, odd, name="t", max_response=4)


def test_running_out_of_memory_takes_fewer_prompts_at_once(checkpoint, prompts, monkeypatch):
    model, tokenizer = policy.load(str(checkpoint))
    asked = outside.prompts_of(str(prompts))
    plain, sizes, generate = outside.replies(model, tokenizer, asked, name="t", max_response=8), [], policy.generate

    def short_of_memory(model, prompts, **settings):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise MemoryError
        return generate(model, prompts, **settings)

    monkeypatch.setattr(policy, "generate", short_of_memory)
    assert outside.replies(model, tokenizer, asked, name="t", max_response=8, rows=4) == plain
    assert sizes == [4, 2, 1, 1, 1, 1]


def test_the_command_writes_the_file_and_accounts_for_every_record(checkpoint, prompts, tmp_path):
    out = tmp_path / "new" / "outputs.json"
    lines = call("replies", str(checkpoint), "--prompts", str(prompts), "--out", str(out), "--max-response", "8")
    rows = json.loads(out.read_text())
    assert [row["generator"] for row in rows] == ["tuned"] * 4 and rows[0]["dataset"] == "helpful_base"
    assert lines[0] == f"4 replies of tuned written to {out}"
    assert lines[1] == "  prompts: 4 different ones in 13 records, 1 repeated"
    assert "  left out: 2 x a system message" in lines
    assert sum(int(line.split()[2]) for line in lines if line.startswith("  left out")) == 8
    assert "  prompts cut to their last 16 tokens: 1" in lines
    assert list(out.parent.iterdir()) == [out]
    more = call(
        *("replies", str(checkpoint), "--prompts", str(prompts), "--out", str(out)),
        *("--max-response", "4", "--count", "1", "--name", "mine", "--max-prompt", "3"),
    )
    assert json.loads(out.read_text())[0]["generator"] == "mine" and "  not asked for: 3" in more


def test_what_the_command_refuses(checkpoint, prompts, tmp_path):
    for sources in ((), ("--prompts", str(prompts), "--pairs", str(prompts))):
        with pytest.raises(ValueError, match="--pairs, --prompts: exactly one"):
            call("replies", str(checkpoint), "--out", str(tmp_path / "o.json"), *sources)
    with pytest.raises(ValueError, match="is a folder; name the file to write"):
        call("replies", str(checkpoint), "--prompts", str(prompts), "--out", str(tmp_path))
    with pytest.raises(ValueError, match="cannot be written"):
        call("replies", str(checkpoint), "--prompts", str(prompts), "--out", str(prompts / "o.json"))


def annotation(preference, instruction="a", ours="xxxx", theirs="xx", **more) -> dict:
    """Of "tuned" as output_2 against "sft"."""
    return {
        "instruction": instruction,
        "output_1": theirs,
        "generator_1": "sft",
        "output_2": ours,
        "generator_2": "tuned",
        "preference": preference,
        "annotator": "judge",
    } | more


def swapped(record: dict) -> dict:
    """The same said of the two in the other order."""
    turned = {f"{name}_{i}": record[f"{name}_{3 - i}"] for name in ("output", "generator") for i in (1, 2)}
    value = record["preference"]
    return record | turned | {"preference": 3 - value if value else value}


def written(path: Path, records: list) -> str:
    path.write_text(json.dumps(records))
    return str(path)


# Won 3, tied 2, lost 1, no answer 2: (3 + 1) / 6 of six instructions.
SIX = [
    annotation(2, "a", "xxxx", "xx"),
    annotation(2, "b", "xxxx", "xx"),
    annotation(2, "c", "x", "xx"),
    annotation(1, "d", "xxx", "xx"),
    annotation(0, "e", "xxxxx", "xx"),
    annotation(1.5, "f", "xx", "xx"),
    annotation(None, "g"),
    annotation(math.nan, "h"),
]


def test_annotations_by_hand(tmp_path):
    """Wilson's interval of 4 of 6: (p + z^2 / 12 +- z sqrt(p (1 - p) / 6 + z^2 / 144)) / (1 + z^2 / 6), z = 1.96.

    p = 2/3, z^2 = 3.8415: middle 0.98679, half 1.96 sqrt(0.037037 + 0.026677) = 0.49472, over 1.64024: 0.300 to 0.903.
    Mean lengths of what has an answer: (4 + 4 + 1 + 3 + 5 + 2) / 6 = 19 / 6 and 2. Longer in a, b, d, e: scores
    1, 1, 0, 0.5; shorter in c: 1. Decided between unequal lengths: a, b, c, d; the longer one won a and b.
    """
    found = outside.annotations(written(tmp_path / "annotations.json", SIX))
    assert (found.generator, found.baseline, found.records) == ("tuned", "sft", 8)
    assert list(found.scores().values()) == [1, 1, 1, 0, 0.5, 0.5]
    lines = call("judged", str(tmp_path / "annotations.json"))
    assert lines == [
        "tuned against sft: 8 annotations",
        "  win rate of tuned: 0.667 [0.300, 0.903] (95%, 6 instructions)",
        "  3 won, 2 tied, 1 lost; 2 without an answer",
        "  order: tuned is output_2 in all 6; whether the judge saw them shuffled is not in the file, nor whether it "
        "prefers a place",
        "  length: 3 characters (mean), the other's 2",
        "  where tuned's reply is longer, its win rate is 0.625 of 4; where shorter, 1.000 of 1",
        "  of 4 decisions between unequal lengths the longer reply won 0.500 [0.150, 0.850]; a judge that likes length "
        "gives such a share too: this is no length-controlled win rate",
    ]


def test_either_order_is_read_and_shown(tmp_path):
    """A judge that takes output_2 whatever it is: each place alone says something else, together they say nothing."""
    records = [annotation(2, "a"), annotation(2, "b"), *(swapped(annotation(1, name)) for name in "cd")]
    assert all(record["preference"] == 2 for record in records)
    lines = call("judged", written(tmp_path / "a.json", records))
    assert "  win rate of tuned: 0.500 [0.150, 0.850] (95%, 4 instructions)" in lines
    assert "  order: tuned is output_2 in 2 of 4; win rate there 1.000 of 2, as output_1 0.000 of 2" in lines
    turned = [swapped(record) for record in SIX]
    one, other = (outside.annotations(written(tmp_path / "b.json", [SIX[0], *rest])) for rest in (SIX[1:], turned[1:]))
    assert one.scores() == other.scores()


def test_finer_preferences_and_repeated_instructions(tmp_path):
    """1.2 and 1.6 say 0.2 and 0.6 of one instruction: its score is 0.4; of two others 0.9 and 0.8: mean 0.7.

    Student's interval of 0.4, 0.9, 0.8: standard error sqrt(0.14 / 2 / 3) = 0.152753, t = 4.302653: +- 0.657, cut at 1.
    """
    records = [annotation(1.2, "a"), annotation(1.6, "a"), annotation(1.9, "b"), annotation(1.8, "c")]
    found = outside.annotations(written(tmp_path / "a.json", records))
    assert list(found.scores().values()) == pytest.approx([0.4, 0.9, 0.8])
    estimate = outside_cli.share_interval(list(found.scores().values()))
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.7, 0.042749, 1.0), abs=1e-5)
    assert "  3 won, 0 tied, 1 lost; 0 without an answer" in call("judged", str(tmp_path / "a.json"))


@pytest.mark.parametrize(("won", "n"), [(0, 1), (8, 10), (20, 20), (1, 805)])
def test_the_interval_of_shares_is_wilsons(won, n):
    expected = stats.binomtest(won, n).proportion_ci(method="wilson")
    found = outside_cli.share_interval([1.0] * won + [0.0] * (n - won))
    assert (found.mean, found.n) == (won / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_records_that_are_no_annotation_are_left_out_by_name(tmp_path):
    bad = [
        annotation(3),
        annotation(0.5),
        annotation("2"),
        annotation(True),
        annotation(2, output_1=None),
        annotation(2, generator_1="tuned"),
        {name: value for name, value in annotation(2).items() if name != "preference"},
        "text",
    ]
    found = outside.annotations(written(tmp_path / "a.json", [*SIX, *bad]))
    assert found.records == 16 and len(found.rows) == 8
    assert [left.reason for left in found.left_out] == [
        *["the preference is neither 0 nor between 1 and 2"] * 2,
        *["the preference is not a number"] * 2,
        "no text in 'output_1'",
        "both replies are of one generator",
        "no 'preference'",
        "not an object",
    ]
    lines = call("judged", str(tmp_path / "a.json"))
    assert sum(int(line.split()[2]) for line in lines if line.startswith("  left out")) == 8


def test_files_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such file"):
        outside.annotations(str(tmp_path / "org"))
    with pytest.raises(DataError, match=r"of whose 1 records none is an annotation; first, record 1: the preference"):
        outside.annotations(written(tmp_path / "a.json", [annotation(9)]))
    with pytest.raises(DataError, match=r"about the generators 'other', 'sft', 'tuned'; allowed: two"):
        outside.annotations(written(tmp_path / "a.json", [annotation(1), annotation(2, generator_2="other")]))
    with pytest.raises(ValueError, match="none of 1 has an answer"):
        call("judged", written(tmp_path / "a.json", [annotation(None)]))


def test_two_models_against_one_baseline_by_hand(tmp_path):
    """On a, b, c: 1, 1, 1 against 0, 1, 0.5; differences 1, 0, 0.5: mean 0.5, standard error 0.5 / sqrt 3 = 0.288675,
    t = 4.302653: +- 1.242, cut at 1. d has another reply of the baseline; e and f, z are answered in one file alone."""
    other = [
        annotation(1, "a", generator_2="old"),
        annotation(2, "b", generator_2="old"),
        annotation(0, "c", generator_2="old"),
        annotation(1, "d", generator_2="old", theirs="xxx"),
        annotation(1, "z", generator_2="old"),
        annotation(None, "e", generator_2="old"),
    ]
    first, second = written(tmp_path / "a.json", SIX), written(tmp_path / "b.json", other)
    assert outside.shared(outside.annotations(first), outside.annotations(second)) == outside.Shared(
        ((1, 0), (1, 1), (1, 0.5)), other_baseline=1, alone=3
    )
    lines = call("judged", first, "--against", second)
    assert lines[-2:] == [
        "tuned minus old: +0.500 [-0.742, +1.000] in win rate (95%, paired over 3 instructions)",
        "  left out: 3 answered in one file alone, 1 with another reply of the baseline",
    ]
    # Wilson's of 1.5 of 5: middle 0.68415, half 1.96 sqrt(0.042 + 0.038415) = 0.55580, over 1.76829
    assert "  win rate of old: 0.300 [0.073, 0.701] (95%, 5 instructions)" in lines
    third = written(tmp_path / "c.json", [annotation(2, "a", generator_1="base")])
    with pytest.raises(ValueError, match=r"'tuned' was judged against 'base', and 'tuned' against 'sft'"):
        call("judged", first, "--against", third)
    fourth = written(tmp_path / "d.json", [annotation(2, "y")])
    with pytest.raises(ValueError, match="no instruction in common"):
        call("judged", first, "--against", fourth)


@pytest.mark.skipif(
    not ALPACA.is_file(), reason="needs shared/data/alpaca-eval-prefs, which is not part of the project"
)
def test_real_pairs_as_prompts_and_as_annotations(tmp_path):
    """97 prompts. Annotations made of the real scores, with the chosen reply second: it wins all, mostly longer."""
    asked = outside.prompts_of_pairs(str(ALPACA))
    assert (len(asked.instructions), asked.records, asked.repeated, asked.left_out) == (97, 388, 291, ())
    with gzip.open(ALPACA, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    records = [annotation(2, row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    said = call("judged", written(tmp_path / "a.json", records))
    assert said[1].startswith("  win rate of tuned: 1.000 [0.962, 1.000] (95%, 97 instructions)")
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows if len(row["chosen"]) != len(row["rejected"])]
    assert f"of {len(longer)} decisions" in said[-1] and f"won {sum(longer) / len(longer):.3f}" in said[-1]


def classifier(folder: Path, architecture: str = "llama", labels: int = 1, template: str | None = "", **config) -> Path:
    """A tiny reward model, saved; its chat template puts a line of its own after a reply unless another is given."""
    tokenizer = policy.word_tokenizer([*WORDS, "after"])
    tokenizer.chat_template = policy.CHAT_TEMPLATE.replace("<eos>", "<eos> after") if template == "" else template
    settings = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "num_labels": labels} | config
    body = build(architecture, vocab_size=len(tokenizer), **settings)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(body.config).float().eval()
    model.base_model.load_state_dict(body.base_model.state_dict())
    torch.nn.init.normal_(model.score.weight)
    policy.save(model, tokenizer, folder)
    return folder


ASKED, TOLD = ["w1 w2", "w3", "w4 w5 w6 w7"], ["w8", "w9 w10 w11", "w12"]
FEW = list(zip(ASKED[:2], TOLD[:2], strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_a_reward_model_by_its_path_says_what_transformers_says_of_each_text_alone(tmp_path, architecture):
    """Of the whole conversation as its template renders it, what stands after the end of the reply included."""
    folder = str(classifier(tmp_path, architecture))
    reward = outside.reward_model(folder)
    found = reward(ASKED, TOLD)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for prompt, reply, score in zip(ASKED[:2], TOLD[:2], found, strict=False):
            text = reward.tokenizer.apply_chat_template(
                [user(prompt), {"role": "assistant", "content": reply}], tokenize=False
            )
            assert text == f"{prompt}<reply>{reply}<eos> after"
            ids = reward.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            assert score.item() == pytest.approx(plain(input_ids=ids).logits.item(), abs=1e-5)
    assert found.dtype == torch.float32 and found.std() > 0.01
    assert (reward(ASKED, TOLD, size=1) - found).abs().max() < 1e-5


@pytest.mark.parametrize("padding", [1, None])
def test_a_score_is_that_of_the_text_alone_whatever_pads(tmp_path, padding):
    """Where the end of text is the padding, transformers reads the score before it; without padding, at the end."""
    folder = str(classifier(tmp_path, template=policy.CHAT_TEMPLATE, pad_token_id=padding))
    reward = outside.reward_model(folder)
    found = reward(ASKED, TOLD)
    for row, (prompt, reply) in enumerate(FEW):
        ids = [*reward.tokenizer(prompt)["input_ids"], 3, *reward.tokenizer(reply)["input_ids"], 1]
        with torch.no_grad():
            out = reward.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            expected = reward.model.score(out[-1 if padding is None else -2])
        assert found[row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_it_scores_rollouts_of_a_policy_with_another_tokenizer(tmp_path):
    """As `ppo.scorer` does: ids of the policy in, their text scored."""
    reward = outside.reward_model(str(classifier(tmp_path)))
    other = policy.word_tokenizer(reversed(WORDS))
    batch = pad(chat.prompt_ids(other, ASKED[:2]), chat.response_ids(other, TOLD[:2]), 0)
    assert torch.equal(reward.score(other)(ASKED[:2], batch), reward(ASKED[:2], TOLD[:2]))


def rename(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configure(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as error:
        outside.reward_model(str(folder))
    assert str(error.value).startswith(f"reward model={str(folder)!r}: ")


def only(folder: Path, name: str) -> None:
    (folder / name).unlink()


def test_a_reward_model_that_would_not_be_used_as_it_is_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no such folder; allowed: a folder with config.json")
    refused(classifier(tmp_path / "two", labels=2), "has 2 labels; allowed: one, the reward")
    cases = {
        "missing": (lambda w: {k: v for k, v in w.items() if "score" not in k}, "would be random: score.weight"),
        "extra": (lambda w: w | {"lm_head.weight": torch.zeros(2, 2)}, "1 weights of the checkpoint have no place"),
        "shape": (lambda w: w | {"score.weight": torch.zeros(1, 8)}, "have another shape .*: score.weight"),
    }
    for name, (change, pattern) in cases.items():
        rename(classifier(tmp_path / name), change)
        refused(tmp_path / name, pattern)
    tokenizer = policy.word_tokenizer(WORDS)
    policy.save(build("llama", vocab_size=40), tokenizer, tmp_path / "causal")
    configure(tmp_path / "causal", num_labels=1)
    refused(tmp_path / "causal", r"would be random: score.weight; 1 weights .* no place in the model: lm_head.weight")
    refused(classifier(tmp_path / "template", template=None), "no chat template")
    policy.word_tokenizer([*WORDS, *"abcdefgh"]).save_pretrained(classifier(tmp_path / "words"))
    refused(tmp_path / "words", "its tokenizer has 48 tokens, and there are 41 embeddings")
    configure(classifier(tmp_path / "quantised"), quantization_config={"quant_method": "gptq"})
    refused(tmp_path / "quantised", "its weights are quantised")
    (classifier(tmp_path / "adapter") / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(tmp_path / "adapter", "holds an adapter")
    torch.save({}, classifier(tmp_path / "pickled") / "pytorch_model.bin")
    only(tmp_path / "pickled", "model.safetensors")
    refused(tmp_path / "pickled", "its weights are pickled")
    only(classifier(tmp_path / "empty"), "model.safetensors")
    refused(tmp_path / "empty", "could not be loaded. The loader said")
    (tmp_path / "no config").mkdir()
    refused(tmp_path / "no config", "its config.json could not be read")


def test_code_beside_a_reward_model_is_not_run(tmp_path):
    (classifier(tmp_path) / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    configure(tmp_path, model_type="own", auto_map={"AutoConfig": "code.C"})
    refused(tmp_path, "its config.json could not be read")
    assert not (tmp_path / "run").exists()
    assert AutoConfig.for_model("llama").model_type == "llama"


def test_texts_that_a_reward_model_cannot_read_are_refused(tmp_path):
    reward = outside.reward_model(str(classifier(tmp_path)))
    with pytest.raises(ValueError, match=r"prompt and reply 1 have \d+ tokens, and the model has 64 positions"):
        reward(["w1", "w2"], ["w1", "w3 " * 70])
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        reward(["w1", "w2"], ["w1"])
    with pytest.raises(chat.ChatError, match="spells out a control token"):  # and this tokenizer has no other word
        reward(["w1"], ["w2 <eos>"])
