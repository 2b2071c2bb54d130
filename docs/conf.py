"""The site: `make docs` builds it into build/site. Modules are imported; nothing is executed."""

import re

import diffjax

project = "diffjax"
version = release = diffjax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "diffjax"

nb_execution_mode = "off"
suppress_warnings = ["misc.highlighting_failure"]  # a shell's line in a notebook is not Python
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Annotations of shapes are long, and the docstrings say the shapes in words.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_default_options = {"ignore-module-all": True}  # a page has what its module defines
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_maximum_signature_line_length = 90

# In a docstring a word in backticks links to what it names, or is code if it names nothing.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]


def as_rst(app, what, name, obj, options, lines):
    """Make a docstring reST: an indented block is literal, and a bar or a lone star is itself."""
    out, inside = [], False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside and out and not out[-1]:
            inside = True
            out += ["::", ""]
        elif line and not indented:
            inside = False
        literal = r"(`[^`]*`)|\||\*(?=,)"
        out.append(line if inside else re.sub(literal, lambda m: m[1] or rf"\{m[0]}", line))
    # Napoleon would take what stands before a colon in a field's first line for its type.
    empty_comment = ["..", ""] if what in ("attribute", "data", "property") else []
    lines[:] = empty_comment + out


def is_field(app, what, name, obj, skip, options):
    """Whether to leave a member out: fields of a NamedTuple, which its docstring describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def readme(app, path, parent, content):
    """The site has the notebooks below docs/, by a link, which no path may go through."""
    link = r"\[([^]]*)\]\(notebooks/(\w+)\.ipynb\)"
    content[0] = re.sub(link, r'<a href="notebooks/\2.html">\1</a>', content[0])


def setup(app):
    """Connect them."""
    app.connect("include-read", readme)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", is_field)
