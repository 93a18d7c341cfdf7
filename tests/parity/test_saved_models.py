"""Models that one version of transformers wrote are read by another: the same tensors, the same outputs."""

from __future__ import annotations

import pytest
import torch
from helpers import same_state
from safetensors.torch import load_file
from transformers import AutoModel
from write_saved import METHODS, SAVED, random_towers

from fusion_merge import CLIPVisionModelPool, MergedCLIPVisionModel
from fusion_merge.models.clip import module_state, pooled_output

WRITERS = sorted(folder.name for folder in SAVED.iterdir())
by_every_version = pytest.mark.parametrize("writer", WRITERS)


def assert_computes_what_was_written(model: torch.nn.Module, folder) -> None:
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        outputs = pooled_output(model(pixel_values=expected["pixels"]))
    torch.testing.assert_close(outputs, expected["outputs"], atol=1e-6, rtol=1e-5)


def test_there_are_models_of_both_major_versions():
    assert {name.partition("-")[2].partition(".")[0] for name in WRITERS} == {"4", "5"}


@by_every_version
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("reader", [MergedCLIPVisionModel, AutoModel])
def test_a_merged_model_of_another_version_is_the_model(writer, name, reader):
    model = reader.from_pretrained(SAVED / writer / name)
    made_here = METHODS[name].run(CLIPVisionModelPool(random_towers()))
    assert same_state(model.state_dict(), made_here.state_dict())
    assert_computes_what_was_written(model, SAVED / writer / name)


@by_every_version
def test_a_tower_of_another_version_is_the_tower(writer):
    pool = CLIPVisionModelPool({"_pretrained_": str(SAVED / writer / "tower")})
    assert same_state(dict(pool.state("_pretrained_")), module_state(random_towers()["_pretrained_"]))
    assert_computes_what_was_written(pool.load_pretrained_model(), SAVED / writer / "tower")


@by_every_version
def test_what_is_written_here_is_what_was_written_there(writer, tmp_path):
    model = MergedCLIPVisionModel.from_pretrained(SAVED / writer / "wemoe")
    model.save_pretrained(tmp_path)
    there, here = load_file(SAVED / writer / "wemoe" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert same_state(there, here)
