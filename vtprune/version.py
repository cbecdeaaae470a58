"""The version of the package, for whoever needs it before anything else is imported."""

__version__ = "0.1.0"
