"""What `--help` says: Hydra's own way asks for every group of presets anew, which takes longer than all the rest."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from string import Template

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fusion_merge.presets import CHOSEN, CONFIG, LONG_PATHS, preset_names

_MANY = 4
"""So many presets with one beginning are shown as one family."""


def help_text(overrides: list[str], folders: Iterable[Path] = ()) -> str:
    """Return the help: usage, presets, and the options of the presets that are chosen, with their values.

    Args:
        overrides: the arguments `KEY=VALUE`.
        folders: the user's own folders of presets.

    Raises:
        HydraException: if they cannot be combined.
    """
    GlobalHydra.instance().clear()
    own = [folder.absolute() for folder in folders]
    if own:
        overrides = [
            *overrides,
            f"hydra.searchpath={json.dumps([f'file://{folder}' for folder in own], ensure_ascii=False)}",
        ]
    with initialize_config_module(CONFIG, version_base="1.3"):
        config = compose("config", overrides=overrides, return_hydra_config=True)
    template = Template(config.hydra.help.template)
    options = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return template.substitute(APP_CONFIG_GROUPS=shown_presets(own), CONFIG=OmegaConf.to_yaml(options))


def shown_presets(folders: Iterable[Path] = ()) -> str:
    """Return the presets of each group that a user chooses from, families of names in braces, wrapped.

    Args:
        folders: the user's own folders of presets.
    """
    width = min(max(shutil.get_terminal_size().columns, 64), 120)
    groups = sorted(CHOSEN)
    indent = " " * (max(map(len, groups)) + 2)
    lines: list[str] = []
    for group in groups:
        if not (names := preset_names(group, folders)):
            continue
        for number, family in enumerate(_families(names)):
            first = indent if number else f"{group:{len(indent)}}"
            lines += textwrap.wrap(
                family,
                width,
                initial_indent=first,
                subsequent_indent=f"{indent}  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    paths = [f"{group}={folder}/NAME" for group, folder in LONG_PATHS.items()]
    return "\n".join([*lines, f"{indent}long paths work too: {', '.join(paths)}", ""])


def _families(names: Iterable[str]) -> list[str]:
    """Return the names in few texts: those that begin alike, up to the first `_`, as `BEGINNING_{a, b, c}`."""
    members = defaultdict(list)
    for name in names:
        if "_" in name:  # the beginning alone is no member
            members[name.partition("_")[0]].append(name)
    families = {b: found for b, found in members.items() if len(found) >= _MANY}
    alone = [name for name in names if "_" not in name or name.partition("_")[0] not in families]
    texts = [f"{b}_{{{', '.join(n.removeprefix(f'{b}_') for n in found)}}}" for b, found in families.items()]
    return [*([", ".join(alone)] if alone else []), *texts]
