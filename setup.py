"""Lists the packages; everything else is in pyproject.toml.

The top-level folder ``conf/`` is shipped as the package ``lightning_mmembed.conf``. pyproject.toml can either find
packages or rename a folder, not both, so the list is made here, and no new subpackage can be forgotten.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        # Namespace packages too: a folder that lacks its __init__.py would otherwise be left out without a word.
        *find_namespace_packages(include=["lightning_mmembed", "lightning_mmembed.*"], exclude=["*.__pycache__"]),
        "lightning_mmembed.conf",
        "hydra_plugins",  # shared with other Hydra plugins, so without an __init__.py
    ],
    package_dir={"lightning_mmembed.conf": "conf"},
)
