"""A gRPC server with Triton's service, which notes what its clients cancel."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from cidalloc import protocol
from cidalloc.errors import CidError
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A manager, and a model that answers everything; both take their time.

    Attributes:
        delay_s: so many seconds each request takes.
        cancelled: how many requests ended because their client gave them up.
        answered: how many ended with an answer.
        begun: how many have arrived.
        inferences: how many of those were for the model, and not for the manager.
    """

    def __init__(self, settings: Settings, *options: tuple[str, int]) -> None:
        self.delay_s = 0.0
        self.begun = self.cancelled = self.answered = self.inferences = 0
        self.service = Service(settings)
        self._go = threading.Condition()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(64)
        self._server = grpc.server(self._pool, options=options)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()

    def __enter__(self) -> FakeTriton:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        if request.model_name != protocol.MODEL:
            self._note("inferences")
        over = self._begin(context)
        try:
            return (
                self._manage(request, context)
                if request.model_name == protocol.MODEL
                else _echo(request)
            )
        finally:
            self._end(over)

    def ModelStreamInfer(self, requests: Any, context: Any) -> Any:
        for request in requests:
            self._note("begun")
            self._note("inferences")
            self._wait()
            self._note("answered")
            yield service_pb2.ModelStreamInferResponse(infer_response=_echo(request))

    def ModelConfig(self, request: Any, context: Any) -> Any:
        self._end(self._begin(context))
        config = model_config_pb2.ModelConfig(name=request.name)
        config.sequence_batching.max_sequence_idle_microseconds = 60_000_000
        return service_pb2.ModelConfigResponse(config=config)

    def _begin(self, context: Any) -> threading.Event:
        over = threading.Event()
        self._note("begun")
        # Called when the request is over, however it ends.
        context.add_callback(lambda: None if over.is_set() else self._note("cancelled"))
        self._wait()
        return over

    def answer_now(self) -> None:
        """End the delay of the requests that are here."""
        with self._go:
            self._go.notify_all()

    def _wait(self) -> None:
        if self.delay_s:
            with self._go:
                self._go.wait(self.delay_s)

    def _end(self, over: threading.Event) -> None:
        over.set()
        self._note("answered")

    def _note(self, what: str) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)

    def _manage(self, request: Any, context: Any) -> Any:
        code, ids = request.raw_input_contents
        read = {
            name: getattr(p, p.WhichOneof("parameter_choice"))
            for name, p in request.parameters.items()
        }
        answer = self.service.answer(
            np.frombuffer(code, np.int8).reshape(1, 1),
            np.frombuffer(ids, np.uint64).reshape(1, -1),
            json.dumps(read),
        )
        if isinstance(answer, CidError):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, protocol.error_text(answer))
        output, _ = answer
        return _response(request, protocol.OUTPUT, "UINT64", output)


def _echo(request: Any) -> Any:
    return _response(request, "OUTPUT", "INT32", np.array([[1]], np.int32))


def _response(request: Any, name: str, kind: str, array: Any) -> Any:
    found = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
    found.outputs.add(name=name, datatype=kind, shape=array.shape)
    found.raw_output_contents.append(array.tobytes())
    return found
