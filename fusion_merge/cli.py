"""The command line: `fusion_merge method=… modelpool=… taskpool=…`, by Hydra. It imports torch only to run."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from functools import partial, reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion_merge.commands import find_command, overrides_first, spell_out
from fusion_merge.errors import ConfigError, FusionMergeError, LostProcessError, nearest, reason
from fusion_merge.explanations import GROUPS, choices, explain, first_choice
from fusion_merge.help import help_text
from fusion_merge.options import LARGEST
from fusion_merge.presets import method_presets, register_presets
from fusion_merge.schema import BASELINES, AnalyseConfig, CompareConfig, FabricConfig, ProgramConfig, register_schema

log = logging.getLogger(__name__)

_OPEN_TABLES = (
    "modelpool.models",
    "modelpool.processor",
    "modelpool.train_datasets",
    "modelpool.test_datasets",
    "taskpool.tasks",
    "taskpool.test_datasets",
    "taskpool.clip_model",
    "taskpool.base_model",
    "taskpool.processor",
    "taskpool.dataloader_kwargs",
    "compare.options",
)
"""Tables that users add names to: `taskpool.tasks.cats=…` and `taskpool.tasks={cats: …}` need no `+`."""

_WRITTEN: dict[str, Literal["file", "folder"]] = {
    "output_dir": "folder",
    "merged_model_save_path": "folder",
    "report_save_path": "file",
    "method.output": "folder",
    "method.save_checkpoint": "file",
}
"""What a run writes: in a sweep each job has its own, such as `merged/0` and `report-0.json` of the first."""


_VALUED = ("--config-dir", "-cd", "--cfg", "-c")
"""Hydra's flags that have a value, and that help can be asked beside."""

_TICK = 0.05  # seconds by which the clock of a file system may be behind

_OURS = "FUSION_MERGE_MESSAGES"
"""Set where `HYDRA_FULL_ERROR` is ours and not the user's, so that the processes that a run starts know it too."""

_given: list[str] = []
"""The arguments as the user gave them."""

_codes: list[int] = []
"""The exit codes of the jobs that ended; where one job of a sweep with a table fails, the others go on."""


def main() -> None:
    """Run the command line; every error that can be foreseen is one clear message and exit code 1."""
    tracebacks = os.environ.get("HYDRA_FULL_ERROR") == "1" and _OURS not in os.environ
    if not tracebacks:
        os.environ["HYDRA_FULL_ERROR"] = os.environ[_OURS] = "1"  # Hydra then raises, and the messages are ours
    with _messages(tracebacks):
        register_schema()
        _given[:], _codes[:] = sys.argv[1:], []
        arguments = overrides_first(_presets_alone(spell_out(sys.argv[1:])))
        sys.argv[1:] = [_open(argument) for argument in arguments]
        pools = [n for a in sys.argv[1:] if a.startswith("modelpool=") for n in choices(a)]
        register_presets(pool for pool in pools if not _has_own_taskpool(pool, arguments))
        if (overrides := _help_on(sys.argv[1:])) is not None:
            sys.stdout.write(help_text(overrides, _config_folders(arguments)))
            return
        hydra.main(config_path="pkg://fusion_merge.config", config_name="config", version_base="1.3")(
            partial(_job, tracebacks)
        )()
        if any(_codes):
            sys.exit(1 if 1 in _codes else max(_codes))


def _presets_alone(arguments: list[str]) -> list[str]:
    """Leave out a method that `describe` is asked about and that has no preset, as one of another package may not."""
    if "command=describe" not in arguments:
        return arguments
    from fusion_merge.registry import is_registered  # which imports torch

    presets = method_presets()
    names = {a: a.partition("=")[2] for a in arguments if a.startswith("method=")}
    return [a for a in arguments if a not in names or names[a] in presets or not is_registered(names[a])]


def _config_folders(arguments: Sequence[str]) -> list[Path]:
    """Return the user's own folders of presets."""
    folders = [a.partition("=")[2] for a in arguments if a.startswith(("--config-dir=", "-cd="))]
    folders += [folder for flag, folder in pairwise(arguments) if flag in ("--config-dir", "-cd")]
    return list(map(Path, folders))


def _has_own_taskpool(name: str, arguments: Sequence[str]) -> bool:
    """Tell whether the user's own folder of presets has a task pool of that name."""
    return any((folder / "taskpool" / f"{name}.yaml").is_file() for folder in _config_folders(arguments))


def _help_on(arguments: Sequence[str]) -> list[str] | None:
    """Return the overrides that help is asked about, or None where Hydra is to answer: it knows all of its flags."""
    flags, overrides = list[str](), list[str]()
    left = iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(flag)
        value = next(left, "") if flag in _VALUED and not equals else value
        if flag in ("--cfg", "-c") and value not in ("job", "hydra", "all"):
            return None
    folders = _config_folders(arguments)
    found = sum(flag in ("--config-dir", "-cd") for flag in flags) == len(folders) <= 1
    known = found and all(map(Path.is_dir, folders)) and {"--help", "-h", "--multirun", "-m", *_VALUED} >= {*flags}
    special = any(word in argument for argument in overrides for word in ("glob(", "interval(", "hydra.searchpath"))
    if not {"--help", "-h"} & {*flags} or not known or special:
        return None
    return [first_choice(argument) for argument in overrides]


def _job(tracebacks: bool, config: DictConfig) -> dict[str, Any] | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN and _has_a_table(config.get("protocol")):
        return _job_of_a_sweep(config)
    with _messages(tracebacks):  # here, where Hydra does not yet add lines of its own
        _codes.append(_run(config)[1])
    return None


def _has_a_table(protocol: Any) -> bool:
    """Tell whether a protocol is that of sweeps; its class would take long to import."""
    return isinstance(protocol, Mapping) and str(protocol.get("_target_")).endswith(".SweepProtocol")


def _job_of_a_sweep(config: DictConfig) -> dict[str, Any]:
    """Return what came of a job, for the table; one that fails does not end the others."""
    start, begun, error, folder = time.perf_counter(), time.time(), None, None
    try:
        folder, code = _run(config)
        _codes.append(code)
    except Exception as failure:  # whatever it is, the other jobs go on
        error = explain(failure)
        foreseen = isinstance(failure, FusionMergeError | HydraException | OmegaConfBaseException)
        log.error("job %s failed: %s", HydraConfig.get().job.num, error, exc_info=not foreseen)
        _codes.append(1)
    report = None if folder is None or error is not None else folder / "report.json"
    own = report is not None and report.is_file() and report.stat().st_mtime >= begun - _TICK  # not an earlier run's
    found = str(report) if own else None
    return {"error": error, "report": found, "seconds": time.perf_counter() - start}


@contextmanager
def _messages(tracebacks: bool) -> Iterator[None]:
    """Turn the errors that can be foreseen into one message and exit code 1."""
    try:
        yield
    except (FusionMergeError, HydraException, OmegaConfBaseException) as error:
        if tracebacks:
            raise
        sys.stderr.write(f"error: {explain(error)}\n")
        if isinstance(error, LostProcessError):
            _leave_at_once()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _leave_at_once() -> None:
    """End without waiting for threads, as an interpreter does: those of torch may wait for the dead."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _run(config: DictConfig) -> tuple[Path, int]:
    """Run a command; return the folder that it may have written to, and its exit code."""
    plain = _plain(config)
    if plain["print_config"]:
        log.info("%s", OmegaConf.to_yaml(OmegaConf.create(plain)))
    output_dir = _output_dir(plain)
    command = "plan" if plain["plan"] and plain["command"] in ("run", "reproduce") else plain["command"]
    return output_dir, find_command(command).run(plain, output_dir, _command())


def _command() -> str:
    """Return the command that makes this very run: of a sweep, that of the job alone."""
    hydra_config = HydraConfig.get()
    sweep = hydra_config.mode == RunMode.MULTIRUN
    arguments = [a.lstrip("+") for a in hydra_config.overrides.task] if sweep else _given
    return shlex.join(["fusion_merge", *arguments])


def _plain(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain values, or say what is missing in it."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing and config.command != "describe":  # which shows what has no value
        raise ConfigError(f"`{missing[0]}` has no value yet; give it, for example `{missing[0]}=…`")
    plain = OmegaConf.to_container(config, resolve=True)
    if not isinstance(plain, dict):
        raise ConfigError("the configuration is not a table of keys")
    _check_keys(plain, ProgramConfig, "")
    for part in ("method", "modelpool", "taskpool"):
        if not isinstance(plain[part], dict):
            raise ConfigError(f"`{part}`={plain[part]!r} is not a configuration; choose one with `{part}=NAME`")
    if plain["protocol"] is not None and not isinstance(plain["protocol"], dict):
        raise ConfigError(f"`protocol`={plain['protocol']!r} is not a protocol; choose one with `protocol=NAME`")
    if plain["corruption"] is not None and "${corruption}" not in str(OmegaConf.to_container(config, resolve=False)):
        raise ConfigError(
            f"`corruption`={plain['corruption']!r}: nothing that is chosen looks at it; choose "
            "`modelpool=clip-vit-base-patch32_robustness_corrupted`, give a task its own `corruption`, or take "
            "`protocol=robustness`"
        )
    for baseline in plain["baselines"]:
        if baseline not in BASELINES:
            raise ConfigError(f"`baselines` has {baseline!r}; {nearest(str(baseline), BASELINES)}")
    if not 0 <= plain["seed"] <= LARGEST:
        raise ConfigError(f"`seed`={plain['seed']} is not possible; choose 0-{LARGEST}")
    _check_places(plain)
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN and _has_a_table(plain["protocol"]):
        raise ConfigError("`protocol=sweep` is for several runs: give `--multirun`, and options such as `seed=0,1`")
    if hydra_config.mode == RunMode.MULTIRUN:
        _keep_apart(plain, hydra_config.job.num)
    return {str(key): value for key, value in plain.items()}


def _check_keys(config: dict[Any, Any], schema: type, path: str) -> None:
    """Refuse keys that were added with `+` or deleted with `~`: nothing would look at the one, or find the other."""
    known = [field.name for field in fields(schema)]
    for key in config:
        if key not in known:
            raise ConfigError(f"`{path}{key}` is not an option; {nearest(str(key), known)}")
    for key in known:
        if key not in config:
            raise ConfigError(f"`{path}{key}` was taken away; leave out `~{path}{key}`")
    if not path:
        for part, own in (("fabric", FabricConfig), ("compare", CompareConfig), ("analyse", AnalyseConfig)):
            _check_keys(config[part], own, f"{part}.")


def _check_places(config: dict[Any, Any]) -> None:
    """Refuse places that no file or folder can have."""
    for key in _WRITTEN:
        *groups, name = key.split(".")
        place = reduce(getitem, groups, config).get(name)
        if not isinstance(place, str):
            continue
        try:
            Path(place).expanduser().lstat()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # whether it can be made is looked at where it is needed
        except (OSError, RuntimeError, ValueError) as error:  # too long, the home of nobody, or a zero byte
            shown = place if len(place) < 200 else f"{place[:200]}…"
            raise ConfigError(f"`{key}`={shown!r} is not a possible path: {reason(error)[:100]}") from error


def _keep_apart(config: dict[Any, Any], job: int) -> None:
    """Put the number of a sweep's job into every place that it writes to, or jobs would overwrite one another."""
    for key, kind in _WRITTEN.items():
        *groups, name = key.split(".")
        table = reduce(getitem, groups, config)
        place = table.get(name)
        if not isinstance(place, str) or not Path(place).name:
            continue
        path = Path(place)
        table[name] = str(path / str(job) if kind == "folder" else path.with_stem(f"{path.stem}-{job}"))


def _output_dir(config: dict[str, Any]) -> Path:
    """Return where this run writes: a folder that does not exist yet, unless the user named one."""
    if config["output_dir"] is not None:
        return Path(config["output_dir"]).expanduser()
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN or hydra_config.run.dir != ".":
        return Path(hydra_config.runtime.output_dir)
    stamp = Path("outputs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, count = stamp, 1
    while folder.exists():
        folder, count = stamp.with_name(f"{stamp.name}-{count}"), count + 1
    return folder


def _open(argument: str) -> str:
    """Let overrides add names to the tables that users fill, and take away what a null takes away."""
    key, equals, value = argument.partition("=")
    if equals and not key.strip("+~"):
        raise ConfigError(f"`{argument}` has no key; write KEY=VALUE")
    if key in GROUPS and equals and value in ("", "null"):
        raise ConfigError(f"`{key}`={value or None} names no preset; choose one with `{key}=NAME`")
    if key.lstrip("+") == "tuned" and equals and value.lower() in ("", "null"):
        return "~tuned"
    below = key.startswith(tuple(f"{table}." for table in _OPEN_TABLES))
    whole = key in _OPEN_TABLES and value.startswith("{")
    return f"++{argument}" if below or whole else argument
