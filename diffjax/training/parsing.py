"""JSON from files that may be damaged or hostile: an object of bounded depth, or an error.

Whatever is wrong is a ValueError of one short line, to which the caller or `read` adds the file.
"""

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DEPTH = 32
"""The largest depth of nested lists and objects."""
SIZE = 2**26
"""The largest size of a file, in bytes."""


def read(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not one JSON object; the message names it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    if path.stat().st_size > SIZE:
        raise ValueError(f"{path} is larger than {SIZE:,} bytes")
    try:
        return parse(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON of this diffjax: {short(error)}") from error


def parse(text: str) -> dict[str, Any]:
    """The object of a JSON text.

    Raises:
      ValueError: if it is not JSON, not an object, nested too deeply, or has an integer of more
        than 64 bits or a text that is not Unicode.

    >>> parse('{"a": [1, null]}')
    {'a': [1, None]}
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"lists or objects are nested more than {DEPTH} deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is {name_of(found)}, need an object")
    level: list[Any] = [found]
    for _ in range(DEPTH):
        inside = []
        for part in level:
            if isinstance(part, dict):
                inside += part  # the names
                inside += part.values()
            elif isinstance(part, list):
                inside += part
            elif isinstance(part, str):
                part.encode()  # a lone surrogate is a ValueError
            elif isinstance(part, int) and abs(part) >= 2**63:
                raise ValueError("a number has more than 64 bits")
        level = inside
    if level:
        raise ValueError(f"lists or objects are nested more than {DEPTH} deep")
    return found


def field(tree: dict[str, Any], name: str, *kinds: type) -> Any:
    """The entry of an object, which must be of one of some types.

    Raises:
      ValueError: if it is missing, or of another type; the message names it.

    >>> field({"step": True}, "step", int)
    Traceback (most recent call last):
        ...
    ValueError: step is True, need int
    """
    if name not in tree:
        raise ValueError(f"{name} is missing")
    if not is_of(tree[name], *kinds):
        raise mismatch(name, tree[name], " or ".join(kind.__name__ for kind in kinds))
    return tree[name]


def is_of(value: Any, *kinds: type) -> bool:
    """Whether a value is of one of some types; True and False are no numbers here."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def refuse_unknown(tree: dict[str, Any], names: Iterable[str], what: str) -> None:
    """Raise a ValueError if an object has other entries than these."""
    unknown = sorted(set(tree) - set(names))
    if unknown:
        raise ValueError(short(f"{what} has no field {', '.join(unknown)}"))


def mismatch(name: str, value: Any, need: str) -> ValueError:
    """The error that an entry is not what it should be."""
    return ValueError(f"{short(name)} is {reprlib.repr(value)}, need {need}")


def name_of(value: Any) -> str:
    """What JSON calls the type of a value, for messages."""
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


def short(error: object, most: int = 600) -> str:
    """The text of an error, or of a name, that may repeat much of a file."""
    text = str(error)
    return text if len(text) <= most else f"{text[:most]} ..."
