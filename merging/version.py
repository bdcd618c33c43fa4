"""The version of the package, which its build reads here too."""

__all__ = ["__version__"]

__version__ = "0.1.0"
