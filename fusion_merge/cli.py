"""The command line: `fusion_merge method=… modelpool=… taskpool=…`, by Hydra. It imports torch only to run."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion_merge.errors import ConfigError, FusionMergeError, nearest
from fusion_merge.schema import BASELINES, register_schema

if TYPE_CHECKING:
    from fusion_merge.program import FusionProgram

log = logging.getLogger(__name__)

_OPEN_TABLES = (
    "modelpool.models",
    "modelpool.train_datasets",
    "modelpool.test_datasets",
    "taskpool.tasks",
    "taskpool.test_datasets",
)
"""Tables that users add names to: `taskpool.tasks.cats=…` needs no `+`."""


def main() -> None:
    """Run the command line; every error that can be foreseen is one clear message and exit code 1."""
    register_schema()
    tracebacks = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing: the messages are ours
    sys.argv[1:] = [_open(argument) for argument in sys.argv[1:]]
    with _messages(tracebacks):
        hydra.main(config_path="pkg://fusion_merge.config", config_name="config", version_base="1.3")(
            partial(_job, tracebacks)
        )()


def _job(tracebacks: bool, config: DictConfig) -> None:
    with _messages(tracebacks):  # here, where Hydra does not yet add lines of its own
        _run(config)


@contextmanager
def _messages(tracebacks: bool) -> Iterator[None]:
    """Turn the errors that can be foreseen into one message and exit code 1."""
    try:
        yield
    except (FusionMergeError, HydraException, OmegaConfBaseException) as error:
        if tracebacks:
            raise
        sys.stderr.write(f"error: {_explain(error)}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _run(config: DictConfig) -> None:
    plain = _plain(config)
    if plain["print_config"]:
        log.info("%s", OmegaConf.to_yaml(OmegaConf.create(plain)))
    program = _program(plain, _output_dir(plain))
    if plain["dry_run"]:
        program.check()
        log.info("%s\ndry run: nothing was computed or written", program.plan())
        return
    program.run()


def _program(config: dict[str, Any], output_dir: Path) -> FusionProgram:
    from fusion_merge.program import FusionProgram  # imports torch

    return FusionProgram(config, output_dir)


def _plain(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain values, or say what is missing in it."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"`{missing[0]}` has no value yet; give it, for example `{missing[0]}=…`")
    plain = OmegaConf.to_container(config, resolve=True)
    if not isinstance(plain, dict):
        raise ConfigError("the configuration is not a table of keys")
    for part in ("method", "modelpool", "taskpool"):
        if not isinstance(plain[part], dict):
            raise ConfigError(f"`{part}`={plain[part]!r} is not a configuration; choose one with `{part}=NAME`")
    for baseline in plain["baselines"]:
        if baseline not in BASELINES:
            raise ConfigError(f"`baselines` has {baseline!r}; {nearest(str(baseline), BASELINES)}")
    if plain["seed"] < 0:
        raise ConfigError(f"`seed`={plain['seed']} is negative; choose 0 or more")
    return {str(key): value for key, value in plain.items()}


def _output_dir(config: dict[str, Any]) -> Path:
    """Return where this run writes: a folder that does not exist yet, unless the user named one."""
    hydra_config = HydraConfig.get()
    sweep = hydra_config.mode == RunMode.MULTIRUN
    if config["output_dir"] is not None:
        folder = Path(config["output_dir"]).expanduser()
        return folder / str(hydra_config.job.num) if sweep else folder
    if sweep or hydra_config.run.dir != ".":
        return Path(hydra_config.runtime.output_dir)
    stamp = Path("outputs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, count = stamp, 1
    while folder.exists():
        folder, count = stamp.with_name(f"{stamp.name}-{count}"), count + 1
    return folder


def _open(argument: str) -> str:
    """Let overrides add names to the tables that users fill."""
    key = argument.partition("=")[0]
    return f"++{argument}" if key.startswith(tuple(f"{table}." for table in _OPEN_TABLES)) else argument


def _explain(error: Exception) -> str:
    """Return one clear message, with the nearest right name where a name was wrong."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).partition("/")
        return f"`{group}={name}` is not a preset; {nearest(name, error.options or [])}"
    message = str(error)
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and (found := re.search(r"Could not override '([^']+)'", message)):
        key = found[1]
        parent, _, name = key.rpartition(".")
        siblings = [str(k) for k in _keys_at(parent)]
        if siblings and name not in siblings:
            return f"`{key}` is not an option; {nearest(name, siblings)}"
    if isinstance(cause, Exception) and str(cause) not in message:
        message = f"{message}: {cause}"
    return message


def _keys_at(parent: str) -> list[Any]:
    """Return the keys of one part of the configuration that the rest of the command line selects."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    groups = [a for a in sys.argv[1:] if re.match(r"^(method|modelpool|taskpool)=", a)]
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        config = compose("config", overrides=groups)
    node = OmegaConf.select(config, parent) if parent else config
    return list(node) if isinstance(node, DictConfig) else []
