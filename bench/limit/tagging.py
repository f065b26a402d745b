"""The limit of an upload with both extensions: the same provider copy, the same two calls.

POST /upload takes a raw body; nothing is stored, limited, retried or recorded. The vendors are
where VISION_ENDPOINT and AWS_ENDPOINT_URL_REKOGNITION say.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import boto3
import grpc
import orjson
import pyvips
from botocore.config import Config
from google.auth.credentials import AnonymousCredentials
from google.cloud.vision_v1 import (
    AnnotateImageRequest,
    BatchAnnotateImagesRequest,
    BatchAnnotateImagesResponse,
    Feature,
    Image,
    ImageAnnotatorAsyncClient,
)
from google.cloud.vision_v1.services.image_annotator.transports import (
    ImageAnnotatorGrpcAsyncIOTransport,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

CALLS_AT_ONCE = 16
DECODERS = 2
MAX_LABELS = 1_000

threads = ThreadPoolExecutor(CALLS_AT_ONCE)
rekognition = boto3.client("rekognition", config=Config(max_pool_connections=CALLS_AT_ONCE))


def _provider_copy(picture: bytes) -> bytes:
    image = pyvips.Image.thumbnail_buffer(
        picture, 1024, height=1024, size="down", output_profile="srgb"
    )
    return bytes(image.jpegsave_buffer(Q=88, keep="none"))


def _ask_rekognition(jpeg: bytes) -> list[list[Any]]:
    reply = rekognition.detect_labels(Image={"Bytes": jpeg}, MaxLabels=MAX_LABELS, MinConfidence=0)
    return [[label["Name"], label["Confidence"]] for label in reply["Labels"]]


async def _ask_vision(client: ImageAnnotatorAsyncClient, jpeg: bytes) -> list[list[Any]]:
    labels = Feature(type_=Feature.Type.LABEL_DETECTION, max_results=MAX_LABELS)
    one = AnnotateImageRequest(image=Image(content=jpeg), features=[labels])
    reply = await client.batch_annotate_images(
        request=BatchAnnotateImagesRequest(requests=[one]), retry=None
    )
    [response] = BatchAnnotateImagesResponse.pb(reply).responses
    return [[label.description, label.score * 100] for label in response.label_annotations]


@asynccontextmanager
async def _open(app: Starlette) -> AsyncIterator[None]:
    channel = grpc.aio.insecure_channel(os.environ["VISION_ENDPOINT"])
    app.state.vision = ImageAnnotatorAsyncClient(
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
        transport=partial(ImageAnnotatorGrpcAsyncIOTransport, channel=channel),
    )
    with ProcessPoolExecutor(DECODERS, mp_context=get_context("spawn")) as decoders:
        app.state.decoders = decoders
        # Its processes import this module first, which is not to be measured.
        await asyncio.wrap_future(decoders.submit(pyvips.version, 0))
        yield
    await channel.close()


async def upload(request: Request) -> Response:
    loop = asyncio.get_running_loop()
    state = request.app.state
    jpeg = await loop.run_in_executor(state.decoders, _provider_copy, await request.body())
    from_vision, from_rekognition = await asyncio.gather(
        _ask_vision(state.vision, jpeg), loop.run_in_executor(threads, _ask_rekognition, jpeg)
    )
    content = orjson.dumps({"google": from_vision, "aws": from_rekognition})
    return Response(content, media_type="application/json")


app = Starlette(routes=[Route("/upload", upload, methods=["POST"])], lifespan=_open)
