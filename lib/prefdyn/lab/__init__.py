"""The lab: what runs. The world and preference files, policies, training, evaluation, and the store of runs."""

__all__ = [
    "account",
    "chat",
    "checkpoints",
    "data",
    "evaluate",
    "exact",
    "fingerprint",
    "layouts",
    "online",
    "others",
    "policy",
    "ppo",
    "recipes",
    "runs",
    "sources",
    "train",
    "turning",
    "world",
    "worlds",
]  # rooms, imported one by one
