"""Which providers there are."""

import pkgutil
from importlib import import_module
from types import ModuleType

from app.extensions import providers
from app.extensions.provider import Provider


class RegistryError(Exception):
    """A file among the providers is not what it has to be. Stops the start."""


def discover(package: ModuleType = providers) -> dict[str, type[Provider]]:
    """Every provider by its name: one for each module of `package`. Raises RegistryError."""
    found: dict[str, type[Provider]] = {}
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        provider = _provider_of(module.name)
        if provider.name in found:
            first = found[provider.name].__module__
            raise RegistryError(
                f"Two providers are named {provider.name!r}: {first} and {module.name}."
            )
        found[provider.name] = provider
    return found


def _provider_of(module_name: str) -> type[Provider]:
    try:
        provider: type[Provider] = import_module(module_name).PROVIDER
    except AttributeError as error:
        raise RegistryError(f"{module_name} does not say which class is its PROVIDER.") from error
    return provider
