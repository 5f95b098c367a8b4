"""Findings: what is asked of runs and how sure the answers are. Measurements as tables, intervals, rules."""

__all__ = [
    "ablations",
    "claims",
    "coverage",
    "explore",
    "firmness",
    "measure",
    "paired",
    "prediction",
    "questions",
    "reference",
    "reweighting",
    "stats",
    "targets",
    "tuning",
]  # rooms, imported one by one
