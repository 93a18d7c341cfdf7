"""What is special about the median, on models of the embedded pool."""

from __future__ import annotations

import pytest
import torch

from fusion_merge import CLIPVisionModelPool, get_method
from fusion_merge.errors import ConfigError
from fusion_merge.models.clip import module_state


def pool(*tasks: str) -> CLIPVisionModelPool:
    """A pool of the towers of these tasks, one after the other."""
    models = {f"{task}{number}": f"zoo://tiny8/{task}" for number, task in enumerate(tasks)}
    return CLIPVisionModelPool({"_pretrained_": "zoo://tiny8/pretrained", **models})


def test_of_three_models_of_which_two_are_equal_the_result_is_those_two():
    models = pool("digits", "dots", "digits")
    merged = module_state(get_method("median")().run(models))
    for name, tensor in models.state("digits0").items():
        torch.testing.assert_close(merged[name], tensor)


def test_without_task_vectors_it_is_the_pretrained_model():
    models = pool("digits", "dots")
    merged = module_state(get_method("median")(scaling_factor=0.0).run(models))
    assert all(torch.equal(merged[name], tensor) for name, tensor in models.state("_pretrained_").items())


def test_negative_weight_is_refused():
    with pytest.raises(ConfigError, match=r"`scaling_factor`=-1\.0"):
        get_method("median")(scaling_factor=-1)
