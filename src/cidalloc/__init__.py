"""Correlation IDs that no two live sequences share.

This package alone is the standalone allocator; it loads neither Triton nor tritonclient.
`cidalloc.client` talks to a manager on a Triton server, and the ``cidalloc`` command does both.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .codes import Code
from .errors import CidError

if _TYPE_CHECKING:
    from ._alloc import Allocator

__all__ = ["Allocator", "CidError", "Code", "__version__"]

__version__ = _version("cidalloc")

_NOT_COMPILED = (
    "this cidalloc has no compiled modules for this Python, which the allocator and the manager"
    " need: install a wheel for this Python, or compile it with"
    " pip install --no-binary cidalloc cidalloc"
)


# The client needs no compiled module, so a pure install can import it.
def __getattr__(name: str) -> _Any:
    if name != "Allocator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ._alloc import Allocator
    except ModuleNotFoundError as error:
        raise ImportError(_NOT_COMPILED) from error
    globals()[name] = Allocator
    return Allocator
