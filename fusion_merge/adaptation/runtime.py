"""Lightning Fabric: devices, processes, precision and loggers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric as Fabric
from lightning_fabric.loggers.csv_logs import CSVLogger
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fusion_merge.errors import ConfigError, reason
from fusion_merge.pools.loaders import Placement

log = logging.getLogger(__name__)
logging.getLogger("lightning_fabric.utilities.seed").setLevel(logging.WARNING)


def make_fabric(
    *,
    devices: int | str | Sequence[int] = 1,
    accelerator: str = "auto",
    precision: str | int | None = None,
    strategy: str = "auto",
    log_dir: Path | str | None = None,
    launch: bool = True,
) -> Fabric:
    """Make a Fabric and start its processes.

    Args:
        devices: how many devices, which ones, or `auto`.
        accelerator: `cpu`, `cuda`, … or `auto`, which takes what is there.
        precision: such as `32-true` or `bf16-mixed`; by default full precision.
        strategy: such as `ddp`; `auto` takes what fits the devices.
        log_dir: where CSV (and, when installed, TensorBoard) logs go; none are written without it.
        launch: start the processes; without, the Fabric only tells whether the machine has what was asked for.

    Raises:
        ConfigError: if the machine does not have what was asked for.
    """
    options: dict[str, Any] = {
        "devices": list(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else devices,
        "accelerator": accelerator,
        "precision": precision,
        "strategy": strategy,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fabric = Fabric(**options, loggers=_loggers(log_dir) if log_dir is not None else None)
            if launch:
                fabric.launch()
        except (ValueError, RuntimeError, TypeError, ImportError, MisconfigurationException) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise ConfigError(f"`fabric` cannot have {given} here: {error}") from error
    for warning in caught:
        # Fabric also advises on processors and clusters, on which nothing depends
        if launch and "precision=" in str(warning.message):
            log.warning("%s", warning.message)
    return fabric


def log_to(fabric: Fabric, folder: Path | str) -> None:
    """Let what follows be logged somewhere else.

    Args:
        fabric: the Fabric.
        folder: where the logs go.
    """
    fabric.loggers[:] = _loggers(folder)


def placement_of(fabric: Fabric) -> Placement:
    """Return where a Fabric puts tensors and which share of the work this process has.

    Args:
        fabric: the Fabric.
    """
    return Placement(fabric.device, fabric.global_rank, fabric.world_size, fabric.autocast)


def check_precision(fabric: Fabric) -> None:
    """Refuse a precision in which nothing can be trained.

    Args:
        fabric: the Fabric.

    Raises:
        ConfigError: if weights would be stored in half precision: steps of a usual learning rate are lost in rounding.
    """
    precision = str(fabric.strategy.precision.precision)
    if precision in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
        raise ConfigError(
            f"`fabric.precision`={precision} stores what is trained in half precision, where steps of a usual `lr` are "
            "lost in rounding; choose 32-true, bf16-mixed or 16-mixed"
        )


def any_process(fabric: Fabric, flag: bool) -> bool:
    """Tell whether a flag is set in any process.

    Args:
        fabric: the Fabric.
        flag: this process's.
    """
    if fabric.world_size == 1:
        return flag
    return bool(fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="max"))


def averaged(fabric: Fabric, values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes.

    Args:
        fabric: the Fabric.
        values: this process's.
    """
    if fabric.world_size == 1:
        return values
    own = values.clone()  # which Fabric overwrites
    mean: Tensor = fabric.all_reduce(own, reduce_op="mean")  # type: ignore[assignment]
    return mean


def gathered(fabric: Fabric, values: Tensor) -> Tensor:
    """Return the values of all processes, in the order in which a single process would have them.

    Args:
        fabric: the Fabric.
        values: this process's, (B,); as many in each; one process after the other takes an image.
    """
    if fabric.world_size == 1:
        return values
    every = [torch.empty_like(values) for _ in range(fabric.world_size)]
    torch.distributed.all_gather(every, values.contiguous())
    return torch.stack(every, dim=1).flatten()  # (B·processes,)


def _loggers(log_dir: Path | str) -> list[Logger]:
    folder = Path(log_dir)
    loggers: list[Logger] = [CSVLogger(root_dir=folder, name="", version="", flush_logs_every_n_steps=50)]
    if find_spec("tensorboard") or find_spec("tensorboardX"):
        loggers.append(TensorBoardLogger(root_dir=folder, name="", version="tensorboard"))
    return loggers


def log_metrics(fabric: Fabric, metrics: dict[str, Any], step: int) -> None:
    """Send metrics to the loggers of a Fabric, if it has any; one that cannot write is let go, with a warning.

    Args:
        fabric: the Fabric.
        metrics: numbers by name.
        step: the step they belong to.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder that holds logs already is what `output_dir` may ask for
        _each_logger(fabric, lambda logger: logger.log_metrics(metrics, step))


def finish_logs(fabric: Fabric) -> None:
    """Write what the loggers still hold.

    Args:
        fabric: the Fabric.
    """
    _each_logger(fabric, lambda logger: logger.finalize("success"))


def _each_logger(fabric: Fabric, use: Callable[[Logger], None]) -> None:
    """Use each logger; what was computed must not be lost because its log cannot be written."""
    for logger in list(fabric.loggers) if fabric.is_global_zero else []:
        try:
            use(logger)
        except OSError as error:
            fabric.loggers.remove(logger)
            why = error.strerror or reason(error)
            log.warning("logs in `%s` cannot be written (%s): going on without them", logger.root_dir, why)
