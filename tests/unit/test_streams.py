"""Progress of an adaptation is known by all that it depends on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TASKS
from PIL import Image

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool, WEMoEAlgorithm


def _brighter(copy: Path, _options: dict) -> None:
    file = copy / "images" / "cats" / "tabby" / "3.png"
    Image.open(file).point(lambda value: min(255, value + 9)).save(file)


def _other_processor(copy: Path, _options: dict) -> None:
    file = copy / "pretrained" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))


def _other_prompts(_copy: Path, options: dict) -> None:
    options["templates"] = ["a picture of a {}."]


def _other_names(_copy: Path, options: dict) -> None:
    options["classnames"] = {"tabby": "grey tabby", "siamese": "siamese"}


def _other_tokenizer(copy: Path, _options: dict) -> None:
    file = copy / "pretrained" / "vocab.json"
    table = json.loads(file.read_text())
    table["a"], table["e"] = table["e"], table["a"]
    file.write_text(json.dumps(table))


def _other_activation(copy: Path, _options: dict) -> None:
    file = copy / "pretrained" / "config.json"
    table = json.loads(file.read_text())
    table["text_config"]["hidden_act"] = "relu"
    file.write_text(json.dumps(table))


def _other_place(copy: Path, _options: dict) -> None:
    """The same data in another place are the same data."""


@pytest.mark.parametrize(
    ("change", "resumed"),
    [
        (_other_place, 2),
        *((change, 0) for change in (_brighter, _other_processor, _other_prompts, _other_names)),
        *((change, 0) for change in (_other_tokenizer, _other_activation)),
    ],
)
def test_only_the_same_images_and_heads_are_gone_on_with(pool_dir, tmp_path, change: Callable, resumed):
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {t: str(pool_dir / t) for t in TASKS}

    def resumed_at(root: Path, options: dict, steps: int) -> int:
        tasks = {t: {"data": str(root / "images" / t)} for t in TASKS}
        tasks["cats"] |= options
        tasks_pool = CLIPVisionModelTaskPool(tasks, clip_model=str(root / "pretrained"))
        method = WEMoEAlgorithm(cache_dir=str(tmp_path / "state"), resume=True, max_steps=steps, batch_size=2)
        method.run(CLIPVisionModelPool(models), tasks_pool)
        return method.record.resumed_at

    assert resumed_at(pool_dir, {}, 2) == 0
    copy, options = tmp_path / "copy", {}
    for part in ("images", "pretrained"):
        shutil.copytree(pool_dir / part, copy / part)
    change(copy, options)
    assert resumed_at(copy, options, 3) == resumed
