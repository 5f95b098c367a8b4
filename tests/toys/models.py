"""Tiny policies: a table of logits whose gradients are known by hand, and real architectures with random weights."""

from types import SimpleNamespace

import torch
from prefdyn.lab import policy
from prefdyn.lab.worlds import EASY
from prefdyn.lens.batch import Batch, pad
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


class Table(torch.nn.Module):
    """A policy of V x V logits: the next token depends on the present one alone.

    With p = softmax of the row of token x, the gradient of log pi(y | x) is e_y - p in row x and 0 elsewhere.
    """

    def __init__(self, logits):
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(logits, dtype=torch.get_default_dtype()))

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids, logits_to_keep=slice(None), **kwargs):
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=self.table[input_ids[:, keep]], past_key_values=None)


def tiny_policy(seed: int = 0, width: int = 16, layers: int = 1):
    """A random GPT-NeoX over the world's words and its tokenizer."""
    tokenizer = policy.word_tokenizer(EASY.vocabulary())
    model = policy.scratch_model(tokenizer, layers=layers, width=width, heads=2, context=52, seed=seed)
    return model, tokenizer


VOCAB = 23
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GROUPED = {"num_key_value_heads": 1}
_NARROW = _GROUPED | {"head_dim": 8}
_WINDOW = _GROUPED | {"sliding_window": 3}  # shorter than the sequences of `random_batch`
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
# What each architecture of transformers needs beside SIZES to be tiny; after a comma, a variant of one.
FAMILIES: dict[str, dict] = {
    "apertus": _GROUPED,
    "arcee": _GROUPED,
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 2},  # positions enter by the distance between tokens
    "cohere": _GROUPED,
    "cohere2": _NARROW | _WINDOW,
    "deepseek_v3": _EXPERTS
    | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2}
    | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    "exaone4": _WINDOW,
    "falcon": {"multi_query": True},
    "falcon, alibi": {"alibi": True},
    "gemma": _NARROW,
    "gemma2": _NARROW | _WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": _NARROW | _WINDOW | {"query_pre_attn_scalar": 8},
    "glm4": _NARROW,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 3},
    "gpt_neox": {},
    "gpt_oss": _NARROW | _WINDOW | _EXPERTS,
    "gptj": _GPT | {"rotary_dim": 4},
    "granite": _GROUPED,
    "granitemoe": _GROUPED | _EXPERTS,
    "helium": _NARROW,
    "llama": _GROUPED | {"tie_word_embeddings": False},
    "llama, tied": _GROUPED | {"tie_word_embeddings": True},
    "mistral": _NARROW | _WINDOW,
    "mixtral": _GROUPED | _EXPERTS,
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "nemotron": _NARROW,
    "olmo": {},
    "olmo2": _GROUPED,
    "olmo3": _WINDOW,
    "olmoe": _GROUPED | _EXPERTS,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "opt, projected": {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "phi": {},
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen2_moe": _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 12},
    "qwen3": _NARROW | {"tie_word_embeddings": False},
    "qwen3, tied": _NARROW | {"tie_word_embeddings": True},
    "qwen3_moe": _NARROW | _EXPERTS,
    "seed_oss": _NARROW,
    "smollm3": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _WINDOW,
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2},
}
# What is refused: not causal, no cache of keys and values, padding not masked.
UNSUITABLE: dict[str, dict] = {
    "bert": {},
    "mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 16},
}
# Rotary positions, tied embeddings, learned positions, which unlike the others notice a shift: enough for most tests.
ARCHITECTURES = ("gpt_neox", "llama", "qwen3", "qwen3, tied", "gpt2")


def build(architecture: str, seed: int = 0, **more) -> PreTrainedModel:
    """A random model of torch's default dtype, with weights large enough that nothing is nearly linear or uniform.

    more: settings of its configuration.
    """
    kind, settings = architecture.split(",")[0], SIZES | (FAMILIES | UNSUITABLE)[architecture]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings | more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8.0)
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        words = model.get_input_embeddings().weight
        words.mul_(8.0)  # of about unit length, as those of trained models
        if config.pad_token_id is not None:  # its row starts at zero, where a norm bends most, and trained ones are not
            words[config.pad_token_id] = words[config.pad_token_id - 1].flip(0)
    return model


def lift_float32(monkeypatch) -> None:
    """Let float64 pass where transformers computes in float32: softmax of attention, norms, rotations, routers."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def to_unless_coarser(self, *args, **kwargs):
        asked = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), None))
        return self if self.dtype == torch.float64 and asked == torch.float32 else to(self, *args, **kwargs)

    def softmax_as_given(input, dim=None, _stacklevel=3, dtype=None):
        return softmax(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.Tensor, "to", to_unless_coarser)
    monkeypatch.setattr(torch.Tensor, "type", lambda self, *a, **k: to_unless_coarser(self, *a, **k))
    monkeypatch.setattr(torch.Tensor, "float", lambda self: to_unless_coarser(self, torch.float32))
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax_as_given)
    monkeypatch.setattr(torch, "softmax", softmax_as_given)


def random_batch(rows: int, seed: int = 0, vocab: int = VOCAB, side: str = "right", longest: int = 6) -> Batch:
    """Random prompts and responses of different lengths; token 0 is padding."""
    rng = torch.Generator().manual_seed(seed)

    def tokens() -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=rng))
        return torch.randint(1, vocab, (length,), generator=rng).tolist()

    return pad([tokens() for _ in range(rows)], [tokens() for _ in range(rows)], 0, side)
