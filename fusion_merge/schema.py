"""The typed schema of the root configuration. It imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

BASELINES = ("zero_shot", "fine_tuned", "task_arithmetic")


@dataclass
class FabricConfig:
    """Where to compute: the options of Lightning Fabric."""

    devices: Any = 1
    accelerator: str = "auto"
    precision: Any = None
    strategy: str = "auto"


@dataclass
class ProgramConfig:
    """One run.

    In a sweep (`--multirun`) the number of the job is put into every place that it writes to, `method.output` and
    `method.save_checkpoint` included: folders get a subfolder (`merged/0`), files another name (`report-0.json`).
    """

    command: str = "run"
    method: Any = None
    modelpool: Any = None
    taskpool: Any = None
    fabric: FabricConfig = field(default_factory=FabricConfig)
    seed: int = 0
    fast_dev_run: bool = False
    dry_run: bool = False
    plan: bool = False
    print_config: bool = False
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    output_dir: str | None = None
    report_save_path: str | None = None
    merged_model_save_path: str | None = None


def register_schema() -> None:
    """Make the schema known to Hydra, under the name that `config/config.yaml` builds on."""
    ConfigStore.instance().store(name="fusion_merge_schema", node=ProgramConfig)
