"""Findings: what is asked of runs and how sure the answers are. Measurements as tables, intervals, rules."""

__all__ = [
    "ablations",
    "agreement",
    "calibration",
    "claims",
    "coverage",
    "earning",
    "explore",
    "firmness",
    "mass",
    "measure",
    "paired",
    "prediction",
    "questions",
    "reference",
    "reweighting",
    "stats",
    "targets",
    "tuning",
    "turned",
]  # rooms, imported one by one
