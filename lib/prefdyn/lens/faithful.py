"""A model as a plain function of its parameters, the same one in forward mode, in reverse mode and in training."""

import contextlib
from collections.abc import Iterator

import torch

_Change = tuple[object, str, object]  # (module or configuration, attribute, value)
_PLAIN_EMBEDDING = {"padding_idx": None, "scale_grad_by_freq": False, "sparse": False}
# Kernels that have every derivative, by the name under which a configuration chooses others.
_PLAIN_KERNELS = {"_experts_implementation": (None, "eager"), "_attn_implementation": (None, "eager", "sdpa")}


def plain_embeddings(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, from now on with a gradient for every row of its embeddings, that of the padding token too.

    torch leaves that row out in reverse mode alone; where the end of text is the padding, it is a token like others.
    """
    for module, name, value in _embeddings(model):
        setattr(module, name, value)
    return model


@contextlib.contextmanager
def faithful(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` is a plain function with all its derivatives; afterwards, also after an error, as it was.

    Evaluation mode, and with it no dropout and no recomputation of activations; plain embeddings; no hook that marks
    activations; attention by a kernel that has a forward derivative, and a mixture's experts one by one.
    Raises ValueError for an embedding that changes its weights whenever it is read.
    """
    if any(isinstance(module, torch.nn.Embedding) and module.max_norm is not None for module in model.modules()):
        raise ValueError("an embedding with max_norm changes its weights whenever it is read: set max_norm=None")
    modes: list[_Change] = [(module, "training", False) for module in model.modules() if module.training]
    changes = modes + _embeddings(model) + _kernels(model)
    saved = [(thing, name, getattr(thing, name)) for thing, name, _ in changes]
    marked = bool(getattr(model, "_require_grads_hook", None))
    try:
        if marked:
            model.disable_input_require_grads()
        for thing, name, value in changes:
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, value in saved:
            setattr(thing, name, value)
        if marked:
            model.enable_input_require_grads()


def _embeddings(model: torch.nn.Module) -> list[_Change]:
    """What makes embeddings plain."""
    return [
        (module, name, value)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for name, value in _PLAIN_EMBEDDING.items()
        if getattr(module, name) != value
    ]


def _kernels(model: torch.nn.Module) -> list[_Change]:
    """What makes kernels plain; a whole's configuration comes before those of its parts, which it sets along."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [
        (config, name, "eager")
        for config in configs.values()
        for name, plain in _PLAIN_KERNELS.items()
        if getattr(config, name, None) not in plain
    ]
