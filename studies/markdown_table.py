"""Tables in Markdown, for the pages that the studies write."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a line of headings above its rows.

    >>> print(table(["n", "error"], [[1, "0.5"], [2, "0.1"]]), end="")
    | n | error |
    | --- | --- |
    | 1 | 0.5 |
    | 2 | 0.1 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
