"""The mixture-of-experts family: expert banks, routers, selections, layers and upcycling.

Nothing here knows of CLIP, Hydra or Lightning. Shapes are written with B batch, T tokens, I/O in/out features,
N tasks, R rank, D router input width and K merging coefficients (K = N for dense and sparse banks, N·R for low rank).
"""

from fusion_merge.moe.attention import MoEAttention
from fusion_merge.moe.blocks import find_blocks
from fusion_merge.moe.experts import DenseExperts, Experts, LinearDelta, LowRankExperts, SparseExperts
from fusion_merge.moe.layer import MoELinear, MoEMLP, RoutedBlock, Routing, moe_layers, record_coefficients, set_routing
from fusion_merge.moe.projection_router import ProjectionRouter
from fusion_merge.moe.recurrent import RecurrentCell, RecurrentRouter, recurrent_router_maker
from fusion_merge.moe.router import (
    ConstantRouter,
    LayerEncodedRouter,
    LinearRouter,
    MLPRouter,
    Router,
    make_router,
)
from fusion_merge.moe.selection import Bounded, Chain, SelectAll, Selection, SoftTopK, TopK, TopP, TsallisTopP
from fusion_merge.moe.selection_names import SELECTIONS, selection_named
from fusion_merge.moe.upcycle import find_mlps, route_mlps, upcycle_mlps

__all__ = [
    "SELECTIONS",
    "Bounded",
    "Chain",
    "ConstantRouter",
    "DenseExperts",
    "Experts",
    "LayerEncodedRouter",
    "LinearDelta",
    "LinearRouter",
    "LowRankExperts",
    "MLPRouter",
    "MoEAttention",
    "MoELinear",
    "MoEMLP",
    "ProjectionRouter",
    "RecurrentCell",
    "RecurrentRouter",
    "RoutedBlock",
    "Router",
    "Routing",
    "SelectAll",
    "Selection",
    "SoftTopK",
    "SparseExperts",
    "TopK",
    "TopP",
    "TsallisTopP",
    "find_blocks",
    "find_mlps",
    "make_router",
    "moe_layers",
    "record_coefficients",
    "recurrent_router_maker",
    "route_mlps",
    "selection_named",
    "set_routing",
    "upcycle_mlps",
]
