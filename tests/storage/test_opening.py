"""Which storage a URL opens, and what an operator is told when it cannot be."""

import socket
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings, SettingsError, load_settings
from app.storage.base import Storage
from app.storage.opening import open_storage
from tests.emulators.s3 import S3Emulator
from tests.server import EventLoop


def _open(tmp_path: Path, event_loop: EventLoop, storage_url: str) -> Storage:
    settings = load_settings(Settings, data_dir=tmp_path, storage_url=storage_url)

    async def open_and_close() -> Storage:
        storage = await open_storage(settings)
        await storage.close()
        return storage

    return event_loop.run(open_and_close())


def test_the_default_is_a_directory_in_the_data_directory(
    tmp_path: Path, event_loop_thread: EventLoop
) -> None:
    storage = _open(tmp_path, event_loop_thread, "")
    assert storage.name == "local"
    assert storage.staging_dir.parent == tmp_path / "files" / "staging"


def test_a_file_url_is_a_directory(tmp_path: Path, event_loop_thread: EventLoop) -> None:
    storage = _open(tmp_path / "data", event_loop_thread, f"file://{tmp_path}/elsewhere")
    assert storage.staging_dir.parent == tmp_path / "elsewhere" / "staging"


@pytest.mark.parametrize("path", ["", "/", "/some/prefix", "/some/prefix/"])
def test_an_s3_url_is_a_bucket_and_files_are_staged_on_the_local_disk(
    s3: S3Emulator, tmp_path: Path, event_loop_thread: EventLoop, path: str
) -> None:
    storage = _open(tmp_path, event_loop_thread, f"s3://{s3.create_bucket()}{path}")
    assert storage.name == "s3"
    assert storage.staging_dir.parent == tmp_path / "staging"


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///prefix",
        "s3://B",
        "s3://key:secret@bucket",
        "s3://bucket:80/x",
        "s3://bucket/a//b",
        "s3://bucket/../x",
        "s3://bucket/x?region=y",
        "s3://bucket/x#y",
        "s3://bucket/ä",
        "s3://bucket/a b",
        "gs://bucket",
        "relative/path",
        "file://relative",
    ],
)
def test_a_url_that_names_no_storage_is_refused_in_one_sentence(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^LOUPE_STORAGE_URL: should [^\n]*\.$") as refused:
        load_settings(Settings, storage_url=url)
    assert "secret" not in str(refused.value)


def test_the_settings_show_the_storage(tmp_path: Path) -> None:
    def effective(**overrides: Any) -> object:
        return load_settings(Settings, **overrides).effective()["storage_url"]

    assert effective(data_dir=tmp_path) == f"file://{tmp_path}/files"
    assert effective(storage_url="s3://bucket/prefix/") == "s3://bucket/prefix"


def _refusal(tmp_path: Path, event_loop: EventLoop, url: str) -> str:
    with pytest.raises(SettingsError, match=r"^LOUPE_STORAGE_URL: [^\n]*[^.]\.$") as refused:
        _open(tmp_path, event_loop, url)
    return str(refused.value)


def test_a_bucket_that_does_not_exist_is_told(
    s3: S3Emulator, tmp_path: Path, event_loop_thread: EventLoop
) -> None:
    refusal = _refusal(tmp_path, event_loop_thread, "s3://no-such-bucket")
    assert refusal == "LOUPE_STORAGE_URL: the bucket no-such-bucket does not exist."


def test_credentials_that_are_refused_are_told(
    s3: S3Emulator, tmp_path: Path, event_loop_thread: EventLoop
) -> None:
    bucket = s3.create_bucket()
    s3.faults["head"] = "denied"
    refusal = _refusal(tmp_path, event_loop_thread, f"s3://{bucket}")
    assert f"these credentials use the bucket {bucket}" in refusal


def test_missing_credentials_are_told(
    s3: S3Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, event_loop_thread: EventLoop
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "credentials" in _refusal(tmp_path, event_loop_thread, "s3://some-bucket")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "no url at all"])
def test_a_server_that_is_not_there_is_told(
    s3: S3Emulator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    event_loop_thread: EventLoop,
    endpoint: str,
) -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        port = nobody_listens.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint.format(port=port))
        refusal = _refusal(tmp_path, event_loop_thread, "s3://some-bucket")
    assert "S3" in refusal


def test_a_directory_that_cannot_be_written_is_told(
    tmp_path: Path, event_loop_thread: EventLoop
) -> None:
    (tmp_path / "file").write_bytes(b"")
    refusal = _refusal(tmp_path, event_loop_thread, f"file://{tmp_path}/file/files")
    assert refusal.endswith("Not a directory.")
