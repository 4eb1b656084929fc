"""Everything about the package is in pyproject.toml; this file will build the compiled loss op.

Until it exists, kdcore is pure Python and its losses run on the plain-torch reference, which it says here.
"""

import sys

from setuptools import setup

print("kdcore: pure-Python install; losses run on the torch reference", file=sys.stderr)
setup()
