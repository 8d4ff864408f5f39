"""How Sphinx makes the site of these documents: `make docs`."""

import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import fresnet  # noqa: E402

project = html_title = "fresnet"
release = fresnet.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["tutorials"]  # The gallery is made of them.
default_role = "code"
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # A function stands in the settings of the gallery.
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # Annotations name types of PyTorch and of Python.

python_maximum_signature_line_length = 80
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def style(conf: dict[str, Any], file: str) -> None:
    """Pictures that can be read on a phone."""
    mpl.rcParams.update({"figure.figsize": (6.4, 4.2), "figure.constrained_layout.use": True})
    mpl.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 120})


sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": ".",
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": (),
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", style),
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1e6,  # seconds: none is reported, as machines differ
    "write_computation_times": False,
}

html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]


def docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Have names lead to their pages, and what is indented by four shown as it stands."""
    for i in reversed(range(2, len(lines))):
        if lines[i].startswith("    ") and not lines[i - 1] and not lines[i - 2].startswith("  "):
            lines[i:i] = ["::", ""]
    lines[:] = [re.sub(r"(?<!`)`[A-Za-z_][\w.]*`(?!`)", r":py:obj:\g<0>", line) for line in lines]


def pages_of_tutorials(app: Sphinx, name: str, source: list[str]) -> None:
    """Have a link to a tutorial's file lead to its page."""
    source[0] = re.sub(r"\(tutorials/(\w+)\.py\)", r"(gallery/\1)", source[0])


def types_by_name(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str,
) -> tuple[str | None, str]:
    """Have defaults that are types or functions shown by name: `Norm`, not `<class '...Norm'>`."""
    named = r"<(?:class '(?:\w+\.)*|function )(\w+)[^>]*>"
    return signature and re.sub(named, r"\1", signature), returns


def setup(app: Sphinx) -> None:
    app.add_lexer("imports", TextLexer)  # the list in CONTRIBUTING.md
    app.connect("source-read", pages_of_tutorials)
    app.connect("autodoc-process-docstring", docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", types_by_name)
