"""How much memory each phase of a run takes: what is alive then, by arithmetic, and a few constants that were measured.

All is counted in bytes. On a GPU, what computes is there, and what is read or waits is in the host's memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion_merge.planning.geometry import FLOAT, Geometry, ModelSize
from fusion_merge.pools.images import CACHE_BYTES

LIBRARIES = 130 * 10**6
"""What a run loads or makes beside what planning has loaded: code, buffers of matrix products, threads."""

_GPU = 600 * 10**6
"""What CUDA and its libraries take on a device."""

_PROMPTS = 256
"""Prompts that go through the text tower at a time."""

_SPARE = 1.02
"""What allocators lose of what is asked for."""


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
    """

    batch_size: int
    tasks: int = 1
    batches: int = 1
    batch_routing: bool = True
    state: int = 4
    whole: bool = False


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
        evaluation_batch: images a batch; 0 without evaluation.
        batch_routing: whether a batch shares one merged weight in evaluation.
        baselines: what the model is shown beside.
        wide: bytes of one number of the experts.
        saves: whether the model is saved.
        gpu: whether a GPU computes.
        mapped: bytes of torch files, which are mapped and stay so.
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
    evaluation_batch: int = 0
    batch_routing: bool = False
    baselines: tuple[str, ...] = ()
    wide: int = FLOAT
    saves: bool = False
    gpu: bool = False
    mapped: int = 0


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
    heads = {"CLIP model for the heads": FLOAT * load.clip.numbers} if load.clip else {}
    images = {"images in memory": sum(i.cached for i in load.adapted.values())}
    phases = [_phase(load, "building", {"one layer's task vectors": building(load)}, {}, on_host=True)]
    if load.training is not None:
        working = {"activations": activations(load.tower, load.model, load.training), **_training_state(load)}
        phases.append(_phase(load, "adapting", heads | images, working))
    if load.saves:
        phases.append(_phase(load, "saving", heads | images | {"copies while saving": _copies(load)}, _kept(load)))
    if load.evaluation_batch:
        both = load.adapted | load.scored
        images = {"images in memory": sum(i.cached for i in both.values())}
        if load.scored and set(load.adapted) & set(load.scored) and load.adapted != load.scored:
            images["images in memory"] += sum(i.cached for i in load.adapted.values())
        if heads:
            phases.append(_phase(load, "making heads", heads | {"prompts": prompts(load)}, _kept(load)))
        working = _kept(load) | {"activations": evaluation(load)}
        phases.append(_phase(load, "evaluating", heads | images, working))
        if load.baselines:
            towers, batch = _baseline_towers(load)
            working = _kept(load) | {"baselines": towers, "activations": batch}
            phases.append(_phase(load, "baselines", heads | images, working))
    return phases


def _phase(load: Load, name: str, host: dict[str, int], working: dict[str, int], *, on_host: bool = False) -> Phase:
    model = {"model": load.model.bytes}
    base = {"interpreter and libraries": load.base + LIBRARIES, "mapped files": load.mapped}
    if load.gpu and not on_host:
        return Phase(name, _there(base | host), _there({"CUDA": _GPU, **model, **working}))
    return Phase(name, _there(base | model | host | working), {})


def _there(parts: dict[str, int]) -> dict[str, int]:
    libraries = "interpreter and libraries"
    return {name: part if name == libraries else int(_SPARE * part) for name, part in parts.items() if part}


def _training_state(load: Load) -> dict[str, int]:
    if load.training is None:
        return {}
    trained = load.model.bytes if load.training.whole else load.model.router_bytes
    return {"gradients and optimiser": load.training.state * trained}


def _kept(load: Load) -> dict[str, int]:
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
    if load.model.kind is None:
        return FLOAT * load.tower.numbers  # the merged state, of which the tower is a copy
    return one + (FLOAT * stack if load.wide < FLOAT else 0)


def activations(tower: Geometry, model: ModelSize, training: Training) -> int:
    """Return what a step keeps for the backward pass, and what it works with.

    Args:
        tower: the shape.
        model: what is trained.
        training: how.
    """
    tokens = training.batch_size * tower.tokens
    wide = training.batch_size * tower.inputs
    if training.whole:
        each = 9 * tower.width + (tower.kept_by_activation + 1) * tower.hidden
        kept = tower.layers * tokens * each + wide
        return FLOAT * (kept + tokens * 4 * tower.hidden + training.batches * wide)
    attention = 6 * tower.width  # the inputs of both norms, q, k, v and the output
    kept = (tower.layers - 1) * tokens * attention + tokens * tower.width  # before the first MLP nothing is trained
    kept += tokens * sum(model.router_widths)
    inputs = tower.width + tower.hidden  # of both linear layers
    mlp = tower.kept_by_activation * tower.hidden
    if merges(tower, model, tokens, training.batch_routing):
        mlp += inputs
        kept += 2 * tower.layers * tower.matrix if training.batch_routing else 0
    else:
        mlp += 2 * model.coefficients + (inputs if model.kind != "low_rank" else 0)
        mlp += tower.width if any(model.router_widths) and model.kind == "low_rank" else 0
    kept += tower.layers * tokens * mlp
    working = tokens * 4 * tower.hidden + 2 * tower.matrix
    return FLOAT * (training.tasks * kept + working + training.batches * wide)


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
    tower, largest = load.tower, max((i.count for i in load.scored.values()), default=0)
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


def _baseline_towers(load: Load) -> tuple[int, int]:
    """Return the bytes of towers that are alive at a time, and of a batch that goes through one."""
    tower = FLOAT * load.tower.numbers
    alive = 1 if load.baselines == ("zero_shot",) else 2
    if "task_arithmetic" in load.baselines:  # the merged state and its tower, and the one scored before
        alive = 3 if load.baselines[0] != "task_arithmetic" else 2
    return alive * tower, evaluation(load, routed=False)


def _copies(load: Load) -> int:
    """Return what is copied to be saved: weights that lie along their longer side, and on a GPU all."""
    if load.gpu:
        return load.model.bytes
    return FLOAT * load.tower.layers * load.tower.matrix if load.model.kind in ("dense", "sparse") else 0
