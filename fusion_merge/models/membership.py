"""Tasks that come to a merged model, or leave it, while the rest of it stays."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.models.clip import canonical_names, expected_shapes, module_state, vision_config
from fusion_merge.models.heads import TaskHeads, ZeroShotHead
from fusion_merge.models.measuring import (
    check_images,
    check_routed,
    kept_coefficients,
    knows_inputs,
    measure,
    task_index,
)
from fusion_merge.moe.experts import Experts, SparseExperts
from fusion_merge.moe.features import blocks_by_router, inner_router, record_last_inputs
from fusion_merge.moe.layer import MoELinear, RoutedBlock, moe_layers
from fusion_merge.moe.refit import grown_rows, moments, resized, rows_of, shrunk_rows
from fusion_merge.moe.vectors import PARTS, TaskVector
from fusion_merge.task_vectors import check_same_shape_tables, magnitude_prune, shapes_of

if TYPE_CHECKING:
    from fusion_merge.models.merged import MergedCLIPVisionModel

Source = nn.Module | Mapping[str, Tensor]
"""A tower: a CLIP module, or its tensors by name."""

_BATCH = 64  # images that go through the model at a time
_SHARED_ROUNDS = 2  # a shared router's inputs depend on itself


@torch.no_grad()
def add_task(
    model: MergedCLIPVisionModel,
    name: str,
    source: Source,
    images: Tensor | Iterable[Tensor],
    *,
    head: ZeroShotHead | None,
    classnames: Sequence[str] | None,
    pretrained: Source | None,
    ridge: float,
) -> None:
    """See `MergedCLIPVisionModel.add_task`."""
    _check_addable(model, name, ridge)
    if (head is None) is not (classnames is None):
        raise ConfigError(f"`head` and `classnames` of `{name}` belong together; give both, or neither")
    finetuned = _state(model, source, f"the model of `{name}`")
    before = None if pretrained is None else _state(model, pretrained, "the pretrained model")
    batches = _batches(model, name, images)
    with all_or_nothing(model):
        for blocks in blocks_by_router(model.vision_model):
            _grow(model, blocks, finetuned, batches, ridge)
        if before is not None:
            _move_static(model, finetuned, before, 1.0)
        model.config.tasks.append(name)
        model.config.models[name] = f"a {type(source).__name__}, added later"
        _rebuild_tables(model)
        measure(model, name, batches)
        if head is not None and classnames is not None:
            known = model.heads
            own = known.heads() if known is not None else {}
            names = dict(known.classnames) if known is not None else {}
            placed = copy.deepcopy(head).to(model.device)
            model.heads = TaskHeads({**own, name: placed}, {**names, name: classnames})
        _no_longer_as_scored(model)


@torch.no_grad()
def drop_task(model: MergedCLIPVisionModel, name: str, finetuned: Source | None, pretrained: Source | None) -> None:
    """See `MergedCLIPVisionModel.drop_task`."""
    index = task_index(model, name)
    if len(model.config.tasks) == 1:
        raise ModelError(f"`{name}` is the last task of the model; the pretrained model is what would be left")
    if (finetuned is None) is not (pretrained is None):
        raise ConfigError("to take a task out of the static parts too, give both its `model` and `pretrained`")
    states = [
        _state(model, source, where)
        for source, where in ((finetuned, f"the model of `{name}`"), (pretrained, "the pretrained model"))
        if source is not None
    ]
    with all_or_nothing(model):
        count = len(model.config.tasks)
        for blocks in blocks_by_router(model.vision_model):
            router = inner_router(next(iter(blocks.values())).router)
            each = router.num_coefficients // count
            resized(router, shrunk_rows(router, index * each, each))
            for block in blocks.values():
                for linear in block.linears().values():
                    linear.experts = linear.experts.without_task(index)
                    linear.experts.lay_out(linear.base)
                _settle(block)
        if states:
            _move_static(model, states[0], states[1], -1.0)
        left = [place for place in range(count) if place != index]
        model.config.tasks.remove(name)
        model.config.models.pop(name, None)
        if name in model.config.measured_tasks:
            model.config.measured_tasks.remove(name)
        _rebuild_tables(model, left, index)
        if model.heads is not None and name in model.heads.tasks:
            own = {task: head for task, head in model.heads.heads().items() if task != name}
            names = {task: model.heads.classnames[task] for task in own}
            model.heads = TaskHeads(own, names) if own else None
        _no_longer_as_scored(model)


def _check_addable(model: MergedCLIPVisionModel, name: str, ridge: float) -> None:
    check_routed(model)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"`{name!r}` is no name of a task; give a word")
    if name in model.config.tasks:
        raise ModelError(f"`{name}` is merged already; choose another name, or drop that task first")
    if not ridge > 0:
        raise ConfigError(f"`ridge`={ridge} is not above 0; 1e-3 is usual")
    for path, block in moe_layers(model.vision_model).items():
        if block.router.last_layer() is None:
            raise ModelError(
                f"the {type(inner_router(block.router)).__name__} of `{path}` cannot be told of a new task, as linear "
                "routers can; merge all tasks anew"
            )
    if not knows_inputs(model):
        raise ModelError(
            "the model does not hold what its routers read of its tasks' images, which must not be forgotten; "
            f"call `measure(task, batches)` for each of {', '.join(model.config.tasks)} first"
        )


def _state(model: MergedCLIPVisionModel, source: Source, where: str) -> Mapping[str, Tensor]:
    """Return a tower's tensors by canonical name; those of another shape are refused."""
    if isinstance(source, nn.Module):
        state: Mapping[str, Tensor] = module_state(source)
    elif not isinstance(source, Mapping):
        raise ModelError(
            f"{where} is {source!r}, which is not a model; give a module or its tensors by name, as "
            "`pool.load_model(NAME)` reads it"
        )
    else:
        state = {short: source[name].detach() for short, name in canonical_names(source).items()}
    expected = expected_shapes(vision_config(model.config.vision_config, where="the merged model"))
    check_same_shape_tables(expected, shapes_of(state), where=where)
    for tensor_name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{where} holds NaN or infinite values in `{tensor_name}`; use another copy of the model")
    return state


def _batches(model: MergedCLIPVisionModel, name: str, images: Tensor | Iterable[Tensor]) -> list[Tensor]:
    batches = list(images.split(_BATCH)) if isinstance(images, Tensor) else list(images)
    for batch in batches:
        check_images(model, batch, f"images of `{name}`")
    if not sum(len(batch) for batch in batches):
        raise ModelError(f"there is no image of `{name}`; give at least one batch, 64 images are usual")
    return batches


def _grow(
    model: MergedCLIPVisionModel,
    blocks: dict[str, RoutedBlock],
    finetuned: Mapping[str, Tensor],
    batches: list[Tensor],
    ridge: float,
) -> None:
    """Add a task to blocks of one router: first what it learns by, then experts, then the router's last layer."""
    router = inner_router(next(iter(blocks.values())).router)
    count, rows = router.num_coefficients // len(model.config.tasks), rows_of(router)
    names = list(moe_layers(model.vision_model))
    inputs: Tensor = model.task_inputs  # type: ignore[assignment]  # there was a check
    places = [names.index(name) for name in blocks]
    old = [moments(inputs[:, place].to(rows.device)) for place in places]
    for turn in range(_SHARED_ROUNDS if len(blocks) > 1 else 1):
        with record_last_inputs(blocks) as record:
            for pixels in batches:
                model(pixels.to(model.device, model.dtype))
        new = [moments(torch.cat(values).unsqueeze(0).to(rows.device)) for values in record.values()]
        total_old, total_new = (
            type(old[0])(sum(m.second for m in each), sum(m.mean for m in each))  # type: ignore[arg-type]
            for each in (old, new)
        )
        resized(router, grown_rows(rows, total_old, total_new, count, ridge))
        for path, block in blocks.items() if turn == 0 else ():
            for part, linear in block.linears().items():
                linear.experts = _with_task(linear, finetuned, f"{path}.{part}", model)
                linear.experts.lay_out(linear.base)
            _settle(block)


def _with_task(linear: MoELinear, finetuned: Mapping[str, Tensor], path: str, model: MergedCLIPVisionModel) -> Experts:
    """Return a bank with the task vector of a new model: the base of a routed layer is the pretrained one."""
    parts = []
    for part in PARTS:
        base = getattr(linear.base, part).detach()
        exact = torch.promote_types(base.dtype, torch.float32)
        parts.append(finetuned[f"{path}.{part}"].to(base.device, exact) - base.to(exact))
    if isinstance(linear.experts, SparseExperts):
        ratio = model.config.method_options.get("tv_prune_ratio")
        if ratio is None:
            raise ModelError(f"`{model.config.method}` does not say how much of its experts it prunes; merge anew")
        parts = [magnitude_prune(part, ratio) for part in parts]
    return linear.experts.with_task(TaskVector(*parts))


def _settle(block: RoutedBlock) -> None:
    """Let all that a block shows of its number of coefficients follow."""
    block.router.num_coefficients = inner_router(block.router).num_coefficients
    block.selection = block.selection.fitted(block.num_coefficients)


def _move_static(
    model: MergedCLIPVisionModel, finetuned: Mapping[str, Tensor], before: Mapping[str, Tensor], sign: float
) -> None:
    """Move what is merged statically along a task vector; tensors are replaced, so that the old ones can come back."""
    first = next(iter(next(iter(moe_layers(model.vision_model).values())).linears().values()))
    scaling = getattr(first.experts, "bias_scaling", model.config.method_options.get("init_lambda"))
    if scaling is None:
        raise ConfigError(
            f"`{model.config.method}` has no `init_lambda` to weigh the static parts by; leave `pretrained` out"
        )
    routed = tuple(f"{name}." for name in moe_layers(model.vision_model))
    for name, parameter in list(model.vision_model.named_parameters()):
        if name.startswith(routed):
            continue
        exact = torch.promote_types(parameter.dtype, torch.float32)
        vector = finetuned[name].to(parameter.device, exact) - before[name].to(parameter.device, exact)
        moved = (parameter.detach().to(exact) + sign * float(scaling) * vector).to(parameter.dtype)
        path, _, own = name.rpartition(".")
        setattr(model.vision_model.get_submodule(path), own, nn.Parameter(moved, requires_grad=False))


def _rebuild_tables(model: MergedCLIPVisionModel, left: list[int] | None = None, dropped: int = 0) -> None:
    """Make the tables of mean coefficients and router inputs those of the tasks that there are now."""
    blocks = list(moe_layers(model.vision_model).values())
    width = max(block.num_coefficients for block in blocks)
    table = model.task_coefficients.new_zeros(len(model.config.tasks), len(blocks), width)
    if left is None:  # a task was added: routers decide a little differently about the others
        inputs: Tensor = model.task_inputs  # type: ignore[assignment]  # there was a check
        there = inputs[:, 0, :, -1] > 0  # (N, M)
        for place, coefficients in enumerate(kept_coefficients(model)):
            for task, own in enumerate(there):
                table[task, place, : coefficients.shape[2]] = coefficients[task, own].mean(dim=0).to(table)
        model.task_inputs = torch.cat([inputs, torch.zeros_like(inputs[:1])])
    else:
        for place, block in enumerate(blocks):
            each = block.num_coefficients // len(left)
            before = model.task_coefficients[left, place, : block.num_coefficients + each]
            keep = [k for k in range(before.shape[1]) if k // each != dropped]
            table[:, place, : len(keep)] = before[:, keep]
        if model.task_inputs is not None:
            model.task_inputs = model.task_inputs[left].clone()
    model.task_coefficients = table
    model.known_directions = None


def _no_longer_as_scored(model: MergedCLIPVisionModel) -> None:
    model.config.scores, model.config.command = {}, ""
    model.config.moe = {name: block.spec() for name, block in moe_layers(model.vision_model).items()}


@contextmanager
def all_or_nothing(model: MergedCLIPVisionModel) -> Iterator[None]:
    """Put everything back as it was if what is done inside fails; tensors must be replaced there, never changed.

    Args:
        model: the model.
    """
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (module, {**module.__dict__, **{table: dict(module.__dict__[table]) for table in tables}})
        for module in model.modules()
    ]
    config = copy.deepcopy(model.config)
    try:
        yield
    except BaseException:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        model.config = config
        raise
