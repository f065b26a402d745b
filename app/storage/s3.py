"""Blobs as objects in an S3 bucket: `<prefix>/<last two digits>/<key>`, as on a local disk.

boto3 in threads of its own; credentials, region and endpoint come from its own environment.
Sources: Amazon S3 API reference; "Checking object integrity" in the Amazon S3 user guide.
"""

import asyncio
import base64
import contextlib
import hashlib
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from app.ids import is_id, new_id
from app.storage.base import (
    BlobMissing,
    StorageUnavailable,
    StoredBlob,
    system_errors_as_unavailable,
)
from app.storage.blocks import BlockFile
from app.storage.disk import StagingDirectory, try_to_write

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

T = TypeVar("T")

log = structlog.get_logger(__name__)

THREADS = 32
CONNECT_SECONDS = 3.0
READ_SECONDS = 15.0
ATTEMPTS = 3
SINGLE_PUT_BYTES = 16 * 1024 * 1024
PART_BYTES = 8 * 1024 * 1024
MAX_PARTS = 10_000
_PIECE_BYTES = 256 * 1024
# Besides botocore's own: what its parsers raise, and what we do, on replies of another shape.
_FAILURES = (BotoCoreError, HTTPError, ResponseParserError, OSError, LookupError)
_DENIED = frozenset(
    {
        "401",
        "403",
        "AccessDenied",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
    }
)


class S3Storage:
    """prefix: what all keys begin with, without a slash at its ends; may be empty."""

    name = "s3"

    _client: "S3Client"

    def __init__(
        self,
        bucket: str,
        prefix: str,
        staging_dir: Path,
        *,
        page_keys: int = 1000,
        check_seconds: float = 5.0,
    ) -> None:
        self._staging = StagingDirectory(staging_dir)
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._page_keys = page_keys
        self._check_seconds = check_seconds
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=self.name)
        self._is_open = False

    @property
    def staging_dir(self) -> Path:
        return self._staging.path

    async def open(self) -> None:
        with system_errors_as_unavailable(f"cannot stage files in {self.staging_dir}"):
            await asyncio.to_thread(self._staging.open)
        await self._call(self._make_client)
        await self.check()

    async def put(self, staged: BlockFile, key: str) -> None:
        await self._call(self._put, staged, self._object(key))

    async def read(self, key: str, start: int, end: int) -> AsyncGenerator[bytes]:
        body = await self._call(self._get, self._object(key), f"bytes={start}-{end - 1}")
        try:
            remaining = end - start
            while remaining > 0:
                piece = await self._call(body.read, min(_PIECE_BYTES, remaining))
                if not piece:
                    raise BlobMissing(f"{key} is shorter than recorded")
                remaining -= len(piece)
                yield piece
        finally:
            self._hang_up(body)

    def _hang_up(self, body: Any) -> None:
        """In a thread, not awaited: it waits for a read that the reader may have left behind."""
        try:
            self._threads.submit(body.close)
        except RuntimeError:  # the threads have been shut down: no read is under way
            body.close()

    @asynccontextmanager
    async def local_copy(self, key: str) -> AsyncIterator[Path]:
        path = self.staging_dir / new_id()
        with system_errors_as_unavailable("cannot stage a file"):
            path.touch(exist_ok=False)
        try:
            await self._call(self._download, self._object(key), path)
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink()

    async def delete(self, key: str) -> None:
        await self._call(
            lambda: self._client.delete_object(Bucket=self._bucket, Key=self._object(key))
        )

    async def list_blobs(self) -> AsyncGenerator[list[StoredBlob]]:
        token: str | None = None
        while True:
            page, token = await self._call(self._list, token)
            if page:
                yield page
            if token is None:
                return

    async def remove_unfinished(self, before: datetime) -> None:
        """Also the uploads in parts whose process died: they are billed, and no list shows them."""
        with system_errors_as_unavailable("cannot remove staged files"):
            await asyncio.to_thread(self._staging.remove_dead)
            await asyncio.to_thread(self._staging.remove_older, before)
        await self._call(self._abort_older, before)

    async def claim(self, owner: str) -> str:
        return await self._call(self._claim, owner)

    async def check(self) -> None:
        with system_errors_as_unavailable("cannot write to the disk"):
            await asyncio.to_thread(try_to_write, self.staging_dir)
        try:
            async with asyncio.timeout(self._check_seconds):
                await self._call(lambda: self._client.head_bucket(Bucket=self._bucket))
        except TimeoutError:
            raise StorageUnavailable("S3 did not answer in time") from None

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._staging.close)
        if self._is_open:
            self._client.close()

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs it in a thread. Raises BlobMissing, StorageUnavailable."""

        def run() -> T:
            with self._failures_translated():
                return function(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    @contextmanager
    def _failures_translated(self) -> Iterator[None]:
        try:
            yield
        except StorageUnavailable:
            raise
        except ClientError as error:
            raise StorageUnavailable(self._sentence(error)) from error
        except _FAILURES as error:
            raise StorageUnavailable(f"S3 cannot be used now: {error}") from error

    def _sentence(self, error: ClientError) -> str:
        code = _code(error)
        if code in _DENIED:
            return f"S3 does not let these credentials use the bucket {self._bucket}: {code}"
        if code == "NoSuchBucket" or (error.operation_name == "HeadBucket" and code == "404"):
            return f"the bucket {self._bucket} does not exist"
        return f"S3 refused {error.operation_name}: {code}"

    def _object(self, key: str) -> str:
        return f"{self._prefix}{key[-2:]}/{key}"

    def _key(self, name: str) -> str | None:
        """The key of the blob in an object of this name; None if the object is none of ours."""
        key = name.rpartition("/")[2]
        return key if is_id(key) and self._object(key) == name else None

    # In a thread

    def _make_client(self) -> None:
        config = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_pool_connections=THREADS,
            retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        )
        # With an endpoint of its own, botocore puts the bucket into the path.
        try:
            self._client = boto3.Session().client("s3", config=config)
        except ValueError as error:
            raise StorageUnavailable(f"S3 is not configured: {error}") from error
        self._is_open = True

    def _put(self, staged: BlockFile, name: str) -> None:
        staged.complete()
        staged.close()
        with staged.path.open("rb") as file:
            size_bytes = staged.path.stat().st_size
            if size_bytes <= SINGLE_PUT_BYTES:
                self._put_whole(file, name)
            else:
                self._put_in_parts(file, size_bytes, name)
        staged.discard()

    def _put_whole(self, file: BufferedReader | BytesIO, name: str) -> None:
        """S3 compares the checksum with what has arrived, before it answers."""
        checksum = base64.b64encode(hashlib.file_digest(file, "sha256").digest()).decode()
        file.seek(0)
        self._client.put_object(Bucket=self._bucket, Key=name, Body=file, ChecksumSHA256=checksum)

    def _put_in_parts(self, file: BufferedReader, size_bytes: int, name: str) -> None:
        upload_id = self._client.create_multipart_upload(
            Bucket=self._bucket, Key=name, ChecksumAlgorithm="SHA256"
        )["UploadId"]
        try:
            part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))
            parts: list[Any] = []
            while content := file.read(part_bytes):
                parts.append(self._put_part(content, len(parts) + 1, name, upload_id))
            self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=name,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except BaseException:
            self._abort(name, upload_id)
            raise

    def _put_part(self, content: bytes, number: int, name: str, upload_id: str) -> Any:
        checksum = base64.b64encode(hashlib.sha256(content).digest()).decode()
        reply = self._client.upload_part(
            Bucket=self._bucket,
            Key=name,
            UploadId=upload_id,
            PartNumber=number,
            Body=content,
            ChecksumSHA256=checksum,
        )
        return {"PartNumber": number, "ETag": reply["ETag"], "ChecksumSHA256": checksum}

    def _abort(self, name: str, upload_id: str) -> None:
        """Failing that, `remove_unfinished` does it."""
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)
        except (ClientError, *_FAILURES) as error:
            log.warning("cannot abort an upload in parts", object=name, exc_info=error)

    def _abort_older(self, before: datetime) -> None:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=self._prefix
        )
        for page in pages:
            for upload in page.get("Uploads", []):
                if upload["Initiated"] < before and self._key(upload["Key"]):
                    self._abort(upload["Key"], upload["UploadId"])

    def _get(self, name: str, requested_range: str | None = None) -> Any:
        """The body, which is a stream."""
        options: Any = {"Range": requested_range} if requested_range else {}
        try:
            reply = self._client.get_object(Bucket=self._bucket, Key=name, **options)
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404", "InvalidRange"):
                raise BlobMissing(name) from None
            raise
        return reply["Body"]

    def _claim(self, owner: str) -> str:
        name = f"{self._prefix}owner"
        try:
            with contextlib.closing(self._get(name)) as body:
                found: str = body.read().decode(errors="replace")
        except BlobMissing:
            self._put_whole(BytesIO(owner.encode()), name)
            return owner
        return found

    def _download(self, name: str, path: Path) -> None:
        """The file is there already; whoever does not want it any more has removed it."""
        with contextlib.closing(self._get(name)) as body, path.open("rb+") as file:
            shutil.copyfileobj(body, file, _PIECE_BYTES)

    def _list(self, token: str | None) -> tuple[list[StoredBlob], str | None]:
        """One page, and the token of the next if there is more."""
        options: Any = {"ContinuationToken": token} if token else {}
        reply = self._client.list_objects_v2(
            Bucket=self._bucket, Prefix=self._prefix, MaxKeys=self._page_keys, **options
        )
        page = [
            StoredBlob(key, each["LastModified"])
            for each in reply.get("Contents", [])
            if (key := self._key(each["Key"])) is not None
        ]
        return page, reply.get("NextContinuationToken")


def _code(error: ClientError) -> str:
    code: str = error.response.get("Error", {}).get("Code", "unknown")
    return code
