"""A policy: a causal language model and its tokenizer; per-token log-probs, entropy, KL, and decoding."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar
from transformers.utils.peft_utils import find_adapter_config_file

from ..lens.batch import Batch
from ..lens.faithful import plain_embeddings
from ..lens.likelihood import inputs
from . import chat

if not sys.stderr.isatty():
    disable_progress_bar()  # of loading and saving, which fill logs and pages

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
REPLY = "<reply>"  # stands between a prompt and its reply
# One turn: the prompt, the marker, the reply, its end.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '" + REPLY + "' if message['role'] == 'user' else '" + SPECIAL["eos_token"] + "' }}{% endfor %}"
)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        additional_special_tokens=[REPLY],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words separated by spaces, as a normal Hugging Face tokenizer."""
    vocab = {token: i for i, token in enumerate([*SPECIAL.values(), REPLY, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer trained on `texts`: any text goes in, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL.values(), REPLY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


# What can be made from scratch: its configuration and its model.
ARCHITECTURES = {
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM),  # that of Pythia
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}


def _sizes(architecture: str, layers: int, width: int, heads: int, context: int) -> dict[str, Any]:
    """Sizes as the configuration of an architecture calls them; hidden layers are 4 * `width` wide, heads all alike."""
    if architecture == "gpt2":  # which alone has learned positions, and drops units out unless it is told not to
        named = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": context, "n_inner": 4 * width}
        return named | dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    named = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": context,
        "rope_parameters": rope,
    }
    if architecture == "gpt-neox":
        return named
    return named | {"num_key_value_heads": heads, "head_dim": width // heads}


def scratch_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    layers: int,
    width: int,
    heads: int,
    context: int,
    seed: int,
    architecture: str = "gpt-neox",
) -> PreTrainedModel:
    """A small model of one of ARCHITECTURES, with random weights from `seed` and embeddings of its own at either end.

    Raises ValueError for another architecture, or if `width` is not a multiple of 2 * `heads` (rotary embeddings turn
    pairs of coordinates) or, for "gpt2", of `heads`.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r}: must be one of {', '.join(ARCHITECTURES)}")
    pairs = 1 if architecture == "gpt2" else 2
    if width % (pairs * heads):
        multiple = "heads" if pairs == 1 else "2 * heads"
        raise ValueError(f"width={width}, heads={heads}: width must be a multiple of {multiple}")
    config_class, model_class = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=len(tokenizer),
        **_sizes(architecture, layers, width, heads, context),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return plain_embeddings(model_class(config).eval())


def _source(name_or_path: str) -> str:
    """What the loaders are to be given. Raises ValueError for a folder that is not there."""
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    folder = Path(name_or_path).expanduser()
    if looks_local and not folder.is_dir():
        raise ValueError(
            f"model={name_or_path!r}: no such folder; allowed: 'scratch', a folder with a saved checkpoint "
            "(config.json, model.safetensors, tokenizer.json) or the name of a model on the hub"
        )
    return str(folder) if folder.is_dir() else name_or_path


def _read(name_or_path: str, loader: Callable[..., Any], revision: str | None, **settings: Any) -> Any:
    """What `loader` makes of a checkpoint. Raises ValueError with what was given and what is allowed if it fails."""
    source = _source(name_or_path)
    try:
        return loader(source, revision=revision, trust_remote_code=False, **settings)
    except (OSError, RuntimeError, KeyError, ImportError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"model={name_or_path!r}: could not be loaded; allowed: 'scratch', a folder with a saved checkpoint "
            f"or the name of a model on the hub. The loader said: {error}"
        ) from error


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; `revision`, a commit, branch or tag on the hub.

    Where it names no end of text, that of the generation configuration is taken; where it has no padding, the end of
    text. Raises ValueError with what was given and what is allowed, also if no end of text is named anywhere.
    """
    tokenizer = _read(name_or_path, AutoTokenizer.from_pretrained, revision)
    if tokenizer.eos_token_id is None:
        named = _generation_ends(name_or_path, revision)
        if not named:
            raise ValueError(
                f"model={name_or_path!r}: neither its tokenizer nor its generation configuration names an end of text, "
                "so no reply could end; set eos_token in tokenizer_config.json"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(named[0])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _generation_ends(name_or_path: str, revision: str | None) -> list[int]:
    """Ids at which the checkpoint's generation ends, by its generation_config.json or else its config.json."""
    try:
        config = GenerationConfig.from_pretrained(_source(name_or_path), revision=revision)
    except OSError:  # it has no generation_config.json
        config = _read(name_or_path, AutoConfig.from_pretrained, revision)
    named = getattr(config, "eos_token_id", None)
    return [] if named is None else named if isinstance(named, list) else [named]


def load(name_or_path: str, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer from a local folder or, by name, from the Hugging Face hub.

    In float32. Only safetensors weights are read and no code from the checkpoint is run. revision: a commit, branch or
    tag on the hub.
    Raises ValueError with what was given and what to do, also for whatever would not be used as it is meant: an
    adapter, quantised weights, weights that the model has no place for or lacks, tokens without an embedding, and
    models that are not causal or read padding.
    """
    source = _source(name_or_path)
    if find_adapter_config_file(source, revision=revision):
        raise ValueError(
            f"model={name_or_path!r}: holds an adapter (adapter_config.json), which would be left out; merge it into "
            "its base model first (merge_and_unload) and save the whole"
        )
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise ValueError(
            f"model={name_or_path!r}: its weights are pickled (.bin), which could run code when they are read; load it "
            "where it is trusted and save it again with save_pretrained, which writes model.safetensors"
        )
    config = _read(name_or_path, AutoConfig.from_pretrained, revision)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model={name_or_path!r}: its weights are quantised, and those cannot be trained or moved along a "
            "gradient; dequantise them first (model.dequantize()) and save the whole"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model={name_or_path!r}: a {config.model_type} reads a prompt by an encoder of its own; allowed: a causal "
            "language model, which reads prompt and reply as one text"
        )
    tokenizer = load_tokenizer(name_or_path, revision)
    settings = {"use_safetensors": True, "dtype": torch.float32}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that `_key_problems` can name them
    model, report = _read(name_or_path, AutoModelForCausalLM.from_pretrained, revision, **settings)
    plain_embeddings(model.eval())
    for problem in (*_key_problems(report), *_vocabulary_problems(model, tokenizer), *_reading_problems(model)):
        raise ValueError(f"model={name_or_path!r}: {problem}")
    return model, tokenizer


# Buffers that older versions of transformers saved and this one computes.
_COMPUTED = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias|causal_mask)$")


def _key_problems(report: dict[str, Any]) -> list[str]:
    """What is wrong with a loading report: weights that are not in both checkpoint and model, or of another shape."""

    def few(keys: list[str]) -> str:
        return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not _COMPUTED.search(key))
    problems = [
        f"the names of its weights begin with {prefix!r}, which a wrapper put before them; strip it from the names in "
        f"model.safetensors ({few(unexpected)})"
        for prefix in ("_orig_mod.", "module.")
        if unexpected and all(key.startswith(prefix) for key in unexpected)
    ]
    shapes = [f"{key} {list(one)}, not {list(other)}" for key, one, other in sorted(report["mismatched_keys"])]
    if shapes:
        problems.append(
            f"{len(shapes)} weights of the checkpoint have another shape than config.json says: {few(shapes)}; take "
            "the config.json that belongs to them"
        )
    if missing:
        problems.append(
            f"{len(missing)} of the model's weights are not in the checkpoint and would be random: {few(missing)}; "
            "save it with save_pretrained of the causal language model"
        )
    if unexpected:
        problems.append(
            f"{len(unexpected)} weights of the checkpoint have no place in the model: {few(unexpected)}; remove them, "
            "or name in config.json the architecture that they belong to"
        )
    return problems


def _vocabulary_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that the model has no embedding for. Added control tokens may be such: no text is encoded as these."""
    rows = model.get_input_embeddings().num_embeddings
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = sorted(i for i in tokenizer.get_vocab().values() if i >= rows and i not in control)
    problems = [
        f"its {name} token {tokenizer.convert_ids_to_tokens(i)!r} has the id {i}, and there are {rows} embeddings; "
        "use a token that has one, or resize_token_embeddings"
        for name, i in (("padding", tokenizer.pad_token_id), ("end of text", tokenizer.eos_token_id))
        if i >= rows
    ]
    rendered = {*chat.prompt_ids(tokenizer, ["a"])[0], *chat.response_ids(tokenizer, ["a"])[0]}
    if lacking := sorted(i for i in rendered if i >= rows):
        named = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(lacking)))
        problems.append(
            f"its chat template uses {named}, and there are {rows} embeddings and none for that; "
            "resize_token_embeddings, and train them"
        )
    if beyond:
        problems.append(
            f"its tokenizer has {len(beyond)} tokens with ids from {beyond[0]} on, and there are {rows} embeddings; "
            "use the tokenizer that belongs to the model, or resize_token_embeddings"
        )
    return problems


@torch.no_grad()
def _reading_problems(model: PreTrainedModel) -> list[str]:
    """What a pass over four tokens shows, over four of which the last is another, and over two after padding."""
    a, b, c, d = (torch.arange(4) % model.get_input_embeddings().num_embeddings).tolist()
    ids = torch.tensor([[a, b, c, d], [a, b, c, a], [d, d, a, b]], device=model.device)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[2, :2] = False
    batch = Batch(ids, real, torch.zeros_like(real))
    out = model(**inputs(model, batch, use_cache=True))
    logits = out.logits.float()
    if logits[real].isnan().any():
        return ["its logits are not numbers (NaN); its weights are damaged"]

    def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
        apart = torch.where(one == other, 0.0, one - other).abs().max()  # logits may be -inf
        return bool(apart > 1e-2 * one[one.isfinite()].abs().max())

    if differ(logits[0, :3], logits[1, :3]):
        return [f"{type(model).__name__} is no causal language model: what follows a token changes what it predicts"]
    if differ(logits[0, :2], logits[2, 2:]):
        return [f"{type(model).__name__} reads padding: what stands before a text changes what it predicts"]
    if getattr(out, "past_key_values", None) is None:
        return [f"{type(model).__name__} has no key-value cache, through which replies are generated"]
    return []


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a policy so that `load` and any Hugging Face tool can read it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_response: int,
    ends: Sequence[int],
    pad_id: int,
    temperature: float | Sequence[float] = 0.0,
    seed: int = 0,
    size: int = 512,
) -> list[list[int]]:
    """Responses to `prompts` (token ids) through a key-value cache: greedy at temperature 0, else sampled.

    temperature: of all responses, or one for each. Each response ends with the first of `ends` (ids) unless it reached
    `max_response` tokens. Sampling uses a generator of its own seeded with `seed`; results depend on the chunk
    size `size` only through the order of its draws.
    """
    device = model.device
    heat = torch.as_tensor(temperature, dtype=torch.float32, device=device).expand(len(prompts))
    if bool((heat < 0).any()):
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or positive")
    rng = torch.Generator(device).manual_seed(seed)
    last = torch.tensor(list(ends), device=device)
    out: list[list[int]] = []
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        width = max(map(len, chunk))
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in chunk], device=device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chunk], device=device)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        done = torch.zeros(len(chunk), dtype=torch.bool, device=device)
        hot = heat[start : start + size]
        drawn = (hot > 0).nonzero().squeeze(-1)
        cache, steps = None, []
        for _ in range(max_response):
            result = model(
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = result.past_key_values, result.logits[:, -1].float()
            token = logits.argmax(-1)
            if len(drawn):
                odds = (logits[drawn] / hot[drawn, None]).softmax(-1)
                token[drawn] = torch.multinomial(odds, 1, generator=rng).squeeze(-1)
            token = token.masked_fill(done, pad_id)
            steps.append(token)
            done = done | torch.isin(token, last)
            if bool(done.all()):
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            attention = torch.cat([attention, torch.ones_like(ids)], 1)
        for row in torch.stack(steps, 1).tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            out.append(row[: stop + 1])
    return out


def decode(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]]) -> list[str]:
    """Texts of responses, without special tokens."""
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in responses]
