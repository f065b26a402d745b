"""A Cloud Vision server on loopback: the real protocol, one method, scripted answers.

    with VisionEmulator() as vision:
        monkeypatch.setenv("LOUPE_VISION_ENDPOINT", vision.endpoint)
        monkeypatch.setenv("LOUPE_VISION_INSECURE", "true")

Faults: `throttle`, `unavailable`, `server_error` (INTERNAL), `hang`, `garbage` (bytes that are no
reply), `image_rejected` (the call fails), `inner_error` (the call succeeds, its image fails),
`credentials`, `empty` (no responses), `double` (two), `oversized` (more than a client should
take). Besides, the name of any gRPC status ("ABORTED"), and "inner:CODE" for any error inside an
OK reply ("inner:14").
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
import pyvips
from google.cloud.vision_v1 import (
    AnnotateImageRequest,
    AnnotateImageResponse,
    BatchAnnotateImagesRequest,
    BatchAnnotateImagesResponse,
    EntityAnnotation,
    Feature,
)
from google.protobuf.any_pb2 import Any as AnyMessage  # type: ignore[import-untyped]
from google.protobuf.duration_pb2 import Duration  # type: ignore[import-untyped]
from google.rpc.code_pb2 import Code  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from tests.emulators.script import Call, Script

# Of a request as JSON, where bytes are base64.
MAX_REQUEST_BYTES = 10 * 1024 * 1024
MAX_IMAGES = 16
DEFAULT_MAX_RESULTS = 10
OVERSIZED_BYTES = 8 * 1024 * 1024
THREADS = 64

_STATUSES = {
    "throttle": ("RESOURCE_EXHAUSTED", "Quota exceeded for quota metric 'Requests'."),
    "unavailable": ("UNAVAILABLE", "The service is currently unavailable."),
    "server_error": ("INTERNAL", "Internal server error."),
    "image_rejected": ("INVALID_ARGUMENT", "Request must specify image and features."),
    "credentials": ("UNAUTHENTICATED", "Request had invalid authentication credentials."),
}
_REPLIES = frozenset({"hang", "garbage", "inner_error", "empty", "double", "oversized"})


class VisionEmulator(Script):
    """Listens between `with` and its end, on `port` or one that is free."""

    def __init__(self, *, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        super().__init__()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="vision-emulator")
        self._server = grpc.server(
            self._threads,
            handlers=[self._handler()],
            options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
        )
        address = f"127.0.0.1:{port}"
        self.port = (
            self._server.add_secure_port(address, credentials)
            if credentials
            else self._server.add_insecure_port(address)
        )
        self.endpoint = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._end()
        self._server.stop(grace=None).wait()
        self._threads.shutdown()

    def _handler(self) -> Any:
        method = grpc.unary_unary_rpc_method_handler(
            self._annotate,
            request_deserializer=BatchAnnotateImagesRequest.deserialize,
            response_serializer=bytes,
        )
        return grpc.method_handlers_generic_handler(
            "google.cloud.vision.v1.ImageAnnotator", {"BatchAnnotateImages": method}
        )

    def _annotate(
        self, request: BatchAnnotateImagesRequest, context: grpc.ServicerContext
    ) -> bytes:
        with self._received(_call_of(request, context)) as fault:
            self._await_turn(fault, lambda: not context.is_active())
            if status := self._status_for(fault, request):
                context.abort_with_status(rpc_status.to_status(status))
            return self._reply_to(request, fault)

    def _status_for(self, fault: str | None, request: BatchAnnotateImagesRequest) -> Any:
        if fault in _STATUSES:
            return self._status(*_STATUSES[fault])
        if fault is not None and fault in Code.keys():  # noqa: SIM118
            return self._status(fault, "As the test wished.")
        if fault is not None and fault not in _REPLIES and not fault.startswith("inner:"):
            raise ValueError(f"no such fault: {fault}")
        if problem := _problem_with(request):
            return self._status("INVALID_ARGUMENT", problem)
        return None

    def _status(self, code: str, message: str) -> Any:
        status = Status(code=Code.Value(code), message=message)
        if self.retry_after is not None:
            delay = Duration()
            delay.FromNanoseconds(round(self.retry_after * 1e9))
            packed = AnyMessage()
            packed.Pack(RetryInfo(retry_delay=delay))
            status.details.append(packed)
        return status

    def _reply_to(self, request: BatchAnnotateImagesRequest, fault: str | None) -> bytes:
        if fault == "garbage":
            return b"\xff\xff\xff\xff not a message"
        if fault == "oversized":
            return b"\x00" * OVERSIZED_BYTES
        if self.reply is not None:
            return self.reply
        responses = [self._response_to(one, fault) for one in request.requests]
        copies = {"empty": 0, "double": 2}.get(fault or "", 1)
        return bytes(
            BatchAnnotateImagesResponse.serialize(
                BatchAnnotateImagesResponse(responses=responses * copies)
            )
        )

    def _response_to(self, request: AnnotateImageRequest, fault: str | None) -> Any:
        if fault is not None and fault.startswith("inner:"):
            error = self._status(Code.Name(int(fault.removeprefix("inner:"))), "As wished.")
            return AnnotateImageResponse(error=error)
        if fault == "inner_error" or not _is_readable(request.image.content):
            return AnnotateImageResponse(error=self._status("INVALID_ARGUMENT", "Bad image data."))
        best_first = sorted(self.labels_of(request.image.content), key=lambda label: -label[1])
        annotations = [
            EntityAnnotation(mid=f"/m/{number}", description=name, score=score, topicality=score)
            for number, (name, percent) in enumerate(best_first[: _max_results(request)])
            for score in [percent / 100]
        ]
        return AnnotateImageResponse(label_annotations=annotations)


def _call_of(request: BatchAnnotateImagesRequest, context: grpc.ServicerContext) -> Call:
    first = request.requests[0] if request.requests else AnnotateImageRequest()
    parameters: dict[str, object] = {
        "features": [(feature.type_.name, feature.max_results) for feature in first.features],
        "timeout_seconds": context.time_remaining(),
        "metadata": dict(context.invocation_metadata()),
    }
    return Call(time.monotonic(), first.image.content, parameters)


def _problem_with(request: BatchAnnotateImagesRequest) -> str | None:
    if len(BatchAnnotateImagesRequest.serialize(request)) * 4 / 3 > MAX_REQUEST_BYTES:
        return f"Request payload size exceeds the limit: {MAX_REQUEST_BYTES} bytes."
    if len(request.requests) > MAX_IMAGES:
        return "Too many images per request."
    if not request.requests or not all(one.image.content for one in request.requests):
        return "Request must specify image and features."
    if not all(_max_results(one) for one in request.requests):
        return "Request must specify image and features."
    return None


def _max_results(request: AnnotateImageRequest) -> int:
    """Of the label feature. 0 where the request has none."""
    for feature in request.features:
        if feature.type_ == Feature.Type.LABEL_DETECTION:
            return feature.max_results or DEFAULT_MAX_RESULTS
    return 0


def _is_readable(content: bytes) -> bool:
    try:
        pyvips.Image.new_from_buffer(content, "").avg()
    except pyvips.Error:
        return False
    return True
