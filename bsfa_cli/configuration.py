"""--config FILE.yaml: option values below the environment and the flags.

The file holds option names without their dashes, either flat or in one section per command, so that one file can
drive the whole flow:

    calibrate: {samples: 8, length: 32768}
    export: {target-skip: [0.5, 0.75]}
"""

from __future__ import annotations

from pathlib import Path

import typer
from bsfa_kernels.words import kind, quoted

from .errors import UsageError


def load(ctx: typer.Context, path: Path | None) -> Path | None:
    """Typer callback of `--config`: what the file says becomes the command's defaults.

    Raises UsageError for a file that cannot be read, is not a mapping, repeats a key, names an unknown option or
    gives one a value of the wrong type.
    """
    if path is None or ctx.resilient_parsing:
        return path
    parameters = _parameters(ctx)
    section = _section(_read(path), parameters, path, ctx)
    defaults = dict(ctx.default_map or {})
    for key, value in section.items():
        parameter = parameters.get(str(key).replace("_", "-"))
        if parameter is None:
            raise UsageError(
                f"{path}: unknown key '{key}' for 'bsfa {ctx.info_name}'; known keys: {', '.join(sorted(parameters))}"
            )
        if value is not None:
            defaults[parameter.name] = _value(parameter, key, value, path)
            try:
                parameter.process_value(ctx, defaults[parameter.name])
            except typer.BadParameter as error:
                raise UsageError(f"{path}: key '{key}' cannot be {quoted(value)}: {error.message}") from error
    ctx.default_map = defaults
    return path


def _parameters(ctx: typer.Context) -> dict:
    """{key in the file: the command's parameter}: the longest flag of an option, the name of an argument."""
    known = {}
    for parameter in ctx.command.params:
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        key = max(flags, key=len).lstrip("-") if flags else parameter.name.replace("_", "-")
        if key not in ("config", "help"):
            known[key] = parameter
    return known


def _read(path: Path) -> dict:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UsageError(f"{path}: key '{key}' stands twice (line {node.start_mark.line + 1} onwards)")
        return {
            key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)
        }

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - derived from SafeLoader
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping of option names to values, got {kind(content)}")
    return content


def _section(content: dict, parameters: dict, path: Path, ctx: typer.Context) -> dict:
    """This command's part of `content`, which has sections where a command's name is no option or holds a mapping."""
    commands = getattr(ctx.parent.command, "commands", {}) if ctx.parent else {}
    if not any(key in commands and (isinstance(content[key], dict) or key not in parameters) for key in content):
        return content
    for key in content:
        if key not in commands:
            raise UsageError(f"{path}: unknown section '{key}'; there may be {', '.join(commands)}")
    section = content.get(ctx.info_name) or {}
    if not isinstance(section, dict):
        raise UsageError(f"{path}: section '{ctx.info_name}' must be a mapping, got {kind(section)}")
    return section


def _value(parameter, key: str, value, path: Path):
    if isinstance(value, dict):
        raise UsageError(f"{path}: key '{key}' must be a value or a list, got a mapping")
    if getattr(parameter, "multiple", False) or parameter.nargs != 1:
        return value if isinstance(value, list) else [value]
    return ",".join(map(str, value)) if isinstance(value, list) else value
