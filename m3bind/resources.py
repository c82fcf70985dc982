"""Finds the files that travel with the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of the shipped YAML configs: in a wheel inside the package, in a checkout beside it."""
    shipped = PACKAGE / "configs"
    return shipped if shipped.is_dir() else PACKAGE.parent / "configs"
