from typing import Any

import hf_adapter_distillation

# The address of the repository, for all pages, which write <repository>. The notebooks
# repeat it, and a test compares them.
repository = "https://github.com/OWNER/hf-adapter-distillation"

project = "hf-adapter-distillation"
author = copyright = "the hf-adapter-distillation authors"
release = hf_adapter_distillation.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # copies MathJax into the site
]
myst_enable_extensions = ["amsmath", "attrs_block", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_rtype = False
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
exclude_patterns = ["_build"]

# A reference to a name of this package that the reference lacks is an error.
nitpicky = True
nitpick_ignore_regex = [
    # Types of other libraries in signatures: their inventories would have to be downloaded.
    ("py:class", r"(collections|concurrent|contextlib|pathlib)\..+"),
    (
        "py:class",
        r"(accelerate|adapters|datasets|huggingface_hub|sentence_transformers|torch|transformers|trl)\..+",
    ),
    # Imported only for type checking: autodoc sees the bare name.
    ("py:class", "Figure|ModelAdaptersMixin|PeftModel"),
]

# make linkcheck
linkcheck_timeout = 20
linkcheck_retries = 2


def setup(app: Any) -> None:
    """Put the address of the repository into all pages, code included."""

    def substitute(app: Any, page: str, source: list[str]) -> None:
        source[0] = source[0].replace("<repository>", repository)

    app.connect("source-read", substitute)
