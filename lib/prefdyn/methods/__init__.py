"""Methods: what a step of preference optimisation does, as token weights. One file a method, found by `registry`."""

__all__ = ["base", "own", "registry", "rollout", "surrogate"]  # rooms beside the methods themselves, which nobody lists
