"""The book: what a chapter and a reader need. Parameters, plans, figures, pages, the command line."""

__all__ = [
    "calibrating",
    "cli",
    "comparison",
    "evidence",
    "judging",
    "page",
    "params",
    "plan",
    "plots",
    "profiles",
    "studies",
    "survey",
    "variants",
    "workflow",
]  # rooms, imported one by one
