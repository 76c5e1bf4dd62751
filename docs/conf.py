"""The site that `make docs` builds out of these pages and the docstrings of the public surface."""

from __future__ import annotations

import aadkern

project, author = "aadkern", "The aadkern authors"
version = release = aadkern.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["images/*.py", "data/*.py"]
html_theme = "furo"
html_title = f"aadkern {release}"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
