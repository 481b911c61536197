"""Correlation IDs that no two live sequences share.

This package alone is the standalone allocator; it loads neither Triton nor tritonclient.
`cidalloc.client` talks to a manager on a Triton server, and the ``cidalloc`` command does both.
"""

from importlib.metadata import version as _version

from ._alloc import Allocator
from .codes import Code
from .errors import CidError

__all__ = ["Allocator", "CidError", "Code", "__version__"]

__version__ = _version("cidalloc")
