"""The site: `make docs` builds it into build/site. It imports modules, and executes no page."""

import ast
import itertools
import re
import textwrap

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.util.logging import getLogger
from sphinx.util.math import get_node_equation_number

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
# Formulas are MathML, which browsers render without a network.
html_math_renderer = "mathml"
# A literal block of a docstring is text, unless `as_rst` finds that it is Python.
highlight_language = "text"

# Annotations of shapes are long, and the docstrings have the shapes.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_default_options = {"ignore-module-all": True}  # a page has what its module defines
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_maximum_signature_line_length = 90

# In a docstring a name in backticks becomes a link, or code if nothing has the name.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]


def as_rst(app, what, name, obj, options, lines):
    """Make a docstring reST: an indented block is literal, and a bar or a lone star is itself."""
    out, inside = [], False
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if indented and not inside and out and not out[-1]:
            inside = True
            rest = itertools.takewhile(lambda x: not x or x.startswith("    "), lines[i:])
            out += [".. code-block:: python" if is_python("\n".join(rest)) else "::", ""]
        elif line and not indented:
            inside = False
        literal = r"(`[^`]*`)|\||\*(?=,)"
        out.append(line if inside else re.sub(literal, lambda m: m[1] or rf"\{m[0]}", line))
    # Napoleon would take what stands before a colon in a field's first line for its type.
    empty_comment = ["..", ""] if what in ("attribute", "data", "property") else []
    lines[:] = empty_comment + out


def is_python(block):
    """Whether an indented block parses as Python, as a table or a formula does not."""
    try:
        ast.parse(textwrap.dedent(block))
    except SyntaxError:
        return False
    return True


def mathml(formula, display):
    """A formula of TeX as MathML; a command that the converter does not know is a warning."""
    text = formula.replace("\\\n", "\\ ")  # a backslash at the end of a line is a space
    if "\\\\" in text and "\\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    made = convert(text, display=display)
    if "\\" in made:
        getLogger(__name__).warning("not converted to MathML: %s", formula)
    return made


def visit_math(self, node):
    """Write a formula in a line of text."""
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(self, node):
    """Write a formula on lines of its own, with its number and a link to it."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        number = get_node_equation_number(self, node)
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(mathml(node.astext(), "block") + "</div>\n")
    raise nodes.SkipNode


def is_field(app, what, name, obj, skip, options):
    """Whether to leave a member out: fields of a NamedTuple, which its docstring describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def by_last_name(app, env, node, contnode):
    """Link a name without its module to the object of this name, if there is exactly one."""
    domain = env.get_domain("py")
    if node.get("refdomain") != "py":
        return None
    found = domain.find_obj(env, None, None, node["reftarget"], None, 1)
    full = [name for name, entry in found if entry.objtype not in ("attribute", "method")]
    if len(full) != 1:
        return None
    where = node["refdoc"], app.builder, "obj", full[0]
    return domain.resolve_xref(env, *where, node, contnode)


def without_long_value(app, domain, objtype, content):
    """Leave out the value of a table, whose docstring says what it holds."""
    for value in list(content.parent.findall(addnodes.desc_annotation)):
        if value.astext().startswith(" = ") and len(value.astext()) > 60:
            value.parent.remove(value)


def readme(app, path, parent, content):
    """Link the README's notebooks to their pages: the site has them below docs/, by a symlink."""
    link = r"\[([^]]*)\]\(notebooks/(\w+)\.ipynb\)"
    text = re.sub(link, r'<a href="notebooks/\2.html">\1</a>', content[0])
    content[0] = text.replace("[notebooks](notebooks)", "notebooks")


def setup(app):
    """Connect the functions above to the events of Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("include-read", readme)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", is_field)
    app.connect("missing-reference", by_last_name)
    app.connect("object-description-transform", without_long_value)
