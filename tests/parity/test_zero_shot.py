"""Zero-shot heads and scores against transformers' own `CLIPModel`, one image and one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool, zoo
from fusion_merge.models.clip import pooled_output
from fusion_merge.zoo import tiny8

try:
    from transformers import CLIPImageProcessorPil as ImageProcessor  # transformers 5, with or without torchvision
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor

TEMPLATES = {"cats": ["a photo of a {}."], "dogs": ["a photo of a {}, a dog.", "{}!", "one {} here"]}
EVERY_TASK = (*tiny8.TASKS, *tiny8.UNSEEN_TASKS)

LOGITS = {"rtol": 0.0, "atol": 1e-5}
"""Logits are cosines times a scale of 5 to 15, in float32."""


@dataclass(frozen=True)
class Reference:
    """A plain transformers evaluation: it knows a folder, class names, templates, and nothing of this library."""

    clip: CLIPModel
    tokenizer: Any
    image_processor: Any

    @classmethod
    def read(cls, folder: Path) -> Reference:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        processor = ImageProcessor.from_pretrained(folder)
        return cls(clip, AutoTokenizer.from_pretrained(folder), processor)

    @torch.no_grad()
    def classes(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One row a class: its prompts, each of unit length, averaged, and of unit length again (C, P)."""
        rows = []
        for name in names:
            total = torch.zeros(self.clip.config.projection_dim)
            for template in templates:
                tokens = self.tokenizer([template.replace("{}", name)], return_tensors="pt")
                features = embedding(self.clip.get_text_features(**tokens))[0]  # (P,)
                total += features / features.square().sum().sqrt() / len(templates)
            rows.append(total / total.square().sum().sqrt())
        return torch.stack(rows)

    @torch.no_grad()
    def logits(self, image: Image.Image, classes: Tensor) -> Tensor:
        """The logits of a single image (C,)."""
        pixels = self.image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        features = embedding(self.clip.get_image_features(pixel_values=pixels))[0]  # (P,)
        return self.clip.logit_scale.exp() * (classes @ (features / features.square().sum().sqrt()))


def embedding(output: Any) -> Tensor:
    """What `get_…_features` is for: a tensor in transformers 4, an object that holds it in transformers 5."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def scores(logits: Sequence[Tensor], labels: Sequence[int]) -> dict[str, Any]:
    """Accuracy and mean cross-entropy, sample by sample."""
    right = sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    losses = [float(row.logsumexp(0) - row[label]) for row, label in zip(logits, labels, strict=True)]
    count = len(labels)
    return {"accuracy": pytest.approx(right / count), "loss": pytest.approx(sum(losses) / count, rel=1e-5)}


@torch.no_grad()
def own_logits(pool: CLIPVisionModelTaskPool, task: str, tower: torch.nn.Module, count: int) -> Iterator[Tensor]:
    """The library's logits of a task's first images, in one batch."""
    images = pool.images(task)
    pixels = torch.stack([images[index][0] for index in range(count)])
    yield from pool.head(task)(pooled_output(tower(pixel_values=pixels)))


# The small pool


@pytest.fixture(scope="module")
def small(pool_dir) -> Reference:
    return Reference.read(pool_dir / "pretrained")


def small_pool(pool_dir: Path) -> CLIPVisionModelTaskPool:
    tasks = {t: {"data": str(pool_dir / "images" / t), "templates": TEMPLATES[t]} for t in TASKS}
    return CLIPVisionModelTaskPool(tasks, clip_model=str(pool_dir / "pretrained"), batch_size=5)


def small_images(pool_dir: Path, task: str) -> tuple[list[str], list[Path], list[int]]:
    """Class names, files and labels as an image folder orders them."""
    folders = sorted((pool_dir / "images" / task).iterdir())
    files = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    return [folder.name for folder in folders], [file for file, _ in files], [label for _, label in files]


@pytest.mark.parametrize("task", TASKS)
def test_small_logits_and_scores_are_those_of_transformers(pool_dir, modelpool, small, task):
    names, files, labels = small_images(pool_dir, task)
    classes = small.classes(names, TEMPLATES[task])
    pool, tower = small_pool(pool_dir), modelpool.load_pretrained_model()
    torch.testing.assert_close(pool.head(task).embeddings, classes)
    expected = [small.logits(Image.open(file), classes) for file in files]
    own = list(own_logits(pool, task, tower, len(files)))
    assert [pool.task(task).item(i)[1] for i in range(len(files))] == labels
    for mine, plain in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, plain, **LOGITS)
    assert pool.evaluate(tower)[task] == scores(expected, labels)


@pytest.mark.parametrize("task", TASKS)
def test_a_fine_tuned_tower_under_the_pretrained_head_is_scored_as_transformers_would(pool_dir, modelpool, small, task):
    names, files, labels = small_images(pool_dir, task)
    tuned = Reference.read(pool_dir / "pretrained")
    with_tower(tuned.clip, pool_dir / task)
    expected = [tuned.logits(Image.open(file), small.classes(names, TEMPLATES[task])) for file in files]
    assert small_pool(pool_dir).evaluate(modelpool.load_model(task))[task] == scores(expected, labels)


def with_tower(clip: CLIPModel, folder: Path) -> None:
    """Put a fine-tuned tower into a whole model, by transformers alone."""
    tower = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    state = getattr(tower, "vision_model", tower).state_dict()  # nested in transformers 4, flat in 5
    clip.vision_model.load_state_dict(state)


# The embedded pool


@pytest.fixture(scope="module")
def embedded() -> Reference:
    return Reference.read(zoo.path("zoo://tiny8/pretrained"))


@pytest.fixture(scope="module")
def embedded_pool() -> CLIPVisionModelTaskPool:
    tasks = {task: f"zoo://tiny8/{task}" for task in EVERY_TASK}
    return CLIPVisionModelTaskPool(tasks, clip_model="zoo://tiny8/pretrained", num_workers=0)


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModel:
    models = {name: f"zoo://tiny8/{name.strip('_')}" for name in ("_pretrained_", *tiny8.TASKS)}
    return CLIPVisionModelPool(models).load_pretrained_model()


@pytest.mark.parametrize("task", EVERY_TASK)
def test_embedded_logits_and_scores_are_those_of_transformers(embedded, embedded_pool, tower, task):
    data = tiny8.load_task(task, "test")
    classes = embedded.classes(data.features["label"].names, tiny8.templates(task))
    torch.testing.assert_close(embedded_pool.head(task).embeddings, classes)
    expected = [embedded.logits(image, classes) for image in data["image"]]
    own = list(own_logits(embedded_pool, task, tower, len(data)))
    for mine, plain in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, plain, **LOGITS)
    assert embedded_pool.evaluate(tower, tasks=[task])[task] == scores(expected, data["label"])
