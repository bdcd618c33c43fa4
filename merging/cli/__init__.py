"""The command line, whose files are in the folder cli/ of a checkout; an installed package has them here."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "cli")]
