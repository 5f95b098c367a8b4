"""Where in a model two directions meet: their inner product by groups of parameters, from input to output.

<a, b> is a sum over parameters, so that it splits into groups without anything left over: embeddings, the attention,
mlp and norms of each layer, the final norm, the head.
"""

import math
import re
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from .alignment import Direction

EMBEDDING, FINAL_NORM, HEAD, OTHER = "embedding", "final norm", "head", "other"
IN_LAYER = ("attention", "mlp", "norms")  # in this order
ATTENTION, MLP = re.compile("att", re.IGNORECASE), re.compile(r"mlp|feed_?forward|ffn|experts|moe|^fc\d", re.IGNORECASE)


def groups(model: PreTrainedModel) -> dict[str, str]:
    """The group of every parameter that the model names, {name: group}, in the order of groups from input to output.

    "embedding": all embeddings of tokens and positions. A matrix that is embedding and output layer at once (tied) is
    named once, and is here: "embedding"; then there is no "head", or only its bias. "layer i attention", with norms
    inside of it (of queries and keys); "layer i mlp"; "layer i norms", those between. "final norm". "head": the output
    layer. Whatever the structure does not tell (a layer's other modules, parameters of its own, a model that is no
    transformer) is "other": nothing is dropped.
    """
    structure = _Structure(model)
    found = {name: _group(name, structure) for name, _ in model.named_parameters()}
    order = {group: place for place, group in enumerate(_order(found.values()))}
    return dict(sorted(found.items(), key=lambda item: order[item[1]]))


def inner_by_group(a: Direction, b: Direction, of: Mapping[str, str]) -> dict[str, float]:
    """<a, b> within each group of `of` ({parameter: group}, as `groups`), together `alignment.inner(a, b)`.

    Groups that no parameter of `a` is in are left out; parameters that `of` does not know are "other". Raises
    ValueError if the two are not of the same parameters.
    """
    if a.keys() != b.keys():
        raise ValueError(f"inner_by_group: only one of the two has {sorted(a.keys() ^ b.keys())[:3]}")
    if not a:
        return {}
    names = sorted(a, key=_places(of))
    # one transfer for all: an accelerator is not waited for at every parameter
    products = torch.stack([(a[name] * b[name]).sum(dtype=torch.float64) for name in names]).tolist()
    sums: dict[str, float] = {}
    for name, product in zip(names, products, strict=True):
        group = of.get(name, OTHER)
        sums[group] = sums.get(group, 0.0) + product
    return sums


def cosine_by_group(a: Direction, b: Direction, of: Mapping[str, str]) -> dict[str, float]:
    """Cosine of the two directions within each group, NaN where one of them is 0 there; as `inner_by_group`."""
    return cosines(inner_by_group(a, b, of), inner_by_group(a, a, of), inner_by_group(b, b, of))


def cosines(ab: Mapping[str, float], aa: Mapping[str, float], bb: Mapping[str, float]) -> dict[str, float]:
    """Cosines by group from the inner products <a, b>, <a, a> and <b, b> by group."""
    lengths = {group: math.sqrt(aa[group] * bb[group]) for group in ab}
    return {group: ab[group] / lengths[group] if lengths[group] > 0 else math.nan for group in ab}


class _Structure:
    """What of a model its groups are told by."""

    def __init__(self, model: torch.nn.Module):
        self.modules = dict(model.named_modules())
        self.head = {name for name, module in self.modules.items() if module is _output(model)}
        self.body, self.layers = _layers(self.modules, getattr(model, "base_model", model))
        children = list(self.modules[self.body].named_children()) if self.layers else []
        after = [name for name, _ in children].index(self.layers.rpartition(".")[2]) if self.layers else 0
        prefix = f"{self.body}." if self.body else ""
        self.final = {prefix + name for name, module in children[after + 1 :] if _is_norm(module)}


def _output(model: torch.nn.Module) -> torch.nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def _layers(modules: Mapping[str, torch.nn.Module], base: torch.nn.Module) -> tuple[str, str]:
    """Names of the module that holds the stack of layers, and of that stack: the first list that has an attention.

    ("", "") where there is none.
    """
    inside = {id(module) for module in base.modules()}
    for name, module in modules.items():
        if id(module) in inside and isinstance(module, torch.nn.ModuleList) and len(module):
            told = [(child, type(part).__name__) for child, part in module[0].named_children()]
            if any(ATTENTION.search(child) or ATTENTION.search(kind) for child, kind in told):
                return name.rpartition(".")[0], name
    return "", ""


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _group(name: str, model: _Structure) -> str:
    """The group of one parameter."""
    owner = name.rpartition(".")[0]
    if owner in model.head:
        return HEAD
    if owner in model.final:
        return FINAL_NORM
    if model.layers and name.startswith(f"{model.layers}."):
        number, _, rest = name.removeprefix(f"{model.layers}.").partition(".")
        part = rest.partition(".")[0]
        kind = _part_of_layer(part, model.modules.get(f"{model.layers}.{number}.{part}"))
        return f"layer {number} {kind}" if kind else OTHER
    return EMBEDDING if isinstance(model.modules.get(owner), torch.nn.Embedding) else OTHER


def _part_of_layer(name: str, module: torch.nn.Module | None) -> str | None:
    """Which of IN_LAYER a direct part of a layer is; norms first, whose names tell what they follow."""
    if module is None:
        return None
    if _is_norm(module):
        return "norms"
    told = f"{name} {type(module).__name__}"
    return "attention" if ATTENTION.search(told) else "mlp" if MLP.search(told) else None


def _order(names) -> list[str]:
    """Groups from input to output."""

    def place(group: str) -> tuple:
        if group.startswith("layer "):
            _, number, kind = group.split()
            return 1, int(number), IN_LAYER.index(kind)
        return {EMBEDDING: 0, FINAL_NORM: 2, HEAD: 3}.get(group, 4), 0, 0

    return sorted(set(names), key=place)


def _places(of: Mapping[str, str]):
    """A key that sorts parameters by their groups in the order in which `of` names these."""
    order = {group: place for place, group in enumerate(dict.fromkeys(of.values()))}
    return lambda name: order.get(of.get(name, OTHER), len(order))
