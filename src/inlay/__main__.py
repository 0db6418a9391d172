"""`python -m inlay`."""

from inlay.cli.main import run

run()
