"""The correlation ID manager. Its code is the package cidalloc, which must be installed here."""

import sys
from pathlib import Path

try:
    from cidalloc.triton_model.adapter import TritonPythonModel
except ModuleNotFoundError as error:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    copy = Path(__file__).with_name("cidalloc")
    tags = [each.name.split("cpython-")[-1].split("-")[0] for each in copy.glob("_alloc.*.so")]
    if not copy.is_dir():
        words = (
            f"the Python {here} of this server does not have cidalloc: install it there, or put a"
            f" copy beside the model with 'cidalloc model -o --vendor --python {here} DIR'"
        )
    elif f"{sys.version_info[0]}{sys.version_info[1]}" not in tags:
        built = ", ".join(f"{tag[0]}.{tag[1:]}" for tag in tags)
        words = (
            f"the copy of cidalloc beside this model is for Python {built}, but this server has"
            f" {here}: run 'cidalloc model -o --vendor --python {here} DIR'"
        )
    else:
        raise
    raise ImportError(f"{words} ({error})") from None

__all__ = ["TritonPythonModel"]
