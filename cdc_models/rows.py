"""Finished results in a JSON-lines file, one a line, so that what was interrupted goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Rows"]


class Rows:
    """Results by key, kept in a file that only grows.

    A line that an interruption has cut off is left out when the file is read: that result is made again.

    Args:
        path: the file; made with its folder when the first result comes.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> Rows(Path(folder.name) / "results.jsonl").add({"key": "a", "accuracy": 0.5})
        >>> Rows(Path(folder.name) / "results.jsonl").rows
        {'a': {'key': 'a', 'accuracy': 0.5}}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self._cut_off = False  # an interruption may have left the last line without its end
        if path.exists():
            text = path.read_text(errors="replace")  # a damaged line is left out, too
            self._cut_off = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    row = json.loads(line)
                    self.rows[row["key"]] = row
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue

    def add(self, *rows: dict[str, Any]) -> None:
        """Keep results, each with its "key", and append them to the file in one write.

        Raises:
            OSError: if they cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(("\n" if self._cut_off else "") + _lines(rows))
        self._cut_off = False
        self.rows |= {row["key"]: row for row in rows}


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
