"""An idle process with the libraries that Loupe imports and the clients that it makes.

Prints `ready` and waits for the end of its input. What Loupe takes beyond this is its own.
"""

import asyncio
import sys
from functools import partial

import alembic.command
import alembic.script
import anyio.to_process
import boto3
import cachetools
import fastapi
import google.auth.transport.grpc
import google.auth.transport.requests
import google.rpc.error_details_pb2  # type: ignore[import-untyped]
import grpc
import httpcore
import httpx
import jwt
import multipart
import orjson
import prometheus_client
import psycopg
import puremagic
import pydantic_settings
import pyvips
import sqlalchemy
import sqlalchemy.dialects.postgresql
import starlette.middleware.cors
import structlog
import uvicorn.protocols.http.httptools_impl
import uvloop
from google.auth.credentials import AnonymousCredentials
from google.cloud.vision_v1 import ImageAnnotatorAsyncClient
from google.cloud.vision_v1.services.image_annotator.transports import (
    ImageAnnotatorGrpcAsyncIOTransport,
)

IMPORTED = (
    alembic.command,
    alembic.script,
    anyio.to_process,
    cachetools,
    google.auth.transport.grpc,
    google.auth.transport.requests,
    google.rpc.error_details_pb2,
    httpcore,
    jwt,
    multipart,
    orjson,
    prometheus_client,
    psycopg,
    puremagic,
    pydantic_settings,
    pyvips,
    sqlalchemy.dialects.postgresql,
    starlette.middleware.cors,
    structlog,
    uvicorn.protocols.http.httptools_impl,
)


async def idle(vision_endpoint: str, database_url: str) -> None:
    channel = grpc.aio.insecure_channel(vision_endpoint)
    clients = [
        fastapi.FastAPI(),
        boto3.client("rekognition"),
        ImageAnnotatorAsyncClient(
            credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
            transport=partial(ImageAnnotatorGrpcAsyncIOTransport, channel=channel),
        ),
        httpx.AsyncClient(),
        *(sqlalchemy.create_engine(database_url).connect() for _ in range(3)),
    ]
    print("ready", len(clients) + len(IMPORTED), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await channel.close()


if __name__ == "__main__":
    uvloop.run(idle(*sys.argv[1:]))
