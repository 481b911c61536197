"""The door of the ``cidalloc`` command, which needs more than the allocator alone."""

import sys

from . import _NOT_COMPILED


def main() -> None:
    """Run the ``cidalloc`` command."""
    try:
        from .cli import run

        run()
    except ModuleNotFoundError as error:
        if error.name == "cidalloc._alloc":
            sys.exit(f"error: UNAVAILABLE: {_NOT_COMPILED}")
        if error.name is None or error.name.startswith("cidalloc"):
            raise
        sys.exit(
            f"error: UNAVAILABLE: {error.name} is missing: the cidalloc command needs"
            " pip install 'cidalloc[client]'"
        )


if __name__ == "__main__":
    main()
