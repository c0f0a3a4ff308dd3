"""``python -m ovsprune`` is the command ``ovsprune``."""

from ovsprune.cli.main import main

main()
