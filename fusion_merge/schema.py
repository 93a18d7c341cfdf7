"""The typed schema of the root configuration. It imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from fusion_merge.errors import ConfigError, nearest
from fusion_merge.presets import register_presets

BASELINES = ("zero_shot", "fine_tuned", "task_arithmetic")

CORRUPTIONS = (
    "contrast",
    "gaussian_noise",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "spatter",
)
"""The corruptions of the robustness protocol: splits of the published datasets have these names."""


@dataclass
class FabricConfig:
    """Where to compute: the options of Lightning Fabric."""

    devices: Any = 1
    accelerator: str = "auto"
    precision: Any = None
    strategy: str = "auto"


@dataclass
class CompareConfig:
    """What `fusion_merge compare` compares."""

    methods: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 32


@dataclass
class AnalyseConfig:
    """What `fusion_merge analyse` draws."""

    name: str | None = None
    model: str | None = None
    values: list[float] | None = None
    images: int = 128


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
    protocol: Any = None
    reproduction: Any = None
    compare: CompareConfig = field(default_factory=CompareConfig)
    analyse: AnalyseConfig = field(default_factory=AnalyseConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)
    seed: int = 0
    fast_dev_run: bool = False
    dry_run: bool = False
    plan: bool = False
    print_config: bool = False
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    evaluate_routings: list[str] | None = None
    unknown_task: Any = False
    corruption: str | None = None
    output_dir: str | None = None
    report_save_path: str | None = None
    merged_model_save_path: str | None = None


def register_schema() -> None:
    """Make known to Hydra what `config/config.yaml` and the presets build on."""
    ConfigStore.instance().store(name="fusion_merge_schema", node=ProgramConfig)
    OmegaConf.register_new_resolver("corrupted_split", corrupted_split, replace=True)
    register_presets()


def corrupted_split(corruption: str | None) -> str:
    """Return the split of a published dataset that holds its corrupted images.

    Args:
        corruption: one of `CORRUPTIONS`.

    Raises:
        ConfigError: if none is named, or an unknown one.
    """
    if corruption is None:
        raise ConfigError(f"this preset needs a `corruption`; give `corruption=NAME`, one of {', '.join(CORRUPTIONS)}")
    if corruption not in CORRUPTIONS:
        raise ConfigError(f"`corruption`={corruption!r} is not known; {nearest(corruption, CORRUPTIONS)}")
    return corruption
