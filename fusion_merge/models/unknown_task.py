"""Images whose task is not known: which task each is of, and what its head says."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_merge.errors import ConfigError, ModelError, nearest
from fusion_merge.models.clip import pooled_output
from fusion_merge.models.heads import TaskHeads
from fusion_merge.models.measuring import check_images, check_routed, kept_coefficients, knows_inputs, task_index
from fusion_merge.moe.experts import DenseExperts, Experts, LowRankExperts, SparseExperts
from fusion_merge.moe.features import record_inputs
from fusion_merge.moe.layer import RoutedBlock, Routing, moe_layers, record_coefficients

if TYPE_CHECKING:
    from fusion_merge.models.merged import MergedCLIPVisionModel

WAYS = ("agreement", "projection")
"""How the task of an image can be found."""

_SHRINKAGE = 0.01  # of the covariance towards its mean variance
_FIRST_BLOCKS = 2  # whose inputs are projected
_SHARE = 4  # a task's subspace has this part of the dimensions


class Prediction(NamedTuple):
    """What a merged model says of images.

    Attributes:
        tasks: the task of each image.
        labels: its class, as a number among the classes of its task: (B,).
        names: its class by name.
        probabilities: for each image, those of all classes of its task: (C,).
        scores: how well each image fits each merged task, the larger the better: (B, N). None where the task was given.
    """

    tasks: list[str]
    labels: Tensor
    names: list[str]
    probabilities: list[Tensor]
    scores: Tensor | None


@torch.no_grad()
def identify(model: MergedCLIPVisionModel, images: Tensor, by: str) -> Tensor:
    """See `MergedCLIPVisionModel.identify`."""
    _check_batch(model, images)
    return observe(model, images, by)[1]


@torch.no_grad()
def predict(model: MergedCLIPVisionModel, images: Tensor, task: str | None, by: str) -> Prediction:
    """See `MergedCLIPVisionModel.predict`."""
    heads = model.heads
    if heads is None:
        raise ModelError(
            "the model has no heads to predict with; give it some with `set_heads(heads, classnames)`: "
            "`taskpool.head(task)` and `taskpool.task(task).classnames` of a task pool are such"
        )
    _check_batch(model, images)
    if task is not None:
        task_index(model, task)
        heads.head(task)
        scores, pooled = None, pooled_output(model(images.to(model.device, model.dtype)))
        tasks = [task] * len(pooled)
    else:
        if lacking := [name for name in model.config.tasks if name not in heads.tasks]:
            raise ModelError(f"there is no head of `{lacking[0]}`; give `set_heads` one of every merged task")
        pooled, scores = observe(model, images, by)
        tasks = [model.config.tasks[index] for index in scores.argmax(dim=1).tolist()]
    return _answers(heads, pooled.float(), tasks, scores)


def _check_batch(model: MergedCLIPVisionModel, images: Tensor) -> None:
    check_images(model, images, "images")
    if not len(images):
        raise ModelError("there is no image in the batch; give at least one")


def _answers(heads: TaskHeads, pooled: Tensor, tasks: list[str], scores: Tensor | None) -> Prediction:
    labels = torch.zeros(len(tasks), dtype=torch.long, device=pooled.device)  # (B,)
    probabilities: list[Tensor] = [pooled.new_empty(0)] * len(tasks)
    for task in dict.fromkeys(tasks):
        places = [place for place, name in enumerate(tasks) if name == task]
        each = heads.head(task)(pooled[places]).softmax(dim=-1)  # (images of the task, C)
        labels[places] = each.argmax(dim=-1)
        for place, row in zip(places, each, strict=True):
            probabilities[place] = row
    names = [heads.classnames[task][label] for task, label in zip(tasks, labels.tolist(), strict=True)]
    return Prediction(tasks, labels, names, probabilities, scores)


def check_way(by: str) -> None:
    """Refuse a way to find an image's task that there is not.

    Args:
        by: one of `WAYS`.

    Raises:
        ConfigError: if it is not.
    """
    if by not in WAYS:
        raise ConfigError(f"`by`={by!r} is no way to find an image's task; {nearest(str(by), WAYS)}")


@torch.no_grad()
def observe(model: MergedCLIPVisionModel, images: Tensor, by: str) -> tuple[Tensor, Tensor]:
    """Return what one forward pass gives: the pooled outputs, and how well each image fits each task.

    Args:
        model: a merged model with routed blocks, under sample routing.
        images: preprocessed images.
        by: one of `WAYS`.

    Shape:
        images (B, 3, height, width) → (B, D), (B, N).

    Raises:
        ConfigError: if there is no such way.
        ModelError: if the model does not route samples by themselves, or does not know its tasks.
    """
    check_way(by)
    check_routed(model)
    blocks = moe_layers(model.vision_model)
    if any(block.routing is not Routing.SAMPLE for block in blocks.values()):
        raise ModelError(
            "under batch routing all images of a batch have the same coefficients, which tell the task of none; "
            'call `set_routing(model, "sample")` first'
        )
    pixels = images.to(model.device, model.dtype)
    if by == "projection":
        first = dict(list(blocks.items())[:_FIRST_BLOCKS])
        with record_inputs(first) as inputs:
            pooled = pooled_output(model(pixels))
        return pooled, _shares([values[0] for values in inputs.values()], _directions(model, first))
    _check_measured(model)
    with record_coefficients(model.vision_model) as record:
        pooled = pooled_output(model(pixels))
    return pooled, _agreement(model, [values[0] for values in record.values()]).to(pooled.device)


def _check_measured(model: MergedCLIPVisionModel) -> None:
    lacking = [task for task in model.config.tasks if task not in model.config.measured_tasks]
    if lacking:
        raise ModelError(
            f"the model does not know the coefficients of `{lacking[0]}`: call `measure({lacking[0]!r}, batches)`, or "
            'identify by="projection"'
        )


def _agreement(model: MergedCLIPVisionModel, coefficients: list[Tensor]) -> Tensor:
    r"""Return minus half the squared distance of each image's coefficients from each task's mean, in whitened space.

    .. math:: s_n = -\tfrac12 (c - \bar c_n)^\top \Sigma^{-1} (c - \bar c_n)

    with c the mean coefficient of each task's experts in each block, and Σ the covariance within tasks, shrunk a little
    towards its mean variance. Where only the means are known, Σ is the identity.
    """
    num_tasks = len(model.config.tasks)
    own = _by_task(coefficients, num_tasks)  # (B, L·N)
    if knows_inputs(model) and model.task_inputs is not None:
        kept = kept_coefficients(model)  # L × (N, M, K)
        there = (model.task_inputs[:, 0, :, -1] > 0).cpu()  # (N, M)
        known = _by_task([c.flatten(0, 1).cpu() for c in kept], num_tasks).view(*there.shape, -1)  # (N, M, L·N)
        means = torch.stack([rows[own_rows].mean(dim=0) for rows, own_rows in zip(known, there, strict=True)])
        centred = (known - means[:, None])[there]  # (images, L·N)
        covariance = centred.T @ centred / len(centred)
        floor = _SHRINKAGE * covariance.diagonal().mean().clamp(min=1e-12)
        _check_apart(means)
        factor = torch.linalg.cholesky(covariance + floor * torch.eye(len(covariance), dtype=torch.float64))
        own, means = (torch.linalg.solve_triangular(factor, x.T, upper=False).T for x in (own, means))
    else:
        blocks = moe_layers(model.vision_model).values()
        table = model.task_coefficients.cpu()
        means = _by_task([table[:, i, : block.num_coefficients] for i, block in enumerate(blocks)], num_tasks)
        _check_apart(means)
    return -0.5 * torch.cdist(own, means).square()  # (B, N)


def _check_apart(means: Tensor) -> None:
    if len(means) > 1 and (means - means[0]).abs().max() <= 1e-6 * means.abs().max():
        raise ModelError('all tasks have the same mean coefficients, which tell no task; identify by="projection"')


def _by_task(coefficients: list[Tensor], num_tasks: int) -> Tensor:
    """Return the mean coefficient of each task's experts in each block: L × (B, K) → (B, L·N), in float64."""
    return torch.cat([c.double().view(len(c), num_tasks, -1).mean(dim=2) for c in coefficients], dim=1)


def _directions(model: MergedCLIPVisionModel, blocks: dict[str, RoutedBlock]) -> list[Tensor]:
    """Return the leading right singular vectors of each task's experts: a (N, r, D) each block, found once."""
    known = model.known_directions
    if known is None:
        known = model.known_directions = [_right_vectors(block, len(model.config.tasks)) for block in blocks.values()]
    return [directions.to(model.device) for directions in known]


def _right_vectors(block: RoutedBlock, num_tasks: int) -> Tensor:
    linears = block.linears()
    readers = [linears[name] for name in ("fc1", "q_proj", "k_proj", "v_proj") if name in linears]
    width = readers[0].base.in_features
    rank = max(1, width // _SHARE)
    vectors = []
    for index in range(num_tasks):
        gram = torch.stack([_gram(linear.experts, index) for linear in readers]).sum(dim=0)  # (D, D)
        values, found = torch.linalg.eigh(gram)
        least = torch.finfo(gram.dtype).eps * width * values[-1]  # what is below is rounding
        vectors.append((found[:, -rank:] * (values[-rank:] > least)).T.float())
    return torch.stack(vectors)  # (N, r, D)


def _gram(experts: Experts, index: int) -> Tensor:
    """Return the Gram matrix of a task's expert, its columns against each other: (D, D), in float64."""
    if isinstance(experts, LowRankExperts):
        own = slice(index * experts.rank, (index + 1) * experts.rank)
        left, right = experts.left[:, own].detach().double(), experts.right[own].detach().double()
        return right.T @ (left.T @ left) @ right
    if isinstance(experts, DenseExperts | SparseExperts):
        weight = experts.expand()[index].detach().double()  # (O, I)
        return weight.T @ weight
    raise ModelError(f"experts of kind {type(experts).__name__} have no singular vectors here; identify by agreement")


def _shares(inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    r"""Return minus the mean residual of the blocks' input tokens on each task's subspace.

    .. math:: s_n = -\operatorname{mean}_{l,t} \frac{\lVert x - V_n^\top V_n x \rVert^2}{\lVert x \rVert^2}
    """
    total = torch.zeros(())
    for tokens, vectors in zip(inputs, directions, strict=True):
        unit = F.normalize(tokens.float(), dim=-1)  # (B, T, D)
        inside = [(unit @ own.T).square().sum(dim=-1).mean(dim=-1) for own in vectors]  # N × (B,)
        total = total.to(unit) + torch.stack(inside, dim=1)  # (B, N)
    return total / len(inputs) - 1.0  # (B, N)
