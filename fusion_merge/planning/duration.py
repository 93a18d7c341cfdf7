"""How long a run takes, roughly: operations, and what this machine did in a fraction of a second.

The shares below were measured on layers and models of ViT-B/32; see `benchmarks/`. All times are in seconds.
"""

from __future__ import annotations

from fusion_merge.adaptation.experts import ASKED_TOGETHER
from fusion_merge.adaptation.starts import CHUNK
from fusion_merge.models.measuring import KEPT_IMAGES
from fusion_merge.planning.geometry import FLOAT, Geometry, ModelSize
from fusion_merge.planning.machine import Speed
from fusion_merge.planning.needs import Images, Load, Static, Training
from fusion_merge.planning.working import gram_numbers, merges

_PICTURED = 128
"""Images of each task whose routing is drawn."""

REPEATED = ("starting routers", "asking experts", "adapting", "measuring", "evaluating", "baselines", "pictures")
"""The phases of each run, where a protocol has several."""

START = 6.0
"""Libraries, datasets and processors."""

_BESIDE = 1.1
"""What the products of a forward pass take beside one large product of as many multiplications."""

_PASSES_HIDDEN, _PASSES_WIDTH = 8, 24
"""How often numbers as wide as the MLP, and as the tower, go through memory in each layer."""

_CALL = 1.2e-3
"""Seconds that one layer's forward pass takes, however small it is."""

_BACK = 1.1
"""A backward pass to the inputs, beside a forward pass."""

_MERGING = 6.0
"""What a product of short rows costs beside one of large matrices: merging a weight for each image."""

_DECOMPOSING = 60
"""Passes over a matrix and a subspace of twice the rank in a truncated decomposition."""

_WHOLE = 60
"""Products of a whole decomposition of a matrix (L, S), in L·S²."""

_TRIPLETS = 20
"""Products of a decomposition (L, S) with singular vectors, in L·S²: 14 to 16 was measured on one thread."""

_TRIMMING = 20e-9
"""Seconds for one number of a task vector in each pass that looks for a threshold."""

_SORTING = 60e-9
"""Seconds for one number of a task vector that is pruned and stored sparse."""

_READING = 0.7e9
"""Bytes a second from a file that the system has at hand, to a task vector."""


def times(load: Load, speed: Speed, *, steps: int, workers: int, processes: int = 1) -> dict[str, float]:
    """Return the seconds of each phase.

    Args:
        load: what the run consists of.
        speed: of this machine.
        steps: of training, of all tasks together.
        workers: processes that read images for evaluation.
        processes: that share the work.
    """
    found = {"start": START, "building": building_time(load, speed)}
    if load.clip is not None:
        found["making heads"] = _heads(load, speed)
    if load.started_from:
        found["starting routers"] = starting_time(load, speed)
    if load.training is not None and load.training.asked:
        found["asking experts"] = asking_time(load, load.training, speed)
    if load.training is not None and steps:
        found["adapting"] = steps * step_time(load.tower, load.model, load.training, speed) + _decoded(
            load.adapted, speed, load.training.batch_size * steps
        )
    if load.adapted and load.model.kind is not None:
        found["measuring"] = _looked_at(load, load.adapted, KEPT_IMAGES, speed)
    if load.evaluation_batch:
        found["evaluating"] = (
            load.scorings * _evaluation(load, speed, workers, routed=load.model.kind is not None) / processes
        )
        if load.baselines:
            cached = {name: Images(0, 0, 0) if i.cached else i for name, i in load.scored.items()}  # decoded by then
            plain = _scoring(load, speed, 1.0) + _decoded(cached, speed) / max(1, workers)
            found["baselines"] = len(load.baselines) * plain / processes
        if load.model.kind is not None:
            found["pictures"] = _looked_at(load, load.scored, _PICTURED, speed)
    return found


def forward_time(tower: Geometry, speed: Speed, images: int) -> float:
    """Return the time of a batch in a plain tower.

    Args:
        tower: the shape.
        speed: of this machine.
        images: in the batch.
    """
    moved = FLOAT * tower.tokens * (_PASSES_HIDDEN * tower.hidden + _PASSES_WIDTH * tower.width)
    each = _BESIDE * tower.products / speed.products + tower.layers * moved / speed.traffic
    return images * each + tower.layers * _CALL


def step_time(tower: Geometry, model: ModelSize, training: Training, speed: Speed) -> float:
    """Return the time of one step: one batch of each task, forwards and backwards.

    Args:
        tower: the shape.
        model: what is trained.
        training: how.
        speed: of this machine.
    """
    images, tasks = training.batch_size, training.batches
    forward = forward_time(tower, speed, images)
    if training.whole:
        merging = (3 * training.vectors + (10 if not training.vectors else 6)) * FLOAT * tower.numbers / speed.traffic
        return tasks * (forward * (1 + 2 * _BACK) + merging)
    behind = (tower.layers - model.first) / tower.layers  # before the first routed block nothing goes backwards
    one = forward * (1 + _BACK * behind) + _routed(tower, model, images, training.batch_routing, speed, backward=True)
    return tasks * one + 10 * model.router_bytes / speed.traffic


def _routed(
    tower: Geometry, model: ModelSize, images: int, batch_routing: bool, speed: Speed, *, backward: bool
) -> float:
    """Return the time that experts add to the passes of one batch."""
    tokens = images * tower.tokens
    weights = 2 * model.mlps * tower.matrix + 4 * model.attentions * tower.width**2
    ends = 2 * model.mlps * (tower.width + tower.hidden) + 8 * model.attentions * tower.width
    if model.kind == "low_rank" and not merges(tower, model, tokens, batch_routing):
        return (1 + backward) * ends * tokens * model.coefficients / speed.products
    if model.kind == "low_rank":
        formed = weights * model.coefficients / speed.products
        return formed + backward * ends * tokens * model.coefficients / speed.products
    read = model.experts * FLOAT / speed.traffic
    if model.kind == "sparse":  # zeros are put back
        read = model.coefficients * weights * FLOAT / speed.traffic + model.experts * 3e-9
    gradient = tokens * weights / speed.products
    merged = 0.0 if batch_routing else _MERGING * images * model.coefficients * weights / speed.products
    return (read + merged) + backward * (gradient + (read if batch_routing else read + 2 * merged))


def starting_time(load: Load, speed: Speed) -> float:
    """Return the time until routers are started: a pass of all images, and a ridge regression in each block.

    Args:
        load: what the run consists of.
        speed: of this machine.
    """
    model, images, width = load.model, load.started_from, load.model.router_inputs - 1
    chunks = images / CHUNK
    added = chunks * _routed(load.tower, model, CHUNK, batch_routing=False, speed=speed, backward=False)
    solved = images * width**2 + width**3 / 3 + 2 * images * width * len(load.adapted)  # covariance, and its factors
    solving = 2 * len(model.router_widths) * solved / speed.products  # in double precision, each as long as two
    decoded = sum(min(i.count, load.start_images) for i in load.adapted.values() if not i.cached) * speed.decoding
    kept = _decoded({name: i for name, i in load.adapted.items() if i.cached}, speed) if load.training is None else 0.0
    return chunks * forward_time(load.tower, speed, CHUNK) + added + solving + decoded + kept


def asking_time(load: Load, training: Training, speed: Speed) -> float:
    """Return the time in which every task's own expert looks at the images that will be seen, each once.

    Args:
        load: what the run consists of.
        training: what the answers are for.
        speed: of this machine.
    """
    found = len(load.adapted) * load.tower.numbers * FLOAT / _READING
    for images in load.adapted.values():
        looked = training.asked_of(images)
        found += looked / ASKED_TOGETHER * forward_time(load.tower, speed, ASKED_TOGETHER)
        found += 0.0 if images.cached else looked * speed.decoding
    return found


def building_time(load: Load, speed: Speed) -> float:
    """Return the time until the model is built, not adapted yet.

    Args:
        load: what the run consists of.
        speed: of this machine.
    """
    tower, model = load.tower, load.model
    reading = (load.num_models + 1) * tower.numbers * FLOAT / _READING
    if load.static is not None:
        return _static_time(load, load.static, reading, speed)
    in_mlps, in_attention = (load.num_models * banks for banks in model.banks)
    if model.kind == "sparse":
        return reading + (in_mlps * tower.matrix + in_attention * tower.width**2) * _SORTING
    if model.kind != "low_rank":
        return reading
    rank = model.coefficients // max(1, load.num_models)
    products = in_mlps * _decomposition(tower.width, tower.hidden, rank)
    products += in_attention * _decomposition(tower.width, tower.width, rank)
    return reading + products / speed.products


def _decomposition(inputs: int, outputs: int, rank: int) -> float:
    """Return the products of a truncated decomposition of one matrix, which is iterated where that is cheaper."""
    short, long = sorted((inputs, outputs))
    iterated = short >= 256 and 8 * rank <= short
    return _DECOMPOSING * inputs * outputs * 2 * rank if iterated else _WHOLE * long * short**2 / 8


def _static_time(load: Load, static: Static, reading: float, speed: Speed) -> float:
    """Return the time of a static merge: passes over all models, decompositions of all matrices, and a regression."""
    tower = load.tower
    (short, long), square = sorted((tower.width, tower.hidden)), tower.width**3
    decomposed = tower.layers * (4 * square + 2 * long * short**2) * _TRIPLETS
    found = static.readings * reading + static.decompositions * decomposed / speed.products
    found += (static.readings - 1) * load.num_models * tower.numbers * _TRIMMING
    for images in load.adapted.values() if static.images else ():
        looked = min(static.images, images.count)
        products = looked * tower.tokens * 2 * gram_numbers(tower)  # in double precision, each as long as two
        read = images.count if images.cached else looked
        found += forward_time(tower, speed, looked) + products / speed.products + read * speed.decoding
    return found


def _scoring(load: Load, speed: Speed, passes: float) -> float:
    batches = [(i.used // load.evaluation_batch, i.used % load.evaluation_batch) for i in load.scored.values()]
    whole = sum(n for n, _ in batches) * forward_time(load.tower, speed, load.evaluation_batch)
    return passes * (whole + sum(forward_time(load.tower, speed, rest) for _, rest in batches if rest))


def _evaluation(load: Load, speed: Speed, workers: int, *, routed: bool) -> float:
    images = sum(i.used for i in load.scored.values())
    fresh = {name: i for name, i in load.scored.items() if not (i.cached and name in load.adapted)}
    read = _decoded(fresh, speed) / max(1, workers if any(not i.cached for i in fresh.values()) else 1)
    added = 0.0
    if routed and images:
        batch = max(1, min(load.evaluation_batch, max(i.used for i in load.scored.values())))
        added = images / batch * _routed(load.tower, load.model, batch, load.batch_routing, speed, backward=False)
    return _scoring(load, speed, load.model.passes) + added + read


def _looked_at(load: Load, images: dict[str, Images], most: int, speed: Speed) -> float:
    """Return the time to see how at most so many images of each task are routed."""
    count = sum(min(i.used, most) for i in images.values())
    added = count / most * _routed(load.tower, load.model, most, load.batch_routing, speed, backward=False)
    read = sum(min(i.used, most) for i in images.values() if not i.cached) * speed.decoding
    return count / most * forward_time(load.tower, speed, most) + added + read


def _decoded(images: dict[str, Images], speed: Speed, most: int | None = None) -> float:
    """Return the time to decode images: those that are kept once, others as often as they are asked for."""
    counts = [i.count if i.cached or most is None else most for i in images.values()]
    return sum(counts) * speed.decoding


def _heads(load: Load, speed: Speed) -> float:
    if load.clip is None:
        return 0.0
    reading = load.clip.numbers * FLOAT / _READING
    return reading + forward_time(load.clip, speed, load.all_prompts)
