"""The manager as a Triton model: write its folder, read its settings, serve its requests."""

from .config import export, settings_from

__all__ = ["export", "settings_from"]
