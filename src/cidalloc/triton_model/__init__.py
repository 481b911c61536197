"""The manager as a Triton model: write its folder, read its settings, serve its requests."""

from .config import default_state_folder, export, settings_from

__all__ = ["default_state_folder", "export", "settings_from"]
