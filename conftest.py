"""Leaves the doctests of modules aside whose library is not installed: mteb is not there on Python 3.10."""

from importlib.util import find_spec

collect_ignore = [
    f"lightning_mmembed/integrations/{library}.py"
    for library in ("mteb", "sentence_transformers")
    if find_spec(library) is None
]
