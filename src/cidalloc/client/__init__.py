"""The client: correlation IDs from the manager on a Triton server, and sequences that use them."""

from ._client import Client
from ._sequence import Sequence

__all__ = ["Client", "Sequence"]
