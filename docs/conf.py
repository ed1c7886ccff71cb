"""Sphinx configuration. `make docs` builds into docs/_build/html; warnings are errors."""

import re

import galvatron_jax

project = "galvatron_jax"
author = copyright = "The galvatron_jax authors"
release = version = galvatron_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "reference/modules/modules.rst"]
html_theme = "furo"
html_title = f"galvatron_jax {release}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The module reference is written anew at each build, so that it cannot fall behind the package.
apidoc_modules = [
    {
        "path": "../galvatron_jax",
        "destination": "reference/modules",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]

autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
autodoc_default_options = {
    "exclude-members": "model_config, model_post_init, __init__, __new__",
    # What a package re-exports is described once, in the module that defines it.
    "ignore-module-all": True,
}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Single backticks in docstrings are code, as in Markdown.
default_role = "code"
_CODE = re.compile(r"(?<![`:\w])`((?:[^`\n]|\n(?!\s*\n))+)`(?!`)(?=(\w?))")


def _read_docstring(app, what, name, obj, options, lines):
    """Prepares a docstring for reStructuredText and Napoleon.

    Writes `x` as code, also over two lines and before a letter as in `x`s. A field's text starts with an empty comment,
    or Napoleon takes what precedes its first colon for a type.
    """
    text = _CODE.sub(lambda match: f"``{match[1]}``" + ("\\ " if match[2] else ""), "\n".join(lines))
    lines[:] = [*(["..", ""] if what in ("attribute", "data", "property") else []), *text.split("\n")]


def setup(app):
    app.connect("autodoc-process-docstring", _read_docstring, priority=100)


# Several classes are called Step; annotations name the one in scope, which Sphinx cannot tell.
suppress_warnings = ["ref.python"]
