"""What single pieces of a run's work hold in memory while they last, by arithmetic; in bytes."""

from __future__ import annotations

from fusion_merge.adaptation.experts import ASKED_TOGETHER
from fusion_merge.adaptation.starts import CHUNK
from fusion_merge.models.measuring import KEPT_IMAGES
from fusion_merge.moe.row_blocks import SAMPLES, block_rows
from fusion_merge.planning.geometry import FLOAT, Geometry, ModelSize
from fusion_merge.planning.needs import Load, Training

_PROMPTS = 256
"""Prompts that go through the text tower at a time."""

_BETWEEN = 5
"""Tensors of the width of the tower that are alive between its blocks, and are of all images while routers start."""

_COPIES = 4
"""Copies of all models' task vectors of one tensor that a static merge works with, at most."""


def building(load: Load) -> int:
    """Return what is made beside the finished model while one linear layer is upcycled.

    Args:
        load: what memory depends on.
    """
    matrix = load.tower.matrix if load.model.mlps or load.model.kind is None else load.tower.width**2
    one = 3 * FLOAT * matrix  # a fine-tuned weight, the pretrained one, and their difference
    stack = load.num_models * matrix
    if load.model.kind == "sparse":
        in_mlps, in_attention = load.model.banks
        kept = load.model.experts * matrix // (in_mlps * load.tower.matrix + in_attention * load.tower.width**2)
        return one + 2 * FLOAT * stack + stack + 5 * 8 * kept  # laid out in blocks; places are whole numbers of 8 bytes
    if load.model.kind == "low_rank":
        return 2 * one
    if load.static is not None:
        working = _COPIES * FLOAT * stack
        return working + (FLOAT * load.tower.numbers if load.static.images else 0)  # the model that looks at images
    if load.model.kind is None:
        return FLOAT * load.tower.numbers  # the merged state, of which the tower is a copy
    return one + (FLOAT * stack if load.number < FLOAT else 0)


def grams(load: Load) -> int:
    """Return what a regression keeps for all layers: sums of Gram matrices and products, and one model's matrices.

    Args:
        load: what memory depends on.
    """
    if load.static is None or not load.static.images:
        return 0
    tower = load.tower
    one = gram_numbers(tower)
    products = tower.layers * (4 * tower.width**2 + 2 * tower.matrix)
    return 2 * FLOAT * (2 * one + products)  # in double precision


def gram_numbers(tower: Geometry) -> int:
    """Return the numbers in the Gram matrices of one model: queries, keys and values share one.

    Args:
        tower: the shape.
    """
    return tower.layers * (3 * tower.width**2 + tower.hidden**2)


def kept_for_backward(tower: Geometry, model: ModelSize, training: Training) -> int:
    """Return what the forward pass of one batch keeps for the backward pass.

    Args:
        tower: the shape.
        model: what is trained.
        training: how.
    """
    tokens = training.batch_size * tower.tokens
    if training.whole:
        each = 9 * tower.width + (tower.kept_by_activation + 1) * tower.hidden
        return FLOAT * (tower.layers * tokens * each + training.batch_size * tower.inputs)
    attention = 6 * tower.width  # the inputs of both norms, q, k, v and the output
    behind = tower.layers - model.first  # before the first routed block nothing is kept
    numbers = (behind * attention - tower.width if model.attentions else (behind - 1) * attention) * tokens
    numbers += tokens * (tower.width + sum(model.router_widths))
    plain = mlp = tower.kept_by_activation * tower.hidden
    inputs = tower.width + tower.hidden  # of both linear layers
    if merges(tower, model, tokens, training.batch_routing):
        mlp += inputs
        numbers += 2 * model.mlps * tower.matrix
    elif model.kind == "low_rank":
        mlp += 2 * model.coefficients + (tower.width if any(model.router_widths) else 0)
    else:
        mlp += inputs
    if model.attentions:  # of the four projections: what each experts' bank keeps, or the weights that are merged
        merged = merges(tower, model, tokens, training.batch_routing)
        kept = 4 * model.coefficients if model.kind == "low_rank" and not merged else tower.width
        numbers += model.attentions * (tokens * kept + 4 * merged * tower.width**2)
    return FLOAT * (numbers + tokens * (model.mlps * mlp + (behind - model.mlps) * plain))


def at_hand(tower: Geometry, training: Training) -> int:
    """Return what a step works with beside what is kept: gradients under way, and every task's images.

    Args:
        tower: the shape.
        training: how.
    """
    tokens = training.together * training.batch_size * tower.tokens
    copied = training.together if training.together > 1 else 0  # where several batches become one
    images = (training.batches + copied) * training.batch_size
    return FLOAT * (4 * tokens * tower.hidden + 2 * tower.matrix + images * tower.inputs)


def merges(tower: Geometry, model: ModelSize, tokens: int, batch_routing: bool) -> bool:
    """Tell whether a batch has a merged weight of its own: low-rank experts go without where that is cheaper.

    Args:
        tower: the shape.
        model: with its experts.
        tokens: of a batch.
        batch_routing: whether a batch shares one merged weight.
    """
    return batch_routing and (model.kind != "low_rank" or tower.matrix < tokens * (tower.width + tower.hidden))


def evaluation(load: Load, *, routed: bool = True) -> int:
    """Return what the forward pass of a batch without gradients works with.

    Args:
        load: what memory depends on.
        routed: whether the model is a routed one; a plain tower otherwise.
    """
    largest = max((images.used for images in load.scored.values()), default=0)
    return without_gradients(load, min(load.evaluation_batch, largest), routed=routed)


def measuring(load: Load) -> int:
    """Return what measuring a task works with: a pass, and what routers read, which is copied to take in one more task.

    Args:
        load: what memory depends on.
    """
    largest = max((min(images.count, KEPT_IMAGES) for images in load.adapted.values()), default=0)
    return without_gradients(load, largest) + load.model.input_bytes


def asking(load: Load, training: Training) -> int:
    """Return what an expert works with.

    Args:
        load: what memory depends on.
        training: what its answers are for.
    """
    largest = max((training.asked_of(images) for images in load.adapted.values()), default=0)
    return without_gradients(load, min(ASKED_TOGETHER, largest), routed=False)


def without_gradients(load: Load, images: int, *, routed: bool = True) -> int:
    """Return what a forward pass without gradients works with, its images included.

    Args:
        load: what memory depends on.
        images: in the batch.
        routed: whether the model is a routed one; a plain tower otherwise.
    """
    tower = load.tower
    mlp = 3 * tower.hidden + 2 * tower.width
    if routed and load.model.kind == "low_rank":
        mlp += 2 * load.model.coefficients
    working = images * tower.tokens * max(mlp, 6 * tower.width) + 2 * images * tower.inputs
    return FLOAT * (working + (2 * tower.matrix if routed and load.batch_routing else 0))


def starting(load: Load) -> int:
    """Return what a block works with in the pass in which routers start, all images in one batch, which is not counted.

    Blocks take a chunk of the images at a time; what is between them is there for all.

    Args:
        load: what memory depends on.
    """
    tower, model, images = load.tower, load.model, load.started_from
    chunk = min(images, CHUNK)
    tokens = chunk * tower.tokens
    block = tokens * max((1 + tower.kept_by_activation) * tower.hidden, 6 * tower.width)
    if model.kind in ("dense", "sparse") and model.mlps:
        block = max(block, tokens * tower.hidden + _merging(load, chunk, tower.hidden))
    if model.kind in ("dense", "sparse") and model.attentions:
        block = max(block, tokens * 3 * tower.width + _merging(load, chunk, tower.width))
    between = images * tower.tokens * _BETWEEN * tower.width
    return FLOAT * (between + block - tokens * tower.width)  # the last chunk has no output yet


def reading(load: Load) -> int:
    """Return what a router works with that reads all images at once, before its block, in the same pass.

    Args:
        load: what memory depends on.
    """
    each = 3 * load.tower.width + 2 * max(load.model.router_widths, default=0)
    return FLOAT * load.started_from * load.tower.tokens * each


def _merging(load: Load, images: int, width: int) -> int:
    """Return the numbers of a block of rows: of each image's merged weight and outputs, and of all task vectors."""
    short, long = sorted((load.tower.width, width))
    rows, samples = min(block_rows(short), long), min(images, SAMPLES)
    return rows * (samples * (short + load.tower.tokens) + load.model.coefficients * short)


def regression(load: Load) -> int:
    """Return what the ridge regression of one block works with: features and covariance, in double precision.

    Args:
        load: what memory depends on.
    """
    width = load.model.router_inputs - 1
    return 2 * FLOAT * (3 * load.started_from * width + 2 * width**2)


def prompts(load: Load) -> int:
    """Return what the text tower works with.

    Args:
        load: what memory depends on.
    """
    if load.clip is None:
        return 0
    batch = min(_PROMPTS, load.prompts)
    return FLOAT * batch * load.clip.tokens * (3 * load.clip.hidden + 2 * load.clip.width)
