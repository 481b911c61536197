"""Results of requests: tritonclient's, and outputs by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

__all__ = ["Result", "has_outputs", "version_of"]


class Result:
    """A result: tritonclient's ``InferResult`` for the protocol, and `__getitem__`."""

    if TYPE_CHECKING:  # tritonclient's methods, which it does not annotate

        def as_numpy(self, name: str) -> Any:
            """Return an output as an array; None if there is no such output."""

        def get_output(self, name: str) -> Any:
            """Return the description of an output."""

        def get_response(self) -> Any:
            """Return the whole response: a message over gRPC, a dict over HTTP."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an output as an array.

        Raises:
            KeyError: the model did not answer with this output.
        """
        array: NDArray[Any] | None = self.as_numpy(name)
        if array is None:
            names = ", ".join(
                each["name"] if isinstance(each, dict) else each.name for each in _outputs(self)
            )
            raise KeyError(f"no output {name!r}: the model answered with {names or 'none'}")
        return array


def has_outputs(result: Any) -> bool:
    """Return whether a result has outputs; the last one of many may have none."""
    return bool(_outputs(result))


def version_of(result: Any) -> str:
    """Return the version of the model that has answered, or "" if the answer has none."""
    response = result.get_response()
    if isinstance(response, dict):
        return str(response.get("model_version", ""))
    return str(getattr(response, "model_version", ""))


def _outputs(result: Any) -> Any:
    response = result.get_response()
    return response.get("outputs", ()) if isinstance(response, dict) else response.outputs
