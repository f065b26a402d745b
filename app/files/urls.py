"""The URLs by which files are delivered, as responses name them."""

from dataclasses import dataclass
from urllib.parse import quote

UPLOAD_THUMBNAIL = "media_library_thumbnail"


@dataclass(frozen=True, slots=True)
class FileUrls:
    """endpoint: `{PUBLIC_URL}/{ID}`, without a slash at the end."""

    endpoint: str

    def file_and_thumbnail(self, path: str) -> tuple[str, str]:
        # Of ASCII, names and folders keep only what a URL needs no escape for.
        quoted = path if path.isascii() else quote(path)
        return f"{self.endpoint}{quoted}", f"{self.endpoint}/tr:n-{UPLOAD_THUMBNAIL}{quoted}"
