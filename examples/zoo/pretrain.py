"""Pretrain the small CLIP of an embedded pool, offline, in about ten minutes on two cores.

1. A byte-pair vocabulary is made from the prompts of all tasks.
2. The text tower learns to keep the class prompts apart (a random one hardly does), and is frozen.
3. The vision tower learns to match a few strongly distorted images of every task with their captions.
4. Where the recipe says so, scales are balanced without changing the function, so that fine-tuning moves the MLPs
   most (see `balance`).

Usage: python pretrain.py POOL OUTPUT_FOLDER
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from recipes import RECIPES, Recipe
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from fusion_merge.zoo.tasks import SIZE

log = logging.getLogger("pretrain")

LOGIT_SCALE = 20.0  # while pretraining
CONTEXT = 32
PROJECTION = 64
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def make_tokenizer(recipe: Recipe) -> CLIPTokenizerFast:
    """Make a tokenizer like CLIP's with a small vocabulary: all bytes, and merges found in the prompts."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    prompts = [
        t.format(c)
        for task in recipe.tasks
        for t in recipe.module.templates(task)
        for c in recipe.module.classnames(task, pretraining=True)
    ]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(s + "</w>" for s in alphabet)]
    split = (learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(p)) for p in prompts)
    endings = dict.fromkeys(word[-1] + "</w>" for prompt in split for word, _ in prompt)  # as they first appear
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=2,
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=[*alphabet, *endings],  # number them, or each run breaks ties between merges in its own way
    )
    learner.train_from_iterator(prompts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*symbols, *(a + b for a, b in merges)]
    vocabulary: dict[str, int] = {}
    for piece in [*pieces, "<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(piece, len(vocabulary))
    with tempfile.TemporaryDirectory() as folder:  # files are what both transformers 4.57 and 5 make a tokenizer of
        write_vocabulary(Path(folder), vocabulary, merges)
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, model_max_length=CONTEXT)
    for key in ("is_local", "local_files_only"):  # where it was read from is not part of it
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def write_vocabulary(folder: Path, vocabulary: dict[str, int], merges: Sequence[Sequence[str]]) -> None:
    """Write `vocab.json` and `merges.txt`, as CLIP's tokenizers have them."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_model(recipe: Recipe, tokenizer: CLIPTokenizerFast) -> CLIPModel:
    """Make the untrained model: 0.2 to 0.5 million parameters in the vision tower, most of them in its MLPs."""
    end = len(tokenizer) - 1
    vision = {
        "hidden_size": 64,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": PROJECTION,
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "projection_dim": PROJECTION,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=PROJECTION))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(LOGIT_SCALE))
    return model


def embed_classes(recipe: Recipe, model: CLIPModel, tokenizer: CLIPTokenizerFast, task: str) -> Tensor:
    """Embed the classes of a task: the mean over its templates. Shape: (classes, PROJECTION)."""
    names, templates = recipe.module.classnames(task, pretraining=True), recipe.module.templates(task)
    tokens = tokenizer([t.format(n) for n in names for t in templates], padding=True, return_tensors="pt")
    pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
    embeddings = F.normalize(model.text_projection(pooled), dim=-1)
    return F.normalize(embeddings.view(len(names), len(templates), -1).mean(1), dim=-1)


def spread_classes(
    recipe: Recipe, model: CLIPModel, tokenizer: CLIPTokenizerFast, steps: int = 200, lr: float = 1e-3
) -> None:
    """Train the text tower alone: push apart the classes of each task, and a little those of all tasks."""

    def overlap(e: Tensor) -> Tensor:
        return (e @ e.T - torch.eye(len(e))).relu().square()

    parameters = [*model.text_model.parameters(), *model.text_projection.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        heads = [embed_classes(recipe, model, tokenizer, task) for task in recipe.tasks]
        loss = sum((overlap(e).sum() / len(e) for e in heads), start=10 * overlap(torch.cat(heads)).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log.info("class prompts spread, remaining overlap %.3f", loss.item())


def few_images(recipe: Recipe, task: str) -> tuple[Tensor, Tensor]:
    """Give a few training images of each class. Shapes: (B, 3, 32, 32), values in 0–1; (B,)."""
    data = recipe.module.load_task(task, "train", pretraining=True)
    labels = torch.tensor(data["label"][:])
    count = recipe.images[task]
    chosen = torch.cat(
        [(labels == c).nonzero()[:count, 0] for c in range(len(recipe.module.classnames(task, pretraining=True)))]
    )
    pixels = np.stack([np.asarray(image) for image in data.select(chosen.tolist())["image"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, labels[chosen]


def distort(images: Tensor, generator: torch.Generator, keep_colours: Tensor, strength: float = 0.8) -> Tensor:
    """Turn, shear, scale, move, recolour, invert and roughen images, then normalise them as CLIP does.

    Args:
        images: values in 0–1. Shape: (B, 3, 32, 32).
        generator: source of randomness.
        keep_colours: which images are neither recoloured nor inverted. Shape: (B,).
        strength: of all of it; 0 leaves the images almost as they are.
    """
    batch = len(images)

    def uniform(scale: float, *shape: int) -> Tensor:
        return (torch.rand(batch, *shape, generator=generator) * 2 - 1) * scale * strength

    turn, shear, scale = uniform(0.35), uniform(0.25), 1 + uniform(0.25, 2)
    rows = [
        torch.stack([turn.cos() * scale[:, 0], shear - turn.sin()], dim=1),
        torch.stack([turn.sin(), turn.cos() * scale[:, 1]], dim=1),
    ]
    affine = torch.cat([torch.stack(rows, dim=1), uniform(0.2, 2)[..., None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    colours = torch.rand(batch, 3, generator=generator).argsort(1)
    colours = torch.where(keep_colours[:, None], torch.arange(3), colours)
    images = images.gather(1, colours[:, :, None, None].expand_as(images))
    inverted = (torch.rand(batch, 1, 1, 1, generator=generator) < 0.3 * strength).float()
    inverted = inverted * ~keep_colours[:, None, None, None]
    images = images + inverted * (1 - 2 * images)
    contrast = 1 - 0.1 * strength + uniform(0.5, 1, 1, 1)
    images = (images - 0.5) * contrast + 0.5 + uniform(0.2, 3, 1, 1)
    roughness = 0.12 * strength * torch.rand(batch, 1, 1, 1, generator=generator)
    images = images + roughness * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) - CLIP_MEAN) / CLIP_STD


def pretrain_vision(
    recipe: Recipe,
    model: CLIPModel,
    tokenizer: CLIPTokenizerFast,
    steps: int,
    lr: float = 2e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> None:
    """Train the vision tower and its projection: cross-entropy over the captions of all tasks together."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        heads = [embed_classes(recipe, model, tokenizer, task) for task in recipe.tasks]
    captions, starts = torch.cat(heads), np.cumsum([0] + [len(h) for h in heads])
    pool = [few_images(recipe, task) for task in recipe.tasks]
    images = torch.cat([x for x, _ in pool])
    labels = torch.cat([y + int(start) for (_, y), start in zip(pool, starts, strict=False)])
    by_colour = torch.cat(
        [torch.full((len(y),), recipe.module.TABLE[t].by_colour) for t, (_, y) in zip(recipe.tasks, pool, strict=True)]
    )
    shares = torch.cat(
        [torch.full((len(y),), recipe.shares[t] / len(y)) for t, (_, y) in zip(recipe.tasks, pool, strict=True)]
    )
    model.requires_grad_(False)
    parameters = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    start = time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.multinomial(shares, batch_size, replacement=True, generator=generator)
        pooled = model.vision_model(distort(images[chosen], generator, by_colour[chosen])).pooler_output
        embedded = F.normalize(model.visual_projection(pooled), dim=-1)  # (B, PROJECTION)
        loss = F.cross_entropy(LOGIT_SCALE * embedded @ captions.T, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            log.info("step %d of %d: loss %.3f, %.0f s", step, steps, loss.item(), time.perf_counter() - start)


@torch.no_grad()
def balance(
    model: CLIPModel, embeddings: float = 16.0, attention: float = 6.0, output: float = 3.0, mlp: float = 3.0
) -> None:
    """Move scales between weights and the layer norms before or after them; the function stays the same.

    Adam moves every weight by about the learning rate, so larger weights change less in proportion. In a
    small model, embeddings and attention would move too far otherwise; as they are merged statically, no
    expert could make up for it.

    Args:
        model: changed in place.
        embeddings: factor of the embeddings; `pre_layrnorm` follows them.
        attention: factor of the q, k and v projections; the layer norm before them is divided by it.
        output: factor of the attention's output projection; the v projection is divided by it.
        mlp: divisor of the first linear layer of each MLP; the layer norm before it is multiplied by it.
    """
    tower = model.vision_model
    for weight in (
        tower.embeddings.class_embedding,
        tower.embeddings.patch_embedding.weight,
        tower.embeddings.position_embedding.weight,
    ):
        weight *= embeddings
    for layer in tower.encoder.layers:
        layer.layer_norm1.weight /= attention
        layer.layer_norm1.bias /= attention
        layer.self_attn.q_proj.weight *= attention
        layer.self_attn.k_proj.weight *= attention
        layer.self_attn.v_proj.weight *= attention / output
        layer.self_attn.v_proj.bias /= output
        layer.self_attn.out_proj.weight *= output
        layer.layer_norm2.weight *= mlp
        layer.layer_norm2.bias *= mlp
        layer.mlp.fc1.weight /= mlp


def save(model: CLIPModel, tokenizer: CLIPTokenizerFast, folder: Path) -> None:
    """Save model, tokenizer and image processor in half precision, for transformers 4.57 and 5."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = SIZE
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_vocabulary(folder, bpe["vocab"], bpe["merges"])


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", choices=tuple(RECIPES), help="which pool")
    parser.add_argument("output", type=Path, help="folder of the pretrained model")
    parser.add_argument("--steps", type=int, help="steps of the vision tower; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(arguments.seed)
    recipe = RECIPES[arguments.pool]
    tokenizer = make_tokenizer(recipe)
    model = make_model(recipe, tokenizer)
    spread_classes(recipe, model, tokenizer)
    pretrain_vision(recipe, model, tokenizer, arguments.steps or recipe.steps, seed=arguments.seed)
    if recipe.balanced:
        balance(model)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(recipe.final_logit_scale))
    save(model, tokenizer, arguments.output)
    log.info("saved to %s", arguments.output)


if __name__ == "__main__":
    main()
