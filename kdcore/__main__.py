"""``python -m kdcore``."""

from .cli import main

main()
