"""Finds the files that travel with the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of the YAML configs: inside the package in a wheel, beside it in a checkout."""
    shipped = PACKAGE / "configs"
    return shipped if shipped.is_dir() else PACKAGE.parent / "configs"
