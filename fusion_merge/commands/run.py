"""`fusion_merge run`, or no word at all: make the merged model, score it, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_merge.protocols.base import make_program

log = logging.getLogger(__name__)


def run(config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
    """See `Command.run`."""
    program = make_program(config, output_dir, typed)
    if config["dry_run"]:
        program.check()
        log.info("%s\ndry run: nothing was computed or written", program.plan())
    else:
        program.run()
    return 0
