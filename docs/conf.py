import hf_adapter_distillation

project = "hf-adapter-distillation"
author = "the hf-adapter-distillation authors"
release = hf_adapter_distillation.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_rtype = False
html_theme = "furo"
html_title = f"{project} {release}"
exclude_patterns = ["_build"]
