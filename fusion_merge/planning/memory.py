"""How much memory each phase of a run takes: what is alive then, by arithmetic, and a few constants that were measured.

All is counted in bytes. On a GPU, what computes is there, and what is read or waits is in the host's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fusion_merge.planning.geometry import FLOAT
from fusion_merge.planning.needs import Images, Load, Training
from fusion_merge.planning.working import (
    asking,
    at_hand,
    building,
    evaluation,
    grams,
    kept_for_backward,
    measuring,
    prompts,
    reading,
    regression,
    starting,
)

LIBRARIES = "interpreter and libraries"

_MORE_LIBRARIES = 60 * 10**6
"""What a run loads or makes beside what planning has loaded: code, buffers of matrix products, threads."""

_GPU = 600 * 10**6
"""What CUDA and its libraries take on a device."""

_LARGE = 32 * 2**20
"""From this size on, blocks of memory go back to the system when they are freed (glibc)."""

_GAPS = 0.2
"""What is lost between smaller blocks that are kept for the backward pass, beside them; 0.1 to 0.35 was measured."""

_KEPT = 0.95
"""What of smaller blocks stays in the process when they are freed."""

_BESIDE_FREED = 0.25
"""What of a later phase does not fit into what was freed."""


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
    for piece in _adaptation(load):
        host = heads | _cached(load, load.adapted) | piece.host
        phases.append(_phase(load, piece.name, host, piece.working, freed=freed))
        if not load.gpu and piece.block < _LARGE:
            freed = max(freed, int(_KEPT * (sum(piece.working.values()) - piece.stays)))
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
    measured = name in ("measuring", "saving", "evaluating", "baselines")
    model = {"model": load.model.bytes if measured else load.model.built_bytes}
    base = {LIBRARIES: load.base + _MORE_LIBRARIES, "mapped files": load.mapped}
    if load.gpu and not on_host:
        return Phase(name, _there(base | host), _there({"CUDA": _GPU, **model, **working}))
    needed = sum(working.values())
    unused = max(0, freed - int((1 - _BESIDE_FREED) * needed))
    return Phase(name, _there(base | model | host | working | {"freed, but kept by the allocator": unused}), {})


def _cached(load: Load, images: dict[str, Images]) -> dict[str, int]:
    return {"images in memory": sum(i.cached for i in images.values())}


def _there(parts: dict[str, int]) -> dict[str, int]:
    return {name: part for name, part in parts.items() if part}


@dataclass(frozen=True)
class _Piece:
    """A phase between building and saving.

    Attributes:
        name: of the phase.
        host: bytes in the process, wherever it computes.
        working: bytes where it computes.
        block: bytes of its largest blocks, where these go back to the system if they are large.
        stays: bytes of what it works with that are not freed at its end, or not kept then.
    """

    name: str
    host: dict[str, int]
    working: dict[str, int]
    block: int = 0
    stays: int = 0


def _adaptation(load: Load) -> Iterator[_Piece]:
    """Give the phases of adaptation: those that there are."""
    if load.started_from:
        yield _starting(load)
    if load.training is not None and load.training.asked:
        expert = {"expert": FLOAT * load.tower.numbers}
        working = expert | {"activations": asking(load, load.training), "task vectors": load.held}
        answers = {"answers of experts": load.answers}
        yield _Piece("asking experts", answers | (expert if load.gpu else {}), working, stays=load.held)
    left = sum(_left(load).values())
    if load.training is not None:
        answers, working = {"answers of experts": load.answers}, _training(load, load.training)
        yield _Piece("adapting", answers, working, stays=load.held + left)
    if load.adapted and load.model.kind is not None:
        yield _Piece("measuring", {}, _left(load) | {"activations": measuring(load)}, stays=left)


def _starting(load: Load) -> _Piece:
    """Return the phase in which routers start: images as they were read, and in one batch.

    A regression is solved while a router reads, before its block works. On a GPU the images of single tasks, as they
    came there, are gone when the pass begins.
    """
    pixels, between = (FLOAT * load.started_from * n for n in (load.tower.inputs, load.tower.tokens * load.tower.width))
    passing, read, solved = starting(load), reading(load), regression(load)
    if load.gpu:
        host = {"regression": solved, "images to start from": pixels}
        there = {"images to start from": pixels, "activations": max(pixels, passing, read)}
        return _Piece("starting routers", host, there)
    solving = {"activations": read, "regression": solved}
    working = solving if passing < read + solved else {"activations": passing}
    return _Piece("starting routers", {}, {"images to start from": 2 * pixels} | working, block=between)


def _training(load: Load, training: Training) -> dict[str, int]:
    """Return what a step works with."""
    kept = training.tasks * kept_for_backward(load.tower, load.model, training)
    wide = training.together * training.batch_size * load.tower.tokens * load.tower.hidden * FLOAT
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
    return FLOAT * load.model.mlps * load.tower.matrix if load.model.kind in ("dense", "sparse") else 0
