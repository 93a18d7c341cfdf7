"""Write a pool at real size, without a network: a CLIP of ViT-B/32 geometry, fine-tuned towers, and JPEG images.

Weights are random. A tower differs from the pretrained one as fine-tuning makes it differ: by a few percent of each
weight's norm, most of it of low rank. Images are of mixed sizes, one folder a class, one folder of those a task.

    OUTPUT/pretrained/   CLIPModel with text tower, and its CLIPProcessor
    OUTPUT/TASK/         CLIPVisionModel, for each task
    OUTPUT/images/TASK/CLASS/NUMBER.jpg
    OUTPUT/arguments.txt the arguments of `fusion_merge` that name all of these

Usage: python make_checkpoints.py --output FOLDER [--layers 12] [--tasks 8] [--images 64] [--dtype float16] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel

CLASSES = 4
CHANGE = 0.03  # norm of a task vector, of that of the weight
RANK = 16
LOW_RANK = 0.9  # norm of the part of low rank, of that of the task vector
CONTEXT = 77
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def clip_config(layers: int) -> CLIPConfig:
    """Return the configuration of `openai/clip-vit-base-patch32`, of some depth; tokens are those of `write_tokenizer`.

    Args:
        layers: of each tower, at least 1; the original has 12.
    """
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408}
    text |= {"max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPConfig(
        vision_config=vision | {"patch_size": 32, "num_hidden_layers": layers},
        text_config=text | {"num_hidden_layers": layers},
        projection_dim=512,
        logit_scale_init_value=4.6052,  # 100 after training
    )


def write_processor(folder: Path) -> None:
    """Write the files of a CLIP processor: the original's image processor, and a tokenizer of single bytes.

    Args:
        folder: where.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "pad_token": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    CLIPImageProcessor().save_pretrained(folder)


def change(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return what fine-tuning might add to a weight: a product of low rank, and noise.

    Args:
        weight: the pretrained weight; what has one dimension gets noise alone.
        generator: where random numbers come from.

    Shape:
        that of `weight`.
    """
    noise = torch.randn(weight.shape, generator=generator)
    if weight.dim() < 2:
        return 1e-3 * noise
    flat = weight.flatten(1)  # (O, I), also of the patches' convolution
    rank = min(RANK, *flat.shape)
    left = torch.randn(flat.shape[0], rank, generator=generator)
    right = torch.randn(rank, flat.shape[1], generator=generator) * torch.linspace(1, 0.1, rank)[:, None]
    low_rank = (left @ right).view_as(weight)
    parts = LOW_RANK * low_rank / low_rank.norm() + (1 - LOW_RANK**2) ** 0.5 * noise / noise.norm()
    return CHANGE * weight.norm() * parts


def write_tower(folder: Path, model: CLIPModel, seed: int, dtype: torch.dtype) -> None:
    """Write a fine-tuned vision tower.

    Args:
        folder: where.
        model: the pretrained model; not changed.
        seed: of the change.
        dtype: what the weights are stored in.
    """
    tower = CLIPVisionModel(model.config.vision_config)
    own = {name.removeprefix("vision_model."): tensor for name, tensor in model.vision_model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            pretrained = own[name.removeprefix("vision_model.")]
            parameter.copy_(pretrained + change(pretrained, generator))
    tower.to(dtype).save_pretrained(folder)


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write JPEG images of mixed sizes; a class has a colour and a pattern.

    Args:
        folder: where; one folder a class in it.
        count: how many, at least `CLASSES`.
        seed: of the task.
    """
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, (CLASSES, 6, 6, 3))
    for i in range(count):
        label = i % CLASSES
        pixels = np.clip(patterns[label] + rng.integers(-60, 60, (6, 6, 3)), 0, 255).astype(np.uint8)
        size = tuple(rng.integers(160, 641, 2).tolist())
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        place = folder / f"class_{label}"
        place.mkdir(parents=True, exist_ok=True)
        (image.convert("L") if i % 16 == 15 else image).save(place / f"{i:05}.jpg", quality=90)


def write_arguments(folder: Path, tasks: list[str]) -> None:
    """Write the arguments that name models and images, one a line, for `$(cat arguments.txt)`.

    Args:
        folder: where all of them are; its path must have no spaces.
        tasks: their names.
    """
    root = folder.resolve()
    lines = ["modelpool=clip_vision", "taskpool=clip_vision", f"+modelpool.models._pretrained_={root / 'pretrained'}"]
    lines += [f"+modelpool.models.{task}={root / task}" for task in tasks]
    lines += [f"+taskpool.tasks.{task}.data={root / 'images' / task}" for task in tasks]
    (folder / "arguments.txt").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Write the pool.

    Args:
        arguments: of the command line; by default those of this process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder; about 1.8 GB with the defaults")
    parser.add_argument("--layers", type=int, default=12, help="of each tower")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=64, help="of each task")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="of the stored weights")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if min(options.layers, options.tasks) < 1 or options.images < CLASSES:
        parser.error(f"give at least one layer, one task, and {CLASSES} images")
    tasks = [f"task_{i + 1}" for i in range(options.tasks)]
    torch.manual_seed(options.seed)
    model = CLIPModel(clip_config(options.layers)).eval()
    for i, task in enumerate(tasks):
        seed = 1000 * options.seed + i
        write_tower(options.output / task, model, seed, DTYPES[options.dtype])
        write_images(options.output / "images" / task, options.images, seed)
        print(f"{options.output / task}")
    nn.Module.to(model, DTYPES[options.dtype]).save_pretrained(options.output / "pretrained")
    write_processor(options.output / "pretrained")
    write_arguments(options.output, tasks)
    print(f"{options.output / 'pretrained'}")


if __name__ == "__main__":
    main()
