"""How the documentation becomes a site: `make docs` builds it into `site/`.

The top level is the source folder, so that pages link to each other, and to files beside them, as
they do in the repository. Only what `include_patterns` names becomes a page.
"""

project = "Taskbone"
root_doc = "docs/index"
extensions = ["myst_parser"]

include_patterns = [
    "docs/**.md",
    "deploy/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
# What is not looked into: what tools have made, and the code.
exclude_patterns = [
    ".*",
    "benchmarks",
    "build",
    "dist",
    "examples",
    "localization",
    "model_store",
    "results",
    "runs",
    "serving",
    "site",
    "tests",
]

# Links to headings work as they do where the repository is shown.
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]
nitpicky = True

html_theme = "furo"
html_title = "Taskbone"
html_static_path = ["assets"]
html_css_files = ["wide.css"]
html_extra_path = ["top"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
