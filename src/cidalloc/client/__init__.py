"""The client: correlation IDs from the manager on a Triton server, and sequences that use them."""

from ..errors import *  # noqa: F403 for callers that catch them
from ..errors import __all__ as _errors
from .asyncio.client import AsyncClient
from .asyncio.fleet import AsyncFleet
from .asyncio.sequence import AsyncSequence
from .core.fleet import FleetServer
from .sync.client import Client
from .sync.fleet import Fleet
from .sync.sequence import Sequence

__all__ = [
    "AsyncClient",
    "AsyncFleet",
    "AsyncSequence",
    "Client",
    "Fleet",
    "FleetServer",
    "Sequence",
    *_errors,
]
