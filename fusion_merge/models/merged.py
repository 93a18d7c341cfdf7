"""The merged model: a CLIP vision tower whose MLPs, or linear layers, are routed, self-contained on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionModel, PreTrainedModel

from fusion_merge.errors import CheckpointError, ConfigError, FusionMergeError, ModelError, nearest, reason
from fusion_merge.models.card import model_card
from fusion_merge.models.clip import build_tower, empty_tower, module_config, vision_backbone, vision_config
from fusion_merge.models.clip_config import plain_config
from fusion_merge.models.merged_config import MergedCLIPVisionConfig as MergedCLIPVisionConfig
from fusion_merge.models.merged_config import check_seal
from fusion_merge.models.merged_files import read_exactly, write_description, write_model
from fusion_merge.models.sources import find_files
from fusion_merge.moe.blocks import empty_block, find_blocks
from fusion_merge.moe.layer import moe_layers, record_coefficients, router_parameters
from fusion_merge.moe.projection import empty_projection, find_linears, projection_layers
from fusion_merge.moe.router import Router
from fusion_merge.sealed import checksum
from fusion_merge.task_vectors import shapes_of

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
_PASSED_ALONG = ("adapter_kwargs", "trust_remote_code", "safe_serialization", "save_peft_format")


class MergedCLIPVisionModel(PreTrainedModel):
    """A CLIP vision tower with routed MLPs, attention or linear layers, called like `transformers.CLIPVisionModel`.

    `save_pretrained` writes everything (base, experts, routers) and `from_pretrained` reads it back bit for bit,
    without the pool it was made from. Only routers require gradients.

    Args:
        config: what the model is made of.
        vision_model: the upcycled tower to wrap; by default one is made from `config`, with random weights.
    """

    config_class = MergedCLIPVisionConfig
    config: MergedCLIPVisionConfig
    base_model_prefix = "merged"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    task_coefficients: Tensor
    _no_split_modules = ["CLIPEncoderLayer"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: MergedCLIPVisionConfig, vision_model: nn.Module | None = None) -> None:
        super().__init__(config)
        if vision_model is None:
            vision_model = CLIPVisionModel(vision_config(config.vision_config, where="the merged model"))
            _install_empty_layers(vision_model, config)
        self.vision_model = vision_backbone(vision_model).requires_grad_(False)
        layers = moe_layers(self.vision_model) if config.moe else {}
        width = max((layer.num_coefficients for layer in layers.values()), default=0)
        self.register_buffer("task_coefficients", torch.zeros(len(config.tasks), len(layers), width))
        if config.moe:
            for parameter in router_parameters(self.vision_model):
                parameter.requires_grad_(True)
        self.post_init()

    def init_weights(self) -> None:
        """Leave weights alone: they come from the tower, or from a file; transformers would draw them anew."""

    @classmethod
    def from_tower(
        cls,
        tower: nn.Module,
        *,
        tasks: list[str],
        method: str,
        method_options: dict[str, Any],
        base_model: str,
        models: dict[str, str] | None = None,
    ) -> MergedCLIPVisionModel:
        """Wrap an upcycled tower.

        Args:
            tower: the tower, its MLPs or linear layers routed; it becomes part of the result.
            tasks: the tasks that were merged, in the order of their experts.
            method: the name of the method.
            method_options: its options, as plain values.
            base_model: where the pretrained model came from.
            models: where each task's fine-tuned model came from.
        """
        backbone = vision_backbone(tower)
        linears = projection_layers(backbone)
        layers = {} if linears else moe_layers(backbone)
        routers = {id(_inner(layer.router)) for layer in layers.values()}
        config = MergedCLIPVisionConfig(
            vision_config=plain_config(module_config(tower)),
            moe={name: layer.spec() for name, layer in layers.items()},
            linears={name: layer.spec() for name, layer in linears.items()},
            shared_router=len(routers) == 1 and len(layers) > 1,
            tasks=tasks,
            method=method,
            method_options=method_options,
            base_model=base_model,
            models=models,
        )
        return cls(config, tower).eval()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return what the vision tower returns, `pooler_output` (B, D) included.

        Args:
            pixel_values: images.
            **kwargs: what `CLIPVisionModel.forward` takes besides.

        Shape:
            pixel_values (B, 3, height, width).
        """
        return self.vision_model(pixel_values=pixel_values, **kwargs)

    @torch.no_grad()
    def measure(self, task: str, batches: Iterable[Tensor]) -> Tensor:
        """Measure and keep the mean merging coefficients of a task's images, as they are routed now.

        Args:
            task: one of the merged tasks.
            batches: images of that task.

        Shape:
            each batch (B, 3, height, width) → (L, K).

        Raises:
            ModelError: if the task was not merged, or if there is no image.
        """
        index = self._index(task)
        with record_coefficients(self.vision_model) as record:
            for pixels in batches:
                self.forward(pixels.to(self.device, self.dtype))
        if not all(record.values()):
            raise ModelError(f"there is no image of `{task}` to measure by; give at least one batch")
        means = torch.stack([torch.cat(values).mean(dim=0) for values in record.values()])  # (L, K)
        self.task_coefficients[index] = means.to(self.task_coefficients)
        if task not in self.config.measured_tasks:
            self.config.measured_tasks.append(task)
        return means

    @torch.no_grad()
    def task_model(self, task: str) -> CLIPVisionModel:
        r"""Return a plain CLIP tower for one task: the merge at that task's mean coefficients.

        .. math:: W = W_0 + \Delta(\bar g_n), \qquad \bar g_n = \operatorname{mean}_x g(x)

        Args:
            task: one of the merged tasks, measured after adaptation or by `measure`.

        Raises:
            ModelError: if the task was not merged, or not measured.
        """
        index = self._index(task)
        if task not in self.config.measured_tasks:
            raise ModelError(f"the mean coefficients of `{task}` are not known; call `measure({task!r}, batches)`")
        layers = moe_layers(self.vision_model)
        state = {
            name: tensor
            for name, tensor in self.vision_model.state_dict().items()
            if not name.startswith(tuple(f"{layer}." for layer in layers))
        }
        for position, (name, layer) in enumerate(layers.items()):
            mean = self.task_coefficients[index, position, : layer.num_coefficients].unsqueeze(0)  # (1, K)
            for part, linear in layer.linears().items():
                delta = linear.experts.delta(mean.to(linear.base.weight.dtype))
                state[f"{name}.{part}.weight"] = linear.base.weight + delta.weight[0]
                state[f"{name}.{part}.bias"] = linear.base.bias + delta.bias[0]
        config = vision_config(self.config.vision_config, where="the merged model")
        tower = build_tower(config, {n: t.cpu() for n, t in state.items()}, where=f"the tower of `{task}`")
        return tower.to(self.device, self.dtype).requires_grad_(False).eval()  # type: ignore[arg-type]

    def _index(self, task: str) -> int:
        if self.config.linears:
            raise ModelError(
                f"experts of `{self.config.method}` are chosen for each token: no plain tower does the same for a task"
            )
        if task not in self.config.tasks:
            raise ModelError(f"`{task}` was not merged; {nearest(task, self.config.tasks)}")
        return int(self.config.tasks.index(task))

    def own_state(self) -> dict[str, Tensor]:
        """Return every tensor of the model once: a shared router's under its first layer."""
        once = {name for name, _ in self.named_parameters()} | {name for name, _ in self.named_buffers()}
        return {name: tensor for name, tensor in self.state_dict().items() if name in once}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the model: safetensors, `config.json` and a model card.

        A model that was there is replaced as a whole or not at all: whenever the process is killed, either the earlier
        model or this one can be read with this library. Leftovers of killed saves are removed by the next one.

        Args:
            save_directory: the folder; it is made.
            **kwargs: `max_shard_size`, `is_main_process` and `push_to_hub` mean what they mean in transformers.

        Raises:
            FusionMergeError: if the folder cannot be written.
        """
        if not kwargs.get("is_main_process", True):
            return
        if not kwargs.get("safe_serialization", True):
            raise ConfigError("`safe_serialization`=False is not possible: only safetensors are written")
        known = {
            k: kwargs.pop(k) for k in ("max_shard_size", "is_main_process", "push_to_hub", "repo_id") if k in kwargs
        }
        _refuse_unknown(kwargs, f"{type(self).__name__}.save_pretrained")
        folder = Path(save_directory).expanduser()
        for name, layer in moe_layers(self.vision_model).items() if self.config.moe else ():
            self.config.moe[name] = layer.spec()  # the routing may have been changed
        state = {name: t.detach().to("cpu").contiguous() for name, t in self.own_state().items()}
        self.config.architectures = [type(self).__name__]
        self.config.checksum = checksum(state)
        self.config.seal()
        write_model(folder, state, self.config, self.card(), max_shard_size=known.get("max_shard_size") or "5GB")
        if known.get("push_to_hub"):
            hub: Any = self
            hub.push_to_hub(known.get("repo_id") or folder.name)

    def card(self) -> str:
        """Return the model card in Markdown."""
        config = self.config
        return model_card(
            method=config.method,
            options=config.method_options,
            base_model=config.base_model,
            models=config.models,
            scores=config.scores,
            command=config.command,
        )

    def add_scores(self, folder: Path | str, scores: Mapping[str, float], command: str = "") -> None:
        """Say in the configuration and the card of a saved model what it scores and what made it.

        Args:
            folder: where `save_pretrained` wrote this model.
            scores: accuracies in 0-1 by task.
            command: the command that made it.

        Raises:
            FusionMergeError: if the folder cannot be written.
        """
        self.config.scores, self.config.command = dict(scores), command
        self.config.seal()
        write_description(folder, self.config, self.card())

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        (Path(working_dir) / "README.md").write_text(self.card(), encoding="utf-8")  # transformers put a bare one there
        hub: Any = super()
        return hub._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *_: Any, config: Any = None, **kwargs: Any
    ) -> MergedCLIPVisionModel:
        """Read a model that `save_pretrained` wrote; a missing or unexpected tensor is an error.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id such as `owner/name@revision`.
            config: the configuration, if it was read already; it is used if it is this model's or was changed by hand.
            **kwargs: `dtype` converts floating-point tensors; `revision` names a version on the hub.

        Raises:
            CheckpointError: if the files do not hold exactly the tensors of the model, or were changed since.
        """
        dtype = _dtype(kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        _refuse_unknown(kwargs, f"{cls.__name__}.from_pretrained")
        source = str(pretrained_model_name_or_path)
        if Path(source).exists():
            hub_options.pop("revision", None)  # transformers passes `main` along, whatever the source
        files = find_files(source, **{name: value for name, value in hub_options.items() if value is not None})
        if files.config.get("model_type") != MergedCLIPVisionConfig.model_type:
            raise CheckpointError(
                f"`{source}` holds a model of type {files.config.get('model_type')!r}, not a merged one; "
                "read it with transformers.AutoModel"
            )
        try:
            check_seal(files.config, source)
            given = isinstance(config, MergedCLIPVisionConfig) and config.overrides(files.config)
            own_config = config if given else MergedCLIPVisionConfig.from_dict(dict(files.config))
            tower = empty_tower(vision_config(own_config.vision_config, where=source))
            _install_empty_layers(tower, own_config)
            model = cls(own_config, tower)
        except FusionMergeError:
            raise
        except Exception as error:  # a configuration may be wrong in any way
            raise CheckpointError(
                f"the configuration of `{source}` is not one of a merged model: {reason(error)}"
            ) from error
        tensors = read_exactly(files, shapes_of(model.own_state()))
        model.load_state_dict(tensors, strict=False, assign=True)
        for layer in moe_layers(model.vision_model).values() if own_config.moe else ():
            for linear in layer.linears().values():
                linear.experts.lay_out(linear.base)
        if dtype is not None:
            module: nn.Module = model
            module.to(dtype)
        return model.eval()


def _dtype(*given: Any) -> torch.dtype | None:
    """Return the dtype that was asked for, by object or by name; `auto` and None mean as it is stored."""
    wanted = next((value for value in given if value not in (None, "auto")), None)
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if wanted is not None and not isinstance(found, torch.dtype):
        raise ConfigError(f"`dtype`={wanted!r} is not a dtype; choose float32, float16, bfloat16 or auto")
    return found


def _refuse_unknown(options: dict[str, Any], where: str) -> None:
    """Refuse options that are not known; what transformers passes along without a value is not one."""
    for name, value in options.items():
        if value is not None and not name.startswith("_") and name not in _PASSED_ALONG:
            raise ConfigError(f"`{name}` is not an option of {where}")


def _install_empty_layers(tower: nn.Module, config: MergedCLIPVisionConfig) -> None:
    backbone = vision_backbone(tower)
    blocks = find_blocks(backbone, "all") if config.moe else {}
    plain = find_linears(backbone) if config.linears else {}
    for name, spec in config.linears.items():
        if name not in plain:
            raise CheckpointError(f"the configuration routes `{name}`, which is not a linear layer of the vision tower")
        backbone.set_submodule(name, empty_projection(spec, plain[name]))
    shared: nn.Module | None = None
    for name, spec in config.moe.items():
        if name not in blocks:
            raise CheckpointError(f"the configuration routes `{name}`, which is no MLP or attention of the tower")
        layer = empty_block(spec, blocks[name], shared)
        backbone.set_submodule(name, layer)
        if config.shared_router:
            shared = _inner(layer.router)


def _inner(router: Router) -> nn.Module:
    return router.shared_part() or router


AutoConfig.register(MergedCLIPVisionConfig.model_type, MergedCLIPVisionConfig, exist_ok=True)
AutoModel.register(MergedCLIPVisionConfig, MergedCLIPVisionModel, exist_ok=True)
