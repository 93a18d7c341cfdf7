"""Every command and every line of Python in `docs/` is run here as it is written, on tiny8 or on local copies.

Those of fusion_bench's program are run by test_fusion_bench.py.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import upstream
import yaml
from documents import blocks, commands
from hydra import compose, initialize_config_module
from runs import Finished, run_cli

from fusion_merge import registry
from fusion_merge.report.options import options_table
from fusion_merge.schema import register_schema

ROOT = Path(__file__).parents[2]
PAGES = {str(file.relative_to(ROOT / "docs")): file for file in sorted((ROOT / "docs").rglob("*.md"))}
QUICK = ["fast_dev_run=true", "baselines=[]"]
ONE_CONDITION = ["protocol.corruptions=[contrast]", "protocol.clean=false"]
ONLY_SAYS = ("plan", "describe", "fetch", "--help", "--cfg")


def shown(program: str) -> list[tuple[str, str]]:
    """Every command, with the first page that shows it."""
    found: dict[str, str] = {}
    for page, file in PAGES.items():
        for command in commands(file.read_text(encoding="utf-8"), program):
            found.setdefault(command, page)
    return [(page, command) for command, page in found.items()]


def on_local_copies(arguments: list[str], home: Path) -> list[str]:
    """What a user adds who has copies of published models and images in folders: here the same small ones for all."""
    chosen = [a for a in arguments if a.startswith(("modelpool=", "taskpool=")) and "{" not in a]
    if arguments[:1] == ["reproduce"] and len(arguments) > 1:
        chosen += [f"reproduction={arguments[1]}"]
    if not any("clip-vit" in a or a.startswith("reproduction=") for a in chosen):
        return []
    register_schema()
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        config = compose("config", overrides=chosen)
    added = []
    for name in config.modelpool.models:
        added.append(
            f"modelpool.models.{name}={home / 'models' / ('pretrained' if name == '_pretrained_' else 'cats')}"
        )
    tables = [("modelpool", f"{split}_datasets") for split in ("test", "train")]
    for pool, table in (*tables, ("taskpool", "test_datasets"), ("taskpool", "tasks")):
        added += [f"{pool}.{table}.{task}.data={home / 'images.csv'}" for task in config[pool].get(table) or {}]
    if "method=rankone_moe" in arguments:
        added.append("method.rank_k=4")  # the copies are narrower than the default rank
    return added


@pytest.mark.parametrize(("page", "command"), shown("fusion_merge"))
def test_command_of_the_documentation_runs(page, command, home):
    arguments = shlex.split(command)[1:]
    images = sorted((home / "images" / "cats").rglob("*.png"))[:4]
    (home / "images.csv").write_text("path,label\n" + "".join(f"{file},{i % 2}\n" for i, file in enumerate(images)))
    only_says = any(a in ONLY_SAYS for a in arguments) or arguments == ["reproduce"]
    copies = [] if "--cfg" in arguments else on_local_copies(arguments, home)
    if "protocol=robustness" in arguments:
        copies += ONE_CONDITION  # all of them are run by test_protocols.py
    more = [*copies, *([] if only_says else QUICK)]
    run = run_process if "fabric.devices=2" in arguments else run_cli
    result = run(*arguments, *more, cwd=home)
    assert result.code in ((0, 3) if "reproduce" in arguments else (0,)), result.out + result.err
    assert result.out.strip()


def run_process(*arguments: str, cwd: Path) -> Finished:
    """Run the command line in a process of its own: it starts others, and ends with them."""
    command = [sys.executable, "-m", "fusion_merge", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("page", [page for page, file in PAGES.items() if "```python" in file.read_text("utf-8")])
def test_python_of_a_page_runs_from_the_first_line_to_the_last(page, home, monkeypatch):
    registry.list_methods()  # which imports them
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))  # what a page registers stays there
    if page == "fusion-bench.md":
        upstream.import_plugin()  # whose warnings are no business of ours; without fusion_bench the page is not run
    code = "\n".join(blocks(PAGES[page].read_text("utf-8"), "python")).replace("max_steps=200", "max_steps=2")
    with contextlib.chdir(home):
        names: dict[str, object] = {"__name__": "page"}
        exec(compile(code, page, "exec", dont_inherit=True), names)
    assert "model" in names


def test_every_page_is_in_the_navigation_and_every_entry_is_there():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry if isinstance(entry, list) else list(dict(entry).values())  # type: ignore[call-overload]
        return [page for part in parts for page in pages(part)]

    navigation = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(navigation) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = PAGES[page].read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (PAGES[page].parent / link).exists(), link


TABLES = [
    (page, *found)
    for page, file in PAGES.items()
    for found in re.findall(r"<!-- options: (\w+) -->\n(.*?)<!-- end -->", file.read_text("utf-8"), flags=re.DOTALL)
]


@pytest.mark.parametrize(("method", "table"), [entry[1:] for entry in TABLES], ids=[entry[1] for entry in TABLES])
def test_page_of_a_method_explains_its_options_as_they_are(method, table):
    assert table.strip() == options_table(registry.get_method(method)).strip()
