"""The conformance kit: judges a client of the manager, in any language, under faults.

`docs/conformance.md` describes it for authors of clients.
"""
