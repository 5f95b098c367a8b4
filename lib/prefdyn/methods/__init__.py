"""Methods: what a step of preference optimisation does, as token weights."""

__all__ = ["base", "objectives", "rollout"]  # rooms, imported one by one
