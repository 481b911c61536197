"""A Triton server on loopback, for development, tests and the demo."""
