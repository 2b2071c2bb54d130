"""Files that are there whole or not at all, whenever a run is killed or a disk is full."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write beside a file, then put the new one in its place; after an error the old one stays.

    Yields:
      Where to write: always the same, so that what a kill leaves behind is written over.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with replacing(path) as new:
    ...     _ = new.write_text("1 2 3")
    >>> path.read_text(), [file.name for file in path.parent.iterdir()]
    ('1 2 3', ['numbers.txt'])
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`Path.write_text`, whole or not at all."""
    with replacing(path) as new:
        new.write_text(text)
