"""The manager as a model of Triton's Python backend: it converts tensors, and nothing else.

Only Triton's Python process can import this module, since ``triton_python_backend_utils`` exists
only there.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from cidalloc import protocol
from cidalloc.codes import Code
from cidalloc.errors import CidError, InvalidArgument
from cidalloc.manager.service import Service
from cidalloc.manager.takeover import WAITING_POLL_S, server_pid
from cidalloc.triton_model._parent_watch import end_with_parent
from cidalloc.triton_model.config import settings_from
from cidalloc.triton_model.log import log_to
from cidalloc.triton_model.metrics import Metrics

_log = logging.getLogger("cidalloc.triton_model")


class TritonPythonModel:
    """The class that Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load: read the settings from the model's configuration."""
        config = json.loads(args["model_config"])
        _check_numpy()
        if hasattr(pb_utils, "Logger"):
            log_to(pb_utils.Logger)
        # Otherwise, after the server is killed, it could keep the registry from the next process.
        end_with_parent(server_pid())
        self._service = Service(settings_from(config), name=args["model_name"])
        self._service.start()
        self._look_at = 0.0
        self._metrics: Metrics | None = None
        if hasattr(pb_utils, "MetricFamily"):
            self._metrics = Metrics(
                self._service.figures, args["model_name"], pb_utils.MetricFamily
            )
            self._metrics.start()
        self._detail = "", _detail("")  # shared by answers, since making a text tensor is slow
        # The HTTP and gRPC status that Triton reports for each code. The backend adds TritonError
        # to pb_utils only after this module is imported.
        kinds = pb_utils.TritonError
        self._status = {
            Code.EXHAUSTED: kinds.UNAVAILABLE,
            Code.NOT_HELD: kinds.NOT_FOUND,
            Code.SESSION_UNKNOWN: kinds.NOT_FOUND,
            Code.UNKNOWN_OPERATION: kinds.UNSUPPORTED,
            Code.UNAVAILABLE: kinds.UNAVAILABLE,
            Code.REGISTRY_LOCKED: kinds.UNAVAILABLE,
            Code.DRAINING: kinds.UNAVAILABLE,
            Code.INTERNAL: kinds.INTERNAL,
        }

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request of a batch."""
        now = time.monotonic()
        if now >= self._look_at:  # a poll costs as much as a request
            self._look_at = now + WAITING_POLL_S
            try:
                self._service.poll()
            except Exception:
                _log.exception("could not poll the registry")
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Unload: leave the registry to a newer process. Triton does not always call this."""
        self._service.close()
        if self._metrics is not None:
            self._metrics.close()

    def _respond(self, request: Any) -> Any:
        try:
            code = pb_utils.get_input_tensor_by_name(request, protocol.CODE).as_numpy()
            ids = pb_utils.get_input_tensor_by_name(request, protocol.CORRELATION_ID)
            array = None if ids is None else ids.as_numpy()
            parameters = request.parameters()
        except Exception as error:
            # An exception would fail the whole batch. For example, the text is not UTF-8.
            answer: Any = InvalidArgument(f"the request cannot be read: {type(error).__name__}")
        else:
            answer = self._service.answer(code, array, parameters)
        if isinstance(answer, CidError):
            status = self._status.get(answer.code, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(protocol.error_text(answer), status)
            )
        output, text = answer
        if text != self._detail[0]:
            self._detail = text, _detail(text)
        tensor = pb_utils.Tensor(protocol.OUTPUT, output)
        return pb_utils.InferenceResponse([tensor, self._detail[1]])


def _detail(text: str) -> Any:
    return pb_utils.Tensor(protocol.DETAIL, np.array([[text.encode()]], np.object_))


def _check_numpy() -> None:
    """Raise an error if the backend cannot read numpy's arrays.

    Triton's backend up to 2.51 was built for numpy 1. With numpy 2 it sends outputs without bytes,
    with status 200. A tensor that the backend converts to an array shows the fault as well.
    """
    sent = np.array([[1, 2**63]], np.uint64)
    lent = pb_utils.Tensor(protocol.OUTPUT, sent)
    got = pb_utils.Tensor.from_dlpack(protocol.OUTPUT, lent.to_dlpack()).as_numpy()
    if got.tolist() != sent.tolist():
        raise RuntimeError(
            f"Triton's Python backend cannot use numpy {np.__version__}: install 'numpy<2' for its"
            " Python"
        )
