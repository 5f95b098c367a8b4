"""The role ``{value}`02-targets:win_rate```: a number in prose that a chapter has computed.

An executed chapter leaves ``_values/CHAPTER.json`` of the form ``{"name": {"value": 0.63, "text": "0.63 [0.60, 0.66]"}}``.
The role inserts the ``text``. A missing number is a warning, hence an error under ``-W``: no page is built with a gap in it.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxRole

FOLDER = "_values"


def lookup(folder: Path, target: str) -> str:
    """Return the text of ``chapter:name``; a ``LookupError`` says what is missing and what there is."""
    chapter, colon, name = (part.strip() for part in target.partition(":"))
    if not (chapter and colon and name):
        raise LookupError(f"a value is written as chapter:name, not {target!r}")
    path = folder / f"{chapter}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise LookupError(f"value {target!r}: chapter {chapter!r} has left no values (chapters with values: {there})")
    values = json.loads(path.read_text(encoding="utf-8"))
    if name not in values:
        raise LookupError(f"value {target!r}: no {name!r} in {chapter} (available: {', '.join(sorted(values)) or 'none'})")
    return str(values[name]["text"])


class ValueRole(SphinxRole):
    """Insert a computed value as plain text and make the page depend on the file that it comes from."""

    def run(self):
        """Return the text node, or a warning and a visible mark."""
        folder = Path(self.env.srcdir, FOLDER)
        chapter = self.text.partition(":")[0].strip()
        # Noted even when the file is missing, so that the page is read again once it appears.
        self.env.note_dependency(str(folder / f"{chapter}.json"))
        try:
            text = lookup(folder, self.text)
        except (LookupError, TypeError, ValueError) as error:
            message = f"cannot read value {self.text!r}: {error!r}" if not isinstance(error, LookupError) else str(error.args[0])
            return [nodes.problematic(self.rawtext, f"[{self.text}?]")], [self.inliner.reporter.warning(message, line=self.lineno)]
        return [nodes.inline(self.rawtext, text, classes=["computed-value"])], []


def setup(app):
    """Register the role."""
    app.add_role("value", ValueRole())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
