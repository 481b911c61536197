"""The correlation ID manager. Its code is the package cidalloc, which this Python must have."""

from cidalloc.triton_model.adapter import TritonPythonModel

__all__ = ["TritonPythonModel"]
