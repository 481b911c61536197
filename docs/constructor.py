"""For the API reference: the arguments of Cython's constructors, which only the stub has."""

from typing import Any

from griffe import Extension, Module, visit


class Constructor(Extension):
    """Shows the `__new__` of a stub as `__init__`, which the reference looks for."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Change the classes of the extension module."""
        path = pkg.filepath.parent / "_alloc.pyi"
        stub = visit("_alloc", filepath=path, code=path.read_text(), parent=pkg)
        for name, each in stub.classes.items():
            if "__new__" in each.members:
                pkg["_alloc"][name].set_member("__init__", each["__new__"])
