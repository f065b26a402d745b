"""The URLs by which files are delivered, as responses name them."""

from dataclasses import dataclass
from urllib.parse import quote

UPLOAD_THUMBNAIL = "media_library_thumbnail"


@dataclass(frozen=True, slots=True)
class FileUrls:
    """endpoint: `{PUBLIC_URL}/{ID}`, without a slash at the end."""

    endpoint: str

    def file(self, path: str) -> str:
        return self.endpoint + quote(path)

    def thumbnail(self, path: str) -> str:
        return f"{self.endpoint}/tr:n-{UPLOAD_THUMBNAIL}{quote(path)}"
