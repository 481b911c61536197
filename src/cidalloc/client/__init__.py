"""The client: correlation IDs from the manager on a Triton server, and sequences that use them."""

from ..errors import *  # noqa: F403 all of them, for who catches them
from ..errors import __all__ as _errors
from ._aio_client import AsyncClient
from ._aio_sequence import AsyncSequence
from ._client import Client
from ._sequence import Sequence

__all__ = ["AsyncClient", "AsyncSequence", "Client", "Sequence", *_errors]
