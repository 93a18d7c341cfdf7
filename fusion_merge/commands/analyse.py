"""`fusion_merge analyse NAME`: one picture of models or of a method, and its numbers; without a name, list them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fusion_merge.commands import plan
from fusion_merge.errors import ConfigError, nearest
from fusion_merge.protocols.analyses import ANALYSES, Analysis

log = logging.getLogger(__name__)


def run(config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
    """See `Command.run`."""
    name = config["analyse"]["name"]
    if name is None:
        table = tabulate(list(ANALYSES.items()), headers=["analysis", "what it shows"])
        log.info("%s\n\ndraw one with `fusion_merge analyse NAME`", table)
        return 0
    if name not in ANALYSES:
        raise ConfigError(f"`{name}` is not an analysis; {nearest(str(name), ANALYSES)}")
    for key in ("protocol", "evaluate_routings", "unknown_task"):
        if config[key] not in (None, False):
            raise ConfigError(f"`{key}` is for runs that are scored, and an analysis is none; leave it out")
    analysis = Analysis(name, config, output_dir, typed)
    if config["plan"] and analysis.needs_a_run:
        return plan.run({**config, "baselines": []}, output_dir, typed)  # of one run, where there are several
    if config["plan"] or config["dry_run"]:
        analysis.check()
        log.info("%s\ndry run: nothing was computed or written", analysis.plan())
        return 0
    analysis.run()
    return 0
