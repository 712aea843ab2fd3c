"""Sphinx's settings: pages from pages.py, nothing executed, nothing loaded from another machine."""
import html
import re
import sys
from importlib.metadata import files
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref

sys.path.insert(0, str(Path(__file__).parent))
import pages

project = "adabatch"
copyright = "The adabatch authors"
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_code_prompt_show = "Code"
nb_code_prompt_hide = "Code"
myst_enable_extensions = ["dollarmath", "fieldlist", "attrs_block"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = "adabatch"
html_show_sourcelink = False
html_copy_source = False
# one file, its glyphs included
mathjax = next(f for f in files("sphinx-mathjax-offline") if f.name == "tex-svg-full.js")
html_static_path = ["site.css", str(mathjax.locate())]
html_css_files = ["site.css"]
mathjax_path = mathjax.name

names = {}
for module in pages.modules():
    names[f"{pages.PACKAGE}.{module.name}"] = f"{pages.PACKAGE}.{module.name}"
    for name in module.public:
        for short in (name, f"{module.name}.{name}"):
            names[short] = None if short in names else f"{pages.PACKAGE}.{module.name}.{name}"


def link_names(app, document):
    "Make `Schedule` and `split()` in text links to the reference; a bare lower-case word may mean something else."
    for literal in list(document.findall(nodes.literal)):
        text = literal.astext()
        name = re.sub(r"\(.*\)$", "", text, flags=re.S).removeprefix(f"{pages.PACKAGE}.") if "(" in text else text
        full = names.get(name) or names.get(name.removeprefix(f"{pages.PACKAGE}."))
        if not full or isinstance(literal.parent, (nodes.reference, nodes.title, pending_xref)): continue
        if name.islower() and name.isalpha() and "(" not in text: continue
        attributes = dict(refdomain="py", reftype="obj", reftarget=full, refexplicit=True, refwarn=True)
        link = pending_xref("", literal.deepcopy(), refdoc=app.env.docname, **attributes)
        literal.replace_self(link)


def describe(app, page, template, context, document):
    "Give search engines the first paragraph of the page."
    paragraph = document and next(iter(document.findall(nodes.paragraph)), None)
    text = " ".join(paragraph.astext().split()) if paragraph else ""
    if text: context["metatags"] += f'\n<meta name="description" content="{html.escape(text[:300])}">'


def setup(app):
    app.connect("doctree-read", link_names)
    app.connect("html-page-context", describe)
