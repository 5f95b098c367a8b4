"""The role ``{value}`02-targets:win_rate```: a number in prose that a chapter has computed.

An executed chapter leaves ``_values/CHAPTER.json``, of which the role inserts the ``text``:

    {"name": {"value": 0.63, "text": "0.63 [0.60, 0.66]"}}

A missing number is a warning, hence an error under ``-W``: no page is built with a gap in it.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxRole

FOLDER = "_values"
SHORT = 40  # characters: a number with its interval stays on one line, a sentence does not


class MissingValue(Exception):
    """A value that no chapter has left; the message says what there is."""


def lookup(folder: Path, target: str) -> str:
    """Return the text of ``chapter:name`` or raise `MissingValue`."""
    chapter, _, name = (part.strip() for part in target.partition(":"))
    if not (chapter and name):
        raise MissingValue("a value is written as chapter:name")
    path = folder / f"{chapter}.json"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "none"
        raise MissingValue(f"{chapter} has left no values (chapters that have: {there})")
    values = json.loads(path.read_text(encoding="utf-8"))
    if name not in values:
        there = ", ".join(sorted(values)) or "none"
        raise MissingValue(f"{chapter} has no value {name!r} (available: {there})")
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
        except MissingValue as missing:
            warning = self.inliner.reporter.warning(f"value {self.text!r}: {missing}", line=self.lineno)
            return [nodes.problematic(self.rawtext, f"[{self.text}?]")], [warning]
        short = ["computed-value"] if len(text) <= SHORT else []
        return [nodes.inline(self.rawtext, text, classes=short)], []


def setup(app):
    """Register the role."""
    app.add_role("value", ValueRole())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
