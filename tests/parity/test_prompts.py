"""Class names, templates and held-out images of the published tasks against fusion-bench's, one by one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from datasets import Dataset

from fusion_merge.pools.prompts import prompt_names, prompt_set
from fusion_merge.pools.reading import held_out

pytest.importorskip("fusion_bench", reason="fusion-bench is a development dependency")


@pytest.fixture(scope="module")
def reference() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
    return CLIPTemplateFactory


def test_all_twenty_are_compared():
    assert len(prompt_names()) == 20


@pytest.mark.parametrize("task", prompt_names())
def test_class_names_and_templates_are_the_reference_s(reference, task):
    classnames, templates = reference.get_classnames_and_templates(task)
    ours = prompt_set(task)
    assert list(ours.classnames) == list(classnames)
    assert len(ours.templates) == len(templates)
    for template, function in zip(ours.templates, templates, strict=True):
        assert [template.replace("{}", name) for name in classnames] == [function(name) for name in classnames]


@pytest.mark.parametrize("size", [10, 19, 20, 257])
def test_held_out_images_are_the_reference_s_validation_split(size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.utils.data import train_validation_split
    train = Dataset.from_dict({"label": list(range(size))})
    theirs: Any = train_validation_split(train, 0.1, None, random_seed=0, return_split="val")
    assert held_out(train)["label"][:] == [theirs[i]["label"] for i in range(len(theirs))]
    assert len(held_out(train)) == size // 10
