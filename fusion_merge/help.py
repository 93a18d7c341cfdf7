"""What `--help` says: Hydra's own way asks for every group of presets anew, which takes longer than all the rest."""

from __future__ import annotations

from string import Template

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fusion_merge.preset_names import preset_names

_CONFIG = "fusion_merge.config"


def help_text(overrides: list[str]) -> str:
    """Return the help: usage, presets, and the options of the presets that are chosen, with their values.

    Args:
        overrides: the arguments `KEY=VALUE`.

    Raises:
        HydraException: if they cannot be combined.
    """
    GlobalHydra.instance().clear()
    with initialize_config_module(_CONFIG, version_base="1.3"):
        config = compose("config", overrides=overrides, return_hydra_config=True)
    template = Template(config.hydra.help.template)
    presets = [f"{group}: {', '.join(names)}\n" for group, names in preset_names().items()]
    options = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return template.substitute(APP_CONFIG_GROUPS="".join(presets), CONFIG=OmegaConf.to_yaml(options))
