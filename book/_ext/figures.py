"""Computed captions, alt texts and names for the figures of executed chapters.

MyST-NB takes them from a cell's metadata only, which is written before the numbers are known. Here a code
cell gives them with its output,

    display(fig, metadata={"mystnb": {"image": {"alt": ...}, "figure": {"caption": ..., "name": ...}}})

and they are carried over to the cell when the page is read; the executed notebook itself stays as it is.
"""

import json

from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
KEY = "mystnb"
SHOWN = ("display_data", "execute_result")
PROMPTS = {
    "code_prompt_show": "Show the parameters of this edition",
    "code_prompt_hide": "Hide the parameters",
}


def promote(cell: dict) -> list[str]:
    """Move figure metadata from the output of a code cell to the cell; return complaints.

    The cell's metadata applies to all that it displays, so a cell with a figure displays nothing else.
    """
    shown = [output for output in cell.get("outputs", []) if output["output_type"] in SHOWN]
    figures = [output for output in shown if KEY in output.get("metadata", {})]
    if len(shown) > 1 and figures:
        return ["a cell with a figure displays more than that one figure; give each output its own cell"]
    for output in figures:
        own = cell.setdefault("metadata", {}).setdefault(KEY, {})
        for part, options in output["metadata"].pop(KEY).items():
            own[part] = {**own.get(part, {}), **options}
    images = [output for output in shown if any(mime.startswith("image/") for mime in output["data"])]
    alt = cell.get("metadata", {}).get(KEY, {}).get("image", {}).get("alt", "")
    return ["an image without alternative text"] if images and not alt.strip() else []


def fold_injected(cell: dict) -> None:
    """Fold the cell that papermill adds: it does not inherit the tags of the parameters cell."""
    metadata = cell.setdefault("metadata", {})
    if "injected-parameters" in metadata.get("tags", []):
        metadata["tags"] = [*metadata["tags"], "hide-input"]
        metadata[KEY] = {**PROMPTS, **metadata.get(KEY, {})}


def read_notebook(app, docname, source):
    """Prepare an executed notebook before MyST-NB parses it."""
    if not app.env.doc2path(docname).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        for complaint in promote(cell):
            LOGGER.warning("code cell %d: %s", index, complaint, location=docname)
        fold_injected(cell)
    source[0] = json.dumps(notebook)


def setup(app):
    """Connect to the reading of sources."""
    app.connect("source-read", read_notebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
