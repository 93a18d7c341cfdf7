"""The rules of the house that can be read off the source: who imports whom, and what library code never does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fusion_merge

ROOT = Path(fusion_merge.__file__).parent
FILES = {str(file.relative_to(ROOT)): file for file in sorted(ROOT.rglob("*.py"))}

LAYERS = (
    "errors",
    "presets",
    ("files", "options", "schema", "composition", "registry", "zoo"),
    ("sealed", "processes"),
    "commits",
    "task_vectors",
    ("merging", "moe"),
    "models",
    "pools",
    "adaptation",
    "methods",
    "report",
    "planning",
    "program",
    "protocols",
    ("commands", "explanations", "help"),
    ("cli", "plugins"),
    "__main__",
)
"""From the ground up: a part imports what is below it, and its own files."""

LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in ([parts] if isinstance(parts, str) else parts)}


TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def part_of(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, without what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from runtime_nodes(child)


def runtime_imports(name: str) -> list[str]:
    """The modules that a file imports when it runs, inside functions too."""
    found = []
    for node in runtime_nodes(TREES[name]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append(f"fusion_merge.{part_of(name)}")  # a relative import stays at home
            elif node.module == "fusion_merge":
                found += [f"fusion_merge.{alias.name}" for alias in node.names]
            else:
                found.append(node.module or "")
    return found


def imports_of(*packages: str, beside: set[str]) -> list[str]:
    """The files that import one of the packages when they run, but for those parts that may."""
    return [
        f"{name} imports {module}"
        for name in FILES
        if part_of(name) not in beside
        for module in runtime_imports(name)
        if module.split(".")[0] in packages
    ]


def test_the_library_was_found():
    assert {"cli.py", "program.py", "moe/layer.py", "methods/wemoe.py"} <= FILES.keys()


def test_every_part_has_its_place():
    assert {part_of(name) for name in FILES} - LEVEL.keys() == {"__init__"}


def test_imports_go_down():
    upwards = []
    for name in FILES:
        own = part_of(name)
        inner = {module.split(".")[1] for module in runtime_imports(name) if module.startswith("fusion_merge.")}
        upwards += [f"{name} imports {part}" for part in inner - {own} if LEVEL[part] >= LEVEL.get(own, len(LAYERS))]
    assert upwards == []


def test_lightning_is_known_to_adaptation_and_the_program_alone():
    assert imports_of("lightning", "lightning_fabric", beside={"adaptation", "program"}) == []


def test_mathematics_knows_of_torch_alone():
    others = {part_of(name) for name in FILES} - {"merging", "moe", "task_vectors"}
    heavy = ("transformers", "hydra", "omegaconf", "lightning_fabric", "datasets", "huggingface_hub", "safetensors")
    assert imports_of(*heavy, beside=others) == []


def test_hydra_s_configs_are_known_at_the_edge_alone():
    assert imports_of("omegaconf", beside={"cli", "explanations", "composition", "help", "schema", "plugins"}) == []


def test_library_code_does_not_print():
    calls = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [f"{n}:{c.lineno}" for n, c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"] == []


def test_library_code_does_not_assert():
    found = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert [f"{name}:{node.lineno}" for name, node in found] == []


def test_no_module_is_longer_than_four_hundred_lines():
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_method_files_have_one_public_class_each():
    for name in FILES:
        if part_of(name) == "methods" and not name.endswith("__init__.py"):
            public = [n.name for n in TREES[name].body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
            assert len(public) == 1, name
