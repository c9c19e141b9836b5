"""The offline demo: a small teacher, a recipe, and the source of Python's standard library as data."""
