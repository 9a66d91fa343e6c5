"""YAML as people write it for training: safe, with ``!pyobject package.module.name`` for types and functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from everyrank.config.plain_yaml import DUMPER, LOADER
from everyrank.config.resolve import import_object, object_path
from everyrank.errors import ConfigError

PYOBJECT_TAG = "!pyobject"
_UNNAMED_TAG = "!unnamed"  # what to_yaml writes for objects without a name

# YAML 1.1, which PyYAML follows, reads 1e-3 as text; YAML 1.2 and every physicist read it as a number.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


def get_loader() -> type[yaml.SafeLoader]:
    """Return a fresh safe PyYAML loader class that knows ``!pyobject package.module.name``.

    Only what a tag names is imported. ``!pyobject __main__.compute_loss`` finds a function of the running script, also
    in processes spawned from it. Numbers such as ``1e-3`` are read as numbers.

    Raises:
        ConfigError: While loading, if a tag's object cannot be found; it names the file, the line and the tag.

    Example:
        >>> yaml.load("optimizer: !pyobject torch.optim.AdamW", Loader=get_loader())
        {'optimizer': <class 'torch.optim.adamw.AdamW'>}
    """

    return _with_our_tags(yaml.SafeLoader)


def _with_our_tags(safe: type[yaml.SafeLoader]) -> type[yaml.SafeLoader]:
    class Loader(safe):  # type: ignore[misc,valid-type]
        """A safe loader with the tags of everyrank."""

    Loader.add_constructor(PYOBJECT_TAG, _construct_object)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
    return Loader


def read_yaml(path: str | Path) -> Any:
    """Return the contents of a YAML file with ``!pyobject`` tags.

    Raises:
        ConfigError: If the file is missing, is not YAML (line and column are named), or names an object that does not
            exist.
    """
    return _load(path, _with_our_tags(LOADER))


def _load(path: str | Path, loader: type[yaml.SafeLoader]) -> Any:
    try:
        with open(path, encoding="utf-8") as stream:
            return yaml.load(stream, Loader=loader)
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_told_by_python(path) or error}") from error


def _told_by_python(path: str | Path) -> yaml.YAMLError | None:
    """What PyYAML's own parser finds wrong. It tells it better than the one in C, which names no tab, for instance."""
    try:
        with open(path, encoding="utf-8") as stream:
            yaml.compose(stream, yaml.SafeLoader)
    except yaml.YAMLError as error:
        return error
    return None


@dataclass(frozen=True)
class Named:
    """An object of a configuration that is known by its name so far."""

    path: str


def names_of(config: Mapping[str, Any]) -> Any:
    """Return a configuration as ``read_names`` would read it from the file that ``to_yaml`` writes."""
    return yaml.load(to_yaml(config), Loader=_names_loader())


def _names_loader() -> type[yaml.SafeLoader]:
    loader = _with_our_tags(LOADER)
    for tag in (PYOBJECT_TAG, _UNNAMED_TAG):
        loader.add_constructor(tag, lambda loader, node: Named(str(node.value)))
    return loader


def read_names(path: str | Path) -> Any:
    """Like ``read_yaml``, but objects stay ``Named``: nothing is imported, and what is not needed need not exist.

    Raises:
        ConfigError: If the file is missing or is not YAML.
    """
    return _load(path, _names_loader())


def import_names(value: Any) -> Any:
    """Return what ``read_names`` gave (or a part of it) with its objects imported.

    Raises:
        ConfigError: If one of them cannot be found.
    """
    if isinstance(value, Named):
        return import_object(value.path)
    if isinstance(value, Mapping):
        return {key: import_names(item) for key, item in value.items()}
    return [import_names(item) for item in value] if isinstance(value, list) else value


def to_yaml(config: Mapping[str, Any]) -> str:
    """Return a configuration as YAML that ``read_yaml`` reads back; objects become ``!pyobject`` tags.

    An object without a full name (a lambda, an instance) is written as a tagged ``repr``: a person can read it, a
    loader refuses it.
    """
    return yaml.dump(dict(config), Dumper=_dumper(), sort_keys=False, allow_unicode=True)


def _construct_object(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    mark = node.start_mark
    where = f"{mark.name}, line {mark.line + 1}, {PYOBJECT_TAG}"
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: write one full name after the tag, e.g. {PYOBJECT_TAG} torch.optim.AdamW.")
    try:
        return import_object(loader.construct_scalar(node))
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from error


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Build a mapping, refusing a key that is written twice: YAML would silently keep the last."""
    mapping: dict[Any, Any] = {}
    yield mapping
    if isinstance(node, yaml.MappingNode):
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for number, key in enumerate(written):
            if key in written[:number]:
                mark = node.start_mark
                raise ConfigError(f"{mark.name}, line {mark.line + 1}: the key {key!r} is written twice. Keep one.")
    mapping.update(loader.construct_mapping(node))  # type: ignore[arg-type]


def _dumper() -> type[yaml.SafeDumper]:
    class Dumper(DUMPER):  # type: ignore[misc,valid-type]
        """A safe dumper that writes objects by name."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_multi_representer(tuple, lambda dumper, data: dumper.represent_list(list(data)))
    Dumper.add_multi_representer(Path, lambda dumper, data: dumper.represent_str(str(data)))
    Dumper.add_multi_representer(object, _represent_object)
    return Dumper


def _represent_object(dumper: yaml.SafeDumper, data: Any) -> yaml.Node:
    path = object_path(data)
    if path is None:
        return dumper.represent_scalar(_UNNAMED_TAG, repr(data))
    return dumper.represent_scalar(PYOBJECT_TAG, path)
