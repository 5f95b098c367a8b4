"""The book: what a chapter and a reader need. Parameters, plans, figures, pages, the command line."""

__all__ = [
    "cli",
    "comparison",
    "evidence",
    "page",
    "params",
    "plan",
    "plots",
    "profiles",
    "sensitivity",
    "studies",
    "survey",
    "variants",
    "workflow",
]  # rooms, imported one by one
