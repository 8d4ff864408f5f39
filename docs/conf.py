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

import style  # noqa: E402

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

python_maximum_signature_line_length = 40  # what a phone shows in a line
toc_object_entries_show_parents = "hide"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # "x, y: the same of both" stays one entry
napoleon_use_rtype = False  # "Returns: (grads, loss): what they are" stays one sentence
ALIASES = {
    "~collections.abc.Callable[[tuple[str | int, ...]], bool]": "~fresnet.tree.Where",
    "~collections.abc.Callable[[~torch.Tensor], float | ~torch.Tensor]": "~fresnet.optim.Schedule",
    "float | ~torch.Tensor | ~fresnet.optim.Schedule": "~fresnet.optim.Rate",
    "~collections.abc.Callable[[~PIL.Image.Image, ~torch._C.Generator], ~torch.Tensor]": (
        "~fresnet.data.Transform"
    ),
}
"""Long types, and the public names of them."""


def in_style(conf: dict[str, Any], file: str) -> None:
    """Pictures like those of the examples."""
    mpl.rcParams.update(style.STYLE)


sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": ".",
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": (),
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", in_style),
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


def short_types(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Have a type or a function shown by its name: a default as `Norm`, an annotation as `Rate`."""

    def short(text: str | None) -> str | None:
        for long, name in ALIASES.items():
            text = text and text.replace(long, name)
        return text

    named = r"<(?:class '(?:\w+\.)*|function )(\w+)[^>]*>"
    default_by_name = signature and re.sub(named, r"\1", signature)
    return short(default_by_name), short(returns)


def setup(app: Sphinx) -> None:
    app.add_lexer("imports", TextLexer)  # the list in CONTRIBUTING.md
    app.connect("source-read", pages_of_tutorials)
    app.connect("autodoc-process-docstring", docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", short_types)
