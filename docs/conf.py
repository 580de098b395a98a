"""How the pages are built (`make docs`): Markdown, the tutorial run anew, and the reference out of the docstrings."""

import importlib.metadata

project = "depass-kernels"
version = release = importlib.metadata.version(project)
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"  # light and dark; loads nothing from outside
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell
nb_execution_in_temp = True
nb_output_stderr = "remove"

add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_mock_imports = ["captum", "inseq", "interpreto"]  # adapters import their tools
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a dataclass's fields stand once, in its docstring
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
