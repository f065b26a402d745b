"""Opens the storage that the settings name."""

from app.settings import Settings, SettingsError, split_s3_url
from app.storage.base import Storage, StorageUnavailable
from app.storage.local import LocalStorage
from app.storage.s3 import S3Storage


async def open_storage(settings: Settings) -> Storage:
    """Raises SettingsError when blobs cannot be stored there."""
    storage = _make_storage(settings)
    try:
        await storage.open()
    except StorageUnavailable as error:
        await storage.close()
        raise SettingsError(f"LOUPE_STORAGE_URL: {str(error).rstrip('.')}.") from error
    return storage


def _make_storage(settings: Settings) -> Storage:
    if settings.is_storage_local:
        return LocalStorage(settings.storage_dir.resolve())
    bucket, prefix = split_s3_url(settings.storage_url)
    return S3Storage(bucket, prefix, settings.data_dir.resolve() / "staging")
