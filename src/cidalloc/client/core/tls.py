"""TLS over HTTP, by the options of tritonclient's blocking client."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidArgument

__all__ = ["tls_context"]


def tls_context(options: Mapping[str, Any]) -> ssl.SSLContext:
    """Return the TLS context for the options of tritonclient."""
    factory = options["ssl_context_factory"] or ssl.create_default_context
    more = dict(options["ssl_options"] or {})
    try:
        context: ssl.SSLContext = factory()
        if more.get("ca_certs"):
            context.load_verify_locations(more["ca_certs"])
        if more.get("certfile"):
            context.load_cert_chain(more["certfile"], more.get("keyfile"))
        if more.get("ciphers"):
            context.set_ciphers(more["ciphers"])
    except (OSError, ValueError, TypeError) as error:
        raise InvalidArgument(f"TLS: {error}") from None
    if options["insecure"]:
        context.check_hostname = False
    if more.get("cert_reqs") is not None:
        context.check_hostname = context.check_hostname and more["cert_reqs"] != ssl.CERT_NONE
        context.verify_mode = more["cert_reqs"]
    return context
