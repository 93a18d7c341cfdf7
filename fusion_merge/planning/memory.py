"""How much memory each phase of a run takes: what is alive then, by arithmetic, and a few constants that were measured.

All is counted in bytes. On a GPU, what computes is there, and what is read or waits is in the host's memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion_merge.planning.geometry import FLOAT, Geometry, ModelSize
from fusion_merge.pools.images import CACHE_BYTES

LIBRARIES = "interpreter and libraries"

_MORE_LIBRARIES = 60 * 10**6
"""What a run loads or makes beside what planning has loaded: code, buffers of matrix products, threads."""

_GPU = 600 * 10**6
"""What CUDA and its libraries take on a device."""

_PROMPTS = 256
"""Prompts that go through the text tower at a time."""

_LARGE = 32 * 2**20
"""From this size on, blocks of memory go back to the system when they are freed (glibc)."""

_GAPS = 0.2
"""What is lost between smaller blocks that are kept for the backward pass, beside them; 0.1 to 0.35 was measured."""

_KEPT = 0.95
"""What of smaller blocks stays in the process when they are freed."""

_COPIES = 4
"""Copies of all models' task vectors of one tensor that a static merge works with, at most."""

_BESIDE_FREED = 0.25
"""What of a later phase does not fit into what was freed."""


@dataclass(frozen=True)
class Images:
    """The images of one task.

    Attributes:
        count: how many.
        bytes: of one when it is preprocessed.
        used: how many are scored, which may be fewer.
    """

    count: int
    bytes: int
    used: int

    @property
    def cached(self) -> int:
        """Bytes of what is kept in memory; 0 where they are too many."""
        total = self.count * self.bytes
        return total if total <= CACHE_BYTES else 0


@dataclass(frozen=True)
class Training:
    """How something is trained.

    Attributes:
        batch_size: images of each task a step.
        tasks: whose graphs are alive at a time.
        batches: that are at hand at a time.
        batch_routing: whether a batch shares one merged weight.
        state: tensors that the optimiser keeps of each trained one, its gradient and its earlier value included.
        whole: whether the whole tower is trained, not routers alone.
        vectors: task vectors that are merged anew in each pass; 0 where none are.
        asked: whether each task's own expert is asked about every image.
    """

    batch_size: int
    tasks: int = 1
    batches: int = 1
    batch_routing: bool = True
    state: int = 4
    whole: bool = False
    vectors: int = 0
    asked: bool = False


@dataclass(frozen=True)
class Static:
    """What a static method does that is more than one pass over all tensors.

    Attributes:
        readings: how often each model is read.
        decompositions: of each matrix, whole ones.
        images: of each task that its model looks at, for Gram matrices of the inputs of linear layers.
        batch_size: images at a time.
    """

    readings: int = 1
    decompositions: int = 0
    images: int = 0
    batch_size: int = 1


@dataclass(frozen=True)
class Load:
    """What memory depends on.

    Attributes:
        tower: the shape of the vision tower.
        model: the size of the model that is made.
        num_models: how many fine-tuned models there are.
        base: what the process has in memory now.
        clip: the text tower's shape, and the numbers of the whole CLIP; None without heads.
        prompts: how many the largest task has.
        all_prompts: how many all tasks have.
        adapted: images that are trained on, by task.
        scored: images that are scored on, by task.
        training: how something is trained, if it is.
        static: what else is done to build the model, if it is a static one.
        evaluation_batch: images a batch; 0 without evaluation.
        scorings: how often the model is scored, under one routing after the other.
        batch_routing: whether a batch shares one merged weight in evaluation.
        baselines: what the model is shown beside.
        number: bytes of one number of the experts.
        saves: whether the model is saved.
        gpu: whether a GPU computes.
        mapped: bytes of torch files, which are mapped and stay so.
        held: bytes that building and adapting hold beside the model.
    """

    tower: Geometry
    model: ModelSize
    num_models: int
    base: int
    clip: Geometry | None = None
    prompts: int = 0
    all_prompts: int = 0
    adapted: dict[str, Images] = field(default_factory=dict)
    scored: dict[str, Images] = field(default_factory=dict)
    training: Training | None = None
    static: Static | None = None
    evaluation_batch: int = 0
    scorings: int = 1
    batch_routing: bool = False
    baselines: tuple[str, ...] = ()
    number: int = FLOAT
    saves: bool = False
    gpu: bool = False
    mapped: int = 0
    held: int = 0


@dataclass
class Phase:
    """What is in memory at the peak of one phase.

    Attributes:
        name: of the phase.
        host: bytes in the process, by what they are.
        device: bytes on the GPU, by what they are; empty without one.
    """

    name: str
    host: dict[str, int]
    device: dict[str, int]

    @property
    def host_bytes(self) -> int:
        """All bytes in the process."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """All bytes on the GPU."""
        return sum(self.device.values())


def memory_phases(load: Load) -> list[Phase]:
    """Return the phases of a run in order, with what is in memory at the peak of each.

    Args:
        load: what memory depends on.
    """
    seen = _cached(load, load.adapted) | {"Gram matrices": grams(load)} if load.static is not None else {}
    making = {"one layer's task vectors": building(load), "task vectors": load.held}
    phases = [_phase(load, "building", seen, making, on_host=True)]
    heads = {"CLIP model for the heads": FLOAT * load.clip.numbers} if load.clip else {}
    if heads:
        phases.append(_phase(load, "making heads", heads | _cached(load, load.adapted), {"prompts": prompts(load)}))
    freed = 0
    if load.training is not None:
        working = _training(load, load.training)
        phases.append(_phase(load, "adapting", heads | _cached(load, load.adapted), working))
        freed = 0 if load.gpu else int(_KEPT * (sum(working.values()) - load.held))
    left = _left(load)
    if load.saves:
        more = heads | _cached(load, load.adapted) | {"copies while saving": _copies(load)}
        phases.append(_phase(load, "saving", more, left, freed=freed))
    if load.evaluation_batch:
        more = heads | _cached(load, load.adapted | load.scored)
        phases.append(_phase(load, "evaluating", more, left | {"activations": evaluation(load)}, freed=freed))
        if load.baselines:
            plain = {"baselines": _baseline_towers(load), "activations": evaluation(load, routed=False)}
            phases.append(_phase(load, "baselines", more, left | plain, freed=freed))
    return phases


def _phase(
    load: Load, name: str, host: dict[str, int], working: dict[str, int], *, on_host: bool = False, freed: int = 0
) -> Phase:
    """Return a phase.

    What an earlier one freed stays in the process where blocks were small: the next takes from there, mostly.
    """
    model, base = {"model": load.model.bytes}, {LIBRARIES: load.base + _MORE_LIBRARIES, "mapped files": load.mapped}
    if load.gpu and not on_host:
        return Phase(name, _there(base | host), _there({"CUDA": _GPU, **model, **working}))
    needed = sum(working.values())
    unused = max(0, freed - int((1 - _BESIDE_FREED) * needed))
    return Phase(name, _there(base | model | host | working | {"freed, but kept by the allocator": unused}), {})


def _cached(load: Load, images: dict[str, Images]) -> dict[str, int]:
    return {"images in memory": sum(i.cached for i in images.values())}


def _there(parts: dict[str, int]) -> dict[str, int]:
    return {name: part for name, part in parts.items() if part}


def _training(load: Load, training: Training) -> dict[str, int]:
    """Return what a step works with."""
    kept = training.tasks * kept_for_backward(load.tower, load.model, training)
    wide = training.batch_size * load.tower.tokens * load.tower.hidden * FLOAT
    trained = load.model.bytes if training.whole else load.model.router_bytes
    return {
        "activations": kept + at_hand(load.tower, training),
        "gaps between them": int(_GAPS * kept) if wide < _LARGE and not load.gpu else 0,
        "gradients and optimiser": training.state * trained,
        "task vectors": load.held,
    }


def _left(load: Load) -> dict[str, int]:
    """Return what adaptation leaves behind: the gradients."""
    adapts = load.training is not None and not load.training.whole
    return {"gradients": load.model.router_bytes} if adapts else {}


def building(load: Load) -> int:
    """Return what is made beside the finished model while one linear layer is upcycled.

    Args:
        load: what memory depends on.
    """
    matrix = load.tower.matrix
    one = 3 * FLOAT * matrix  # a fine-tuned weight, the pretrained one, and their difference
    stack = load.num_models * matrix
    if load.model.kind == "sparse":
        kept = load.model.experts // max(1, 2 * load.tower.layers)  # of one layer
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
    plain = tower.layers if model.attentions else tower.layers - 1  # before the first routed block nothing is trained
    numbers = plain * tokens * attention
    numbers += tokens * (tower.width + sum(model.router_widths))
    mlp, inputs = tower.kept_by_activation * tower.hidden, tower.width + tower.hidden  # of both linear layers
    if merges(tower, model, tokens, training.batch_routing):
        mlp += inputs
        numbers += 2 * tower.layers * tower.matrix
    elif model.kind == "low_rank":
        mlp += 2 * model.coefficients + (tower.width if any(model.router_widths) else 0)
    else:
        mlp += inputs
    if model.attentions:  # of the four projections: what each experts' bank keeps, or the weights that are merged
        merged = merges(tower, model, tokens, training.batch_routing)
        kept = 4 * model.coefficients if model.kind == "low_rank" and not merged else tower.width
        numbers += model.attentions * (tokens * kept + 4 * merged * tower.width**2)
    return FLOAT * (numbers + tower.layers * tokens * mlp)


def at_hand(tower: Geometry, training: Training) -> int:
    """Return what a step works with beside what is kept: gradients under way, and every task's images.

    Args:
        tower: the shape.
        training: how.
    """
    tokens = training.batch_size * tower.tokens
    return FLOAT * (
        4 * tokens * tower.hidden + 2 * tower.matrix + training.batches * training.batch_size * tower.inputs
    )


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
    tower, largest = load.tower, max((i.used for i in load.scored.values()), default=0)
    batch = min(load.evaluation_batch, largest)
    tokens = batch * tower.tokens
    mlp = 3 * tower.hidden + 2 * tower.width
    if routed and load.model.kind == "low_rank":
        mlp += 2 * load.model.coefficients
    working = tokens * max(mlp, 6 * tower.width) + 2 * batch * tower.inputs
    return FLOAT * (working + (2 * tower.matrix if routed and load.batch_routing else 0))


def prompts(load: Load) -> int:
    """Return what the text tower works with.

    Args:
        load: what memory depends on.
    """
    if load.clip is None:
        return 0
    batch = min(_PROMPTS, load.prompts)
    return FLOAT * batch * load.clip.tokens * (3 * load.clip.hidden + 2 * load.clip.width)


def _baseline_towers(load: Load) -> int:
    """Return the bytes of towers that are alive at a time."""
    alive = 1 if load.baselines == ("zero_shot",) else 2  # one is made while the one before is there
    if "task_arithmetic" in load.baselines:  # the merged state beside
        alive = 3 if load.baselines[0] != "task_arithmetic" else 2
    return alive * FLOAT * load.tower.numbers


def _copies(load: Load) -> int:
    """Return what is copied to be saved: weights that lie along their longer side, and on a GPU all."""
    if load.gpu:
        return load.model.bytes
    return FLOAT * load.tower.layers * load.tower.matrix if load.model.kind in ("dense", "sparse") else 0
