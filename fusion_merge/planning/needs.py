"""What the memory, the disk and the time of a run depend on: plain numbers, all in bytes where they are sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion_merge.adaptation.experts import ASKED_TOGETHER
from fusion_merge.planning.geometry import FLOAT, Geometry, ModelSize
from fusion_merge.pools.images import CACHE_BYTES


@dataclass(frozen=True)
class Images:
    """The images of one task.

    Attributes:
        count: how many.
        bytes: of one when it is preprocessed.
        used: how many are scored, which may be fewer.
        classes: of the task.
    """

    count: int
    bytes: int
    used: int
    classes: int = 0

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
        together: tasks whose batches are one batch of the model.
        batches: that are at hand at a time.
        batch_routing: whether a batch shares one merged weight.
        state: tensors that the optimiser keeps of each trained one, its gradient and its earlier value included.
        whole: whether the whole tower is trained, not routers alone.
        vectors: task vectors that are merged anew in each pass; 0 where none are.
        asked: images of each task that are seen, about which its own expert is asked first; 0 where none is.
    """

    batch_size: int
    tasks: int = 1
    together: int = 1
    batches: int = 1
    batch_routing: bool = True
    state: int = 4
    whole: bool = False
    vectors: int = 0
    asked: int = 0

    def asked_of(self, images: Images) -> int:
        """Return how many of a task's images its expert looks at: whole batches of them, each image once.

        Args:
            images: the task's images.
        """
        seen = min(images.count, self.asked)
        return min(images.count, -(-seen // ASKED_TOGETHER) * ASKED_TOGETHER)


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
        start_images: of each task, that routers start from; 0 where they start without.
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
    start_images: int = 0
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

    @property
    def started_from(self) -> int:
        """Images of all tasks that routers start from."""
        return sum(min(images.count, self.start_images) for images in self.adapted.values())

    @property
    def answers(self) -> int:
        """Bytes of what experts said, which is kept until adaptation ends."""
        if self.training is None:
            return 0
        return FLOAT * sum(images.classes * self.training.asked_of(images) for images in self.adapted.values())
