"""Every command and every line of Python in `docs/` is run here as it is written, on tiny8 or on local copies."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from documents import blocks, commands
from runs import run_cli

ROOT = Path(__file__).parents[2]
PAGES = {str(file.relative_to(ROOT / "docs")): file for file in sorted((ROOT / "docs").rglob("*.md"))}
QUICK = ["fast_dev_run=true", "baselines=[]"]
ONLY_SAYS = ("plan", "describe", "fetch", "--help", "--cfg")


def shown(program: str) -> list[tuple[str, str]]:
    return [
        (page, command)
        for page, file in PAGES.items()
        for command in commands(file.read_text(encoding="utf-8"), program)
    ]


@pytest.mark.parametrize(("page", "command"), shown("fusion_merge"))
def test_command_of_the_documentation_runs(page, command, home):
    arguments = shlex.split(command)[1:]
    only_says = any(a in ONLY_SAYS for a in arguments)
    result = run_cli(*arguments, *([] if only_says else QUICK), cwd=home)
    assert result.code == 0, result.err
    assert result.out.strip()


@pytest.mark.parametrize("page", [page for page, file in PAGES.items() if "```python" in file.read_text("utf-8")])
def test_python_of_a_page_runs_from_the_first_line_to_the_last(page, home, monkeypatch):
    from fusion_merge import registry

    monkeypatch.setattr(registry, "_methods", dict(registry._methods))  # what a page registers stays there
    code = "\n".join(blocks(PAGES[page].read_text("utf-8"), "python")).replace("max_steps=200", "max_steps=2")
    with contextlib.chdir(home):
        names: dict[str, object] = {"__name__": "page"}
        exec(compile(code, page, "exec"), names)
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
