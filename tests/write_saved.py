"""Write small models with the installed version of transformers, for tests that read them with another.

Usage: python tests/write_saved.py   (once for each version; the folders are part of the repository)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge import CLIPVisionModelPool, EWEMoEAlgorithm, RankOneMoEAlgorithm, WEMoEAlgorithm
from fusion_merge.models.clip import pooled_output

SAVED = Path(__file__).parent / "data" / "saved"
METHODS = {
    "wemoe": WEMoEAlgorithm(max_steps=0),
    "e_wemoe": EWEMoEAlgorithm(position_encoding=True, max_steps=0),
    "rankone_moe": RankOneMoEAlgorithm(rank_k=2, select_k=2, max_steps=0),
}
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def random_towers() -> dict[str, CLIPVisionModel]:
    """Towers that do not depend on the version: every weight is drawn here."""
    generator = torch.Generator().manual_seed(0)
    config = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=8)
    towers = {name: CLIPVisionModel(config).eval() for name in ("_pretrained_", "cats", "dogs")}
    for tower in towers.values():
        for _, parameter in sorted(tower.named_parameters(), key=lambda item: item[0].removeprefix("vision_model.")):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return towers


def main() -> int:
    """Write a tower and a merged model of each method, with what they compute."""
    folder = SAVED / f"transformers-{transformers.__version__}"
    towers = random_towers()
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    models: dict[str, torch.nn.Module] = {"tower": towers["_pretrained_"]}
    models |= {name: method.run(CLIPVisionModelPool(towers)) for name, method in METHODS.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        with torch.no_grad():
            outputs = pooled_output(model(pixel_values=pixels))
        save_file({"pixels": pixels, "outputs": outputs}, folder / name / "expected.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
