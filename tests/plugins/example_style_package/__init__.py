"""What a Python package with a style looks like.

Its pyproject.toml announces the package, and takes the style's files along:

    [project.entry-points."cinecat.styles"]
    grain = "example_style_package"

    [tool.setuptools.package-data]
    example_style_package = ["style.toml", "*.safetensors", "*.png"]

Nothing in it is run: cinecat reads style.toml, which may lie here or, for several styles, in a folder of each.
"""

raise AssertionError("a style package is data; it is not imported")
