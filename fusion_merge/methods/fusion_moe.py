"""FusionMoE: rank-one experts of MLP and attention, routers that start right, and labels from the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from fusion_merge.adaptation.optimization import SCHEDULES
from fusion_merge.adaptation.starts import STARTS
from fusion_merge.errors import ConfigError
from fusion_merge.methods.adapted_base import GUARDS
from fusion_merge.methods.rank_one_base import RankOneMethod
from fusion_merge.moe import recurrent_router_maker
from fusion_merge.moe.blocks import TARGETS
from fusion_merge.moe.selection import Selection
from fusion_merge.moe.selection_names import SELECTIONS, selection_named
from fusion_merge.moe.upcycle import MakeRouter
from fusion_merge.options import option
from fusion_merge.registry import register_method


@final
@register_method("fusion_moe")
@dataclass(kw_only=True)
class FusionMoEAlgorithm(RankOneMethod):
    r"""RankOne-MoE's experts, with an objective that cannot collapse and routers that start right.

    .. math:: W = W_0 + \sum_{n,j} g_{nj}\, u_{nj} (s_{nj} v_{nj})^\top \quad\text{in MLP and attention}, \qquad
              \min_{A, a} \sum_n \mathbb{E}_x\, \operatorname{CE}\big(p^*_n(x),\, p(x)\big), \qquad g = A \bar x + a

    where p* are the soft labels of task n's own fine-tuned model. Four things differ from RankOne-MoE: the objective;
    (A, a) start as the ridge regression that tells the tasks' images apart; attention has experts too; each image is
    routed by itself from the first step on. What is left outside is the plain average of the models.

    Source: ours, of known parts: rank-one experts (EnnengYang/RankOne-MoE), soft labels (SyMerge, arXiv 2412.19098),
    ridge regression (RanPAC, arXiv 2307.02251).
    """

    init_lambda: float | None = option(
        None, help="λ: static weight of task vectors; null is one over the number of tasks", shapes_model=True
    )
    targets: str = option(
        "all", help="what gets experts: MLPs, attention, or all", choices=tuple(TARGETS), shapes_model=True
    )
    router_start: str = option(
        "ridge",
        help="where routers start: at λ, by projection, or by ridge regression on a few images",
        choices=STARTS,
        shapes_model=True,
    )
    router_state_width: int = option(
        0,
        help="width of a recurrent state that routers pass on from layer to layer; 0 has none",
        minimum=0,
        shapes_model=True,
    )
    selection: str = option(
        "all", help="which coefficients of a layer take part", choices=tuple(SELECTIONS), shapes_model=True
    )
    select_k: int = option(-1, help="how many, for top_k and soft_top_k; -1 for all", minimum=-1, shapes_model=True)
    select_p: float = option(
        0.9,
        help="the probability that is enough, for top_p and tsallis_top_p",
        above=0.0,
        maximum=1.0,
        shapes_model=True,
    )
    select_temperature: float = option(0.1, help="of these probabilities", above=0.0, shapes_model=True)
    select_q: float = option(1.5, help="order of the entropy, for tsallis_top_p", above=0.0, shapes_model=True)
    select_threshold: float = option(
        0.9,
        help="the share of its largest value above which all take part, for tsallis_top_p",
        minimum=0.0,
        maximum=1.0,
        shapes_model=True,
    )
    coefficient_bounds: list[float] | None = option(
        None, help="the least and the largest coefficient, such as [0, 1]; null for none", shapes_model=True
    )
    batch_reduce: bool = option(False, help="one merged weight a batch during adaptation, instead of one a sample")
    objective: str = option(
        "expert_labels",
        help="what adaptation minimises: entropy, expert_labels, infomax, tsallis, or a weighted sum of them",
    )
    lr: float = option(1e-3, help="learning rate, at its highest", above=0.0)
    lr_schedule: str = option("cosine", help="how it goes on after warm-up", choices=SCHEDULES)
    warmup_steps: int = option(10, help="steps over which it rises", minimum=0)
    max_steps: int = option(200, help="adaptation steps; each takes one batch of each task", minimum=0)
    mixed_tasks: bool = option(True, help="put the batches of all tasks through the model as one")
    guard: str = option(
        "rollback", help="of tasks that degrade: warn, or roll back to their best and mend their loss", choices=GUARDS
    )

    def __post_init__(self) -> None:
        """Check all options.

        Raises:
            ConfigError: if one is out of range, or does not go with another.
        """
        super().__post_init__()
        self.make_selection()
        if (self.selection in ("top_k", "soft_top_k")) is not (self.select_k != -1):
            raise ConfigError(
                f"`selection`={self.selection} and `select_k`={self.select_k} do not go together; "
                + (
                    "top_k and soft_top_k keep `select_k` coefficients: choose one of them, or leave `select_k` out"
                    if self.select_k != -1
                    else "give the number of coefficients that are kept too, such as `select_k`=16"
                )
            )
        if self.router_state_width and (self.router_start != "constant" or self.router_hidden_layers != 1):
            raise ConfigError(
                f"`router_state_width`={self.router_state_width} makes recurrent routers, which start at λ and "
                "have one linear layer; choose `router_start`=constant and `router_hidden_layers`=1 too"
            )

    def make_selection(self) -> Selection | None:
        """See `MoEMethod.make_selection`."""
        return selection_named(
            self.selection,
            k=self.select_k,
            p=self.select_p,
            temperature=self.select_temperature,
            q=self.select_q,
            threshold=self.select_threshold,
            bounds=self.coefficient_bounds,
        )

    def router_maker(self, generator: torch.Generator, num_tasks: int) -> MakeRouter:
        """See `MoEMethod.router_maker`: those of RankOne-MoE, or recurrent ones."""
        if self.router_state_width:
            return recurrent_router_maker(self.router_state_width, self.static_weight(num_tasks), generator)
        return super().router_maker(generator, num_tasks)
