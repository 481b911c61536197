"""The client: correlation IDs from the manager on a Triton server, and sequences that use them."""

from ._aio_client import AsyncClient
from ._aio_sequence import AsyncSequence
from ._client import Client
from ._sequence import Sequence

__all__ = ["AsyncClient", "AsyncSequence", "Client", "Sequence"]
