"""The one registry: methods by name, from `fusion_merge.methods` and from entry points of other packages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from fusion_merge.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fusion_merge.methods.base import Method

ENTRY_POINTS = "fusion_merge.methods"
_HYDRA_KEYS = {"_target_", "_recursive_", "_convert_"}

_methods: dict[str, type[Method]] = {}
_aliases: dict[str, str] = {}
_scanned = False

M = TypeVar("M", bound="type[Method]")


def register_method(name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[M], M]:
    """Register a method class under a name.

    Args:
        name: the name, as `list_methods` gives it.
        aliases: other names that mean the same.

    Raises:
        ConfigError: if another class has one of the names already.
    """

    def register(cls: M) -> M:
        for key in (name, *aliases):
            owner = _methods.get(_aliases.get(key, key))
            if (
                owner is not None
                and f"{owner.__module__}.{owner.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}"
            ):
                raise ConfigError(f"method `{key}` is registered twice: by {owner.__module__} and by {cls.__module__}")
        _methods[name] = cls
        _aliases.update(dict.fromkeys(aliases, name))
        cls.method_name = name
        return cls

    return register


def list_methods() -> list[str]:
    """Return the names of all methods, those of installed packages included."""
    _scan()
    return sorted(_methods)


def get_method(name: str) -> type[Method]:
    """Return a method class by name or alias.

    Args:
        name: the name.

    Raises:
        ConfigError: if there is no such method; the message proposes the nearest.
    """
    _scan()
    key = _aliases.get(name, name)
    if key not in _methods:
        raise ConfigError(f"method `{name}` is unknown; {nearest(name, [*_methods, *_aliases])}")
    return _methods[key]


def is_registered(name: str) -> bool:
    """Tell whether there is a method of that name or alias.

    Args:
        name: the name.
    """
    _scan()
    return _aliases.get(name, name) in _methods


def names_of(cls: type[Method]) -> list[str]:
    """Return every name of a method class.

    Args:
        cls: the class.
    """
    return [name for name in [*_methods, *_aliases] if _methods[_aliases.get(name, name)] is cls]


def object_from_config(config: Mapping[str, Any], what: str, kind: type = object) -> Any:
    """Make the object that a config describes: `_target_` called with the other keys.

    Args:
        config: plain values, `_target_` among them.
        what: which part of the configuration it is, for errors.
        kind: what the class must be; nothing else is called.

    Raises:
        ConfigError: if the target is no such class, or a key is unknown.
    """
    cls = class_from_config(config, what, kind)
    target, class_name = config["_target_"], cls.__name__
    options = {key: value for key, value in config.items() if key not in _HYDRA_KEYS}
    try:
        known = inspect.signature(cls).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`{what}._target_`={target!r} is not a class that takes options: {error}") from error
    for key in options:
        if key not in known:
            raise ConfigError(f"`{what}.{key}` is not an option of {class_name}; {nearest(str(key), known)}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ConfigError(f"`{what}` cannot be made: {error}") from error


def class_from_config(config: Mapping[str, Any], what: str, kind: type = object) -> type:
    """Return the class that a config names in `_target_`.

    Args:
        config: plain values, `_target_` among them.
        what: which part of the configuration it is, for errors.
        kind: what the class must be.

    Raises:
        ConfigError: if the target is no such class.
    """
    target = config.get("_target_")
    if not isinstance(target, str):
        raise ConfigError(f"the config of `{what}` has no `_target_` that names a class")
    module_name, _, class_name = target.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a module may fail in any way when it is imported
        raise ConfigError(f"`{what}._target_`={target!r} cannot be imported: {error}") from error
    if not isinstance(cls, type):
        raise ConfigError(f"`{what}._target_`={target!r} is a {type(cls).__name__}, not a class")
    if not issubclass(cls, kind):
        raise ConfigError(f"`{what}._target_`={target!r} is not a {kind.__name__}; choose one with `{what}=NAME`")
    found: type = cls
    return found


def _scan() -> None:
    global _scanned
    if _scanned:
        return
    package = importlib.import_module("fusion_merge.methods")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    for entry_point in entry_points(group=ENTRY_POINTS):
        try:
            entry_point.load()
        except ConfigError:
            raise
        except Exception as error:  # a package of somebody else's may fail in any way
            raise ConfigError(
                f"the method `{entry_point.name}` of another package ({entry_point.value}) cannot be loaded: {error}; "
                "mend or uninstall that package"
            ) from error
    _scanned = True
