"""How long it takes until a program is there: importing, and showing its help."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.report import OURS_TO_FLOOR, Row, Target, timed_row
from benchmarks.settings import Settings
from benchmarks.timing import compare

ROOT = Path(__file__).parents[1]

_TARGET = Target(OURS_TO_FLOOR, 1.5)
_BARE = """
import hydra


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(config):
    pass


main()
"""


def run(*arguments: str) -> str:
    """Run Python with this repository's packages; return what it prints.

    Args:
        *arguments: of Python.

    Raises:
        RuntimeError: if it fails.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} fails:\n{done.stderr[-3000:]}")
    return done.stdout


def startup_rows(settings: Settings) -> Iterator[Row]:
    """Time starting, each time in a process of its own.

    Args:
        settings: of the run.
    """
    note = "Wall time of whole processes. The floor of importing is `import hydra`, that of `--help` a bare Hydra "
    note += "program with a configuration of one key."
    imports = {"floor": partial(run, "-c", "import hydra"), "ours": partial(run, "-c", "import fusion_merge")}
    yield timed_row("startup", "`import fusion_merge`", compare(imports, settings), target=_TARGET, note=note)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bare.py"
        program.write_text(_BARE)
        (Path(folder) / "config.yaml").write_text("seed: 0\n")
        calls = {"floor": partial(run, str(program), "--help"), "ours": partial(run, "-m", "fusion_merge", "--help")}
        yield timed_row("startup", "`fusion_merge --help`", compare(calls, settings), target=_TARGET, note=note)
