"""``python -m merging`` is the command ``merge``."""

from merging.cli.main import main

main()
