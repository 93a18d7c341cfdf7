"""Linear layers whose low-rank experts are chosen for each token by projection: no router is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.moe.vectors import LayerTaskVectors, TaskVector
from fusion_merge.task_vectors import State, truncated_svd


@final
class ProjectionMoELinear(nn.Module):
    r"""A linear layer with low-rank experts; each token takes those on whose singular subspaces it projects most.

    .. math:: r_n = \lVert V_n^\top x \rVert_2, \qquad p = \operatorname{softmax}(r), \qquad
              y = W_0 x + b_0 + \sum_{n \in \operatorname{top}_t(p)} \bar p_n \big( U_n (S V^\top)_n x + \beta_n \big)

    where :math:`\bar p` is p over the chosen experts, scaled to sum up to 1.

    Args:
        base: the pretrained layer; frozen.
        left: the experts' left singular vectors U.
        right: their right singular vectors, scaled by the singular values.
        gate: the right singular vectors V that tokens are projected on; of an expert that changes nothing, zeros.
        bias: the biases' task vectors β.
        top_k: t, how many experts a token takes, in 1…N.

    Shape:
        left (N, O, k), right (N, k, I), gate (N, g, I), bias (N, O); input (…, I) → output (…, O).

    Raises:
        ConfigError: if `top_k` is above the number of experts.

    Source: SMILE, arXiv 2408.10174, eq. 8-10. There an expert that changes nothing projects on arbitrary directions.
    """

    def __init__(
        self, base: nn.Linear, left: Tensor, right: Tensor, gate: Tensor, bias: Tensor, top_k: int = 1
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= left.shape[0]:
            raise ConfigError(
                f"`top_k`={top_k} is not in 1-{left.shape[0]}, the number of experts; choose one of these"
            )
        self.base = base.requires_grad_(False)
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.gate = nn.Parameter(gate, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.top_k = top_k

    def scores(self, x: Tensor) -> Tensor:
        """Return how much of each token lies in each expert's subspace.

        Args:
            x: the layer's input.

        Shape:
            (…, I) → (…, N).
        """
        projected = F.linear(x, self.gate.flatten(0, 1))  # (…, N·g)
        return projected.unflatten(-1, self.gate.shape[:2]).norm(dim=-1)  # (…, N)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; shapes as in the class docstring.

        Args:
            x: the layer's input.
        """
        tokens = x.reshape(-1, x.shape[-1])  # (T, I)
        output = self.base(tokens)  # (T, O)
        shares, chosen = torch.topk(torch.softmax(self.scores(tokens), dim=-1), self.top_k, dim=-1)  # (T, t)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        for expert in range(self.left.shape[0]):
            rows, places = torch.where(chosen == expert)
            if len(rows) == 0:
                continue
            added = F.linear(F.linear(tokens[rows], self.right[expert]), self.left[expert], self.bias[expert])
            output = output.index_add(0, rows, (added * shares[rows, places, None]).to(output.dtype))
        return output.reshape(*x.shape[:-1], -1)  # (…, O)

    def spec(self) -> dict[str, Any]:
        """Return what `empty_projection` needs to make a layer of the same shapes, as plain JSON values."""
        return projection_spec(self.left.shape[0], self.left.shape[2], self.gate.shape[1], self.top_k)


def projection_spec(num_tasks: int, rank: int, gate_rank: int, top_k: int) -> dict[str, Any]:
    """Return the spec of such a layer.

    Args:
        num_tasks: N.
        rank: k, of each expert.
        gate_rank: g, the directions of each expert that tokens are projected on.
        top_k: t.
    """
    return {"kind": "projection", "num_tasks": num_tasks, "rank": rank, "gate_rank": gate_rank, "top_k": top_k}


def empty_projection(spec: dict[str, Any], base: nn.Linear) -> ProjectionMoELinear:
    """Make a layer with the shapes that a spec describes and values that are still to be loaded.

    Args:
        spec: what `ProjectionMoELinear.spec` returned.
        base: the plain layer.

    Raises:
        ConfigError: if the kind of layer is unknown.
    """
    if spec["kind"] != "projection":
        raise ConfigError(f"routed linear layer of kind `{spec['kind']}` is unknown; known is projection")
    count, rank, gate_rank = spec["num_tasks"], spec["rank"], spec["gate_rank"]
    return ProjectionMoELinear(
        base,
        torch.zeros(count, base.out_features, rank),
        torch.zeros(count, rank, base.in_features),
        torch.zeros(count, gate_rank, base.in_features),
        torch.zeros(count, base.out_features),
        spec["top_k"],
    )


def projection_layer(
    base: nn.Linear,
    task_vectors: Sequence[TaskVector],
    *,
    rank: int,
    gate_rank: int,
    top_k: int,
    gate_on_difference: bool = True,
    device: torch.device | str | None = None,
) -> ProjectionMoELinear:
    """Decompose each task vector and make the layer.

    Args:
        base: the pretrained layer.
        task_vectors: N task vectors of the layer.
        rank: k, of each expert: 1…min(O, I), or -1 for full rank.
        gate_rank: g, in 1…min(O, I), or -1 for full rank.
        top_k: t.
        gate_on_difference: project on singular vectors of the task vector, instead of the fine-tuned weight.
        device: where to decompose.
    """
    limit = min(base.weight.shape)
    rank, gate_rank = (limit if r == -1 else r for r in (rank, gate_rank))
    lefts, rights, gates, biases = [], [], [], []
    for vector in task_vectors:
        first, second = vector.truncated_svd(max(rank, gate_rank) if gate_on_difference else rank, device)
        toward = second if gate_on_difference else truncated_svd(base.weight + vector.weight, gate_rank, device)[1]
        gates.append(_directions(toward[:gate_rank], base.weight, changes=bool(vector.weight.any())))
        lefts.append(first[:, :rank])
        rights.append(second[:rank])
        biases.append(vector.bias)
    left, right, gate, bias = (torch.stack(part) for part in (lefts, rights, gates, biases))
    return ProjectionMoELinear(base, left, right, gate, bias, top_k)


def _directions(scaled: Tensor, weight: Tensor, *, changes: bool) -> Tensor:
    """Return right singular vectors at unit length: zeros for those that are rounding, of which there is no direction.

    A task vector is a difference of weights, and as exact as these are.

    Args:
        scaled: right singular vectors, scaled by their singular values, (g, I).
        weight: the pretrained weight, (O, I).
        changes: whether the expert changes the weight at all.
    """
    values = scaled.norm(dim=1, keepdim=True)  # (g, 1)
    rounding = torch.finfo(torch.float32).eps * max(weight.shape) ** 0.5
    known = values > rounding * torch.maximum(values.max(), weight.abs().max())
    return torch.where(known & changes, F.normalize(scaled, dim=1), torch.zeros_like(scaled))


def upcycle_linears(
    model: nn.Module,
    pretrained: State,
    finetuned: Sequence[State],
    make_layer: Callable[[nn.Linear, Sequence[TaskVector]], ProjectionMoELinear],
    progress: Callable[[], object] | None = None,
) -> list[str]:
    """Give each linear layer of a model experts, in place; one that no fine-tuned model changed stays as it is.

    Args:
        model: the model; its linear layers get the pretrained weights.
        pretrained: the state that every model was fine-tuned from, under the names of `model`.
        finetuned: the N fine-tuned states.
        make_layer: makes the layer from the pretrained one and its task vectors.
        progress: called when a layer is done.

    Returns:
        The names of the layers that got experts.

    Raises:
        ModelError: if the model has no linear layer.
    """
    found = find_linears(model)
    changed = []
    for name, linear in found.items():
        for part, tensor in linear.state_dict().items():
            tensor.copy_(pretrained[f"{name}.{part}"])
        vectors = LayerTaskVectors(pretrained, finetuned, name)
        layer = make_layer(linear, vectors)
        if len(vectors.zero) < len(finetuned):
            model.set_submodule(name, layer)
            changed.append(name)
        if progress is not None:
            progress()
    return changed


def find_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the plain linear layers of a model by name, in order.

    Args:
        model: any module.

    Raises:
        ModelError: if there is none, or one has no bias.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not found:
        raise ModelError(f"`{type(model).__name__}` has no linear layer")
    if without := [name for name, linear in found.items() if linear.bias is None]:
        raise ModelError(f"`{without[0]}` has no bias; only linear layers with a bias can be given experts")
    return found


def projection_layers(model: nn.Module) -> dict[str, ProjectionMoELinear]:
    """Return the linear layers of a model that have experts of their own, by name, in order.

    Args:
        model: any module.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, ProjectionMoELinear)}
