"""The registry, and what every provider in it has to be."""

import asyncio
import importlib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import pyvips
from pydantic_settings import BaseSettings

from app.extensions.provider import Answer, CallLimits, Provider
from app.extensions.registry import RegistryError, discover
from app.images import ImagePool, ProviderCopy
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator

Environment = dict[str, str]

EVERY_PROVIDER = pytest.mark.parametrize("provider_class", discover().values(), ids=discover())


@contextmanager
def _vision() -> Iterator[Environment]:
    with VisionEmulator() as server:
        yield {"LOUPE_VISION_ENDPOINT": server.endpoint, "LOUPE_VISION_INSECURE": "true"}


@contextmanager
def _rekognition() -> Iterator[Environment]:
    with RekognitionEmulator() as server:
        yield {
            "AWS_ENDPOINT_URL_REKOGNITION": server.url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


@contextmanager
def _nothing() -> Iterator[Environment]:
    yield {}


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Environment]]] = {
    "vision": _vision,
    "rekognition": _rekognition,
}


@EVERY_PROVIDER
def test_provider_says_what_it_is(provider_class: type[Provider]) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", provider_class.name)
    assert provider_class.ANSWER_VERSION >= 1
    assert isinstance(provider_class.is_billed, bool)
    assert issubclass(provider_class.settings_class, BaseSettings)
    for method in (provider_class.open, provider_class.detect_labels, provider_class.close):
        assert inspect.iscoroutinefunction(method)


@EVERY_PROVIDER
def test_provider_labels_a_picture_again_and_again(
    provider_class: type[Provider], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "sample.jpg"
    pyvips.Image.gaussnoise(120, 90, mean=128, sigma=20).cast("uchar").jpegsave(str(file))
    with SURROUNDINGS.get(provider_class.name, _nothing)() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        first, second = asyncio.run(_label_twice(provider_class, file))
    assert first == second
    assert first.labels
    for label in first.labels:
        assert isinstance(label.name, str)
        assert math.isfinite(label.confidence)
        assert 0 <= label.confidence <= 100


async def _label_twice(provider_class: type[Provider], file: Path) -> tuple[Answer, Answer]:
    images = ImagePool(processes=1)
    await images.start()
    try:
        provider = provider_class("google-auto-tagging", CallLimits(20, 2), images)
        await provider.open()
        try:
            image: ProviderCopy = await images.provider_copy(file)
            return await provider.detect_labels(image), await provider.detect_labels(image)
        finally:
            await provider.close()
    finally:
        await images.close()


@EVERY_PROVIDER
def test_provider_that_was_never_opened_can_be_closed(
    provider_class: type[Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(provider_class("google-auto-tagging", CallLimits(1, 1), ImagePool()).close())


PROVIDER_FILE = """
class Other:
    name = {name!r}

PROVIDER = Other
"""


def package_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> ModuleType:
    """A package of its own for each test, since imported modules stay."""
    package = folder / f"package_{abs(hash(folder))}"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(package.name)


def test_our_own_providers_are_found_under_their_names() -> None:
    found = discover()
    assert {"vision", "rekognition"} <= set(found)
    assert all(name == provider.name for name, provider in found.items())


def test_one_more_file_is_one_more_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"one": PROVIDER_FILE.format(name="one"), "two": PROVIDER_FILE.format(name="two")}
    assert list(discover(package_with(tmp_path, monkeypatch, files))) == ["one", "two"]


def test_name_given_twice_is_an_error_that_names_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"one": PROVIDER_FILE.format(name="same"), "two": PROVIDER_FILE.format(name="same")}
    package = package_with(tmp_path, monkeypatch, files)
    with pytest.raises(RegistryError, match=r"'same'.*\.one and .*\.two"):
        discover(package)


def test_file_without_a_provider_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_with(tmp_path, monkeypatch, {"empty": "x = 1"})
    with pytest.raises(RegistryError, match=r"\.empty does not say"):
        discover(package)
