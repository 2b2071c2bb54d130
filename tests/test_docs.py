"""The site: every block of Python on its pages runs, and it builds without a warning."""

import doctest
import re
from pathlib import Path

import pytest

import diffjax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page):
    """The blocks of Python on a page, each with the line it begins on."""
    text = page.read_text()
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        yield text.count("\n", 0, found.start()) + 1, found[1]


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if list(blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_what_a_page_shows_is_what_happens(page, tmp_path, monkeypatch):
    """Blocks share their names, in order; one with prompts is a doctest, another is executed."""
    monkeypatch.chdir(tmp_path)
    scope, told = {"__name__": page.stem}, []
    for line, block in blocks(page):
        if not block.startswith(">>>"):
            exec(compile("\n" * line + block, page, "exec"), scope)
            continue
        test = doctest.DocTestParser().get_doctest(block, scope, page.name, str(page), line)
        doctest.DocTestRunner(verbose=False).run(test, out=told.append, clear_globs=False)
        scope |= test.globs
    assert not told, "".join(told)
