"""The merged model: a CLIP vision tower whose MLPs, or linear layers, are routed, self-contained on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionModel, PreTrainedModel

from fusion_merge.errors import CheckpointError, ConfigError, FusionMergeError, ModelError, nearest, reason
from fusion_merge.models.card import model_card
from fusion_merge.models.clip import empty_tower, module_config, vision_backbone, vision_config
from fusion_merge.models.clip_config import plain_config
from fusion_merge.models.heads import TaskHeads, ZeroShotHead
from fusion_merge.models.measuring import measure, task_model
from fusion_merge.models.membership import Source, add_task, drop_task
from fusion_merge.models.merged_config import MergedCLIPVisionConfig as MergedCLIPVisionConfig
from fusion_merge.models.merged_config import check_seal
from fusion_merge.models.merged_files import read_exactly, write_description, write_model
from fusion_merge.models.merged_parts import chosen_dtype, install_empty_layers, refuse_unknown
from fusion_merge.models.sources import find_files
from fusion_merge.models.unknown_task import Prediction, identify, predict
from fusion_merge.moe.layer import moe_layers, router_parameters
from fusion_merge.moe.projection import projection_layers
from fusion_merge.sealed import checksum
from fusion_merge.task_vectors import shapes_of

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


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
    task_inputs: Tensor | None
    heads: TaskHeads | None
    _no_split_modules = ["CLIPEncoderLayer"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: MergedCLIPVisionConfig, vision_model: nn.Module | None = None) -> None:
        super().__init__(config)
        if vision_model is None:
            vision_model = CLIPVisionModel(vision_config(config.vision_config, where="the merged model"))
            install_empty_layers(vision_model, config)
        self.vision_model = vision_backbone(vision_model).requires_grad_(False)
        layers = moe_layers(self.vision_model) if config.moe else {}
        width = max((layer.num_coefficients for layer in layers.values()), default=0)
        self.register_buffer("task_coefficients", torch.zeros(len(config.tasks), len(layers), width))
        inputs = (
            torch.zeros(len(config.tasks), len(layers), *config.measured_inputs) if config.measured_inputs else None
        )
        self.register_buffer("task_inputs", inputs)
        width = vision_config(config.vision_config, where="the merged model").hidden_size
        self.heads = TaskHeads.empty(config.heads, width) if config.heads else None
        self.known_directions: list[Tensor] | None = None
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
        routers = {id(layer.router.shared_part() or layer.router) for layer in layers.values()}
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
        return measure(self, task, batches)

    def task_model(self, task: str) -> CLIPVisionModel:
        r"""Return a plain CLIP tower for one task: the merge at that task's mean coefficients.

        .. math:: W = W_0 + \Delta(\bar g_n), \qquad \bar g_n = \operatorname{mean}_x g(x)

        Args:
            task: one of the merged tasks, measured after adaptation or by `measure`.

        Raises:
            ModelError: if the task was not merged, or not measured.
        """
        return task_model(self, task)

    def set_heads(self, heads: Mapping[str, ZeroShotHead], classnames: Mapping[str, Sequence[str]]) -> None:
        """Give the model heads of its tasks, in place of those that it has; they are saved with it.

        Args:
            heads: a head for each of some merged tasks, or all.
            classnames: the names of each one's classes, in the order of the head's logits.

        Raises:
            ModelError: if a task was not merged, or lacks a head or names.
        """
        for task in heads:
            if task not in self.config.tasks:
                raise ModelError(f"`{task}` was not merged; {nearest(task, self.config.tasks)}")
        self.heads = TaskHeads(heads, classnames).to(self.device) if heads else None

    def identify(self, images: Tensor, by: str = "agreement") -> Tensor:
        r"""Return how well each image fits each merged task, the larger the better.

        .. math:: s_n = -\tfrac12 (c - \bar c_n)^\top \Sigma^{-1} (c - \bar c_n) \quad\text{or}\quad
                  s_n = -\operatorname{mean}_{l,t} \lVert x - V_n^\top V_n x \rVert^2 / \lVert x \rVert^2

        `agreement`: of the image's coefficients c, the mean of each task's experts in each block, with the mean of the
        task's images; Σ is their covariance within tasks. `projection`: of the tokens x that enter the first two routed
        blocks, with the leading right singular vectors V of the task's experts; that needs no image of the task.

        Args:
            images: preprocessed images.
            by: `agreement` or `projection`.

        Shape:
            (B, 3, height, width) → (B, N).

        Raises:
            ConfigError: if there is no such way.
            ModelError: if the model routes whole batches or tokens, or was not measured on its tasks' images.

        Source: projections as in MASS, arXiv 2504.05342, and SMILE, arXiv 2408.10174; both project the input of one
        layer that was chosen on data. Agreement is ours.
        """
        return identify(self, images, by)

    def predict(self, images: Tensor, task: str | None = None, by: str = "agreement") -> Prediction:
        """Return the class of each image, by the head of its task, in one forward pass.

        Args:
            images: preprocessed images (B, 3, height, width).
            task: the images' task; by default each image's is found by `identify`.
            by: as in `identify`.

        Raises:
            ModelError: if a head is missing, or as in `identify`.
        """
        return predict(self, images, task, by)

    def add_task(
        self,
        name: str,
        model: Source,
        images: Tensor | Iterable[Tensor],
        *,
        head: ZeroShotHead | None = None,
        classnames: Sequence[str] | None = None,
        pretrained: Source | None = None,
        ridge: float = 1e-3,
    ) -> None:
        """Add a task, given only its own model and images; if that fails, nothing is changed.

        Every bank gets its experts, and every router coefficients for them, by ridge regression: 1 on these images, 0
        on the others', of which the model holds what its routers read; see `moe.refit.grown_rows`. What lies outside
        routed blocks stays as it is unless `pretrained` is given, and then moves by λ (`init_lambda`) times the task
        vector. The routers' last layers become new parameters.

        Args:
            name: what the task is called.
            model: its fine-tuned tower, a module or its tensors by name; not changed.
            images: preprocessed images of the task, one tensor or batches (B, 3, height, width); 64 are enough
                where they are drawn from all classes, and not the first ones of a sorted folder.
            head: its head, if the model is to predict with it.
            classnames: the names of the head's classes.
            pretrained: the tower that all models were fine-tuned from.
            ridge: how strongly routers are kept from large weights, relative to the variance of their inputs, above 0.

        Raises:
            ConfigError: if an option is out of range.
            ModelError: if the name is taken, the tower or the images are of another shape, the routers do not end in a
                linear layer, or the model does not hold what they read.
        """
        add_task(*(self, name, model, images), head=head, classnames=classnames, pretrained=pretrained, ridge=ridge)

    def drop_task(self, name: str, model: Source | None = None, pretrained: Source | None = None) -> None:
        """Take out a task's experts, coefficients and head; if that fails, nothing is changed.

        What lies outside routed blocks stays as it is, unless both towers are given: then it moves back by λ
        (`init_lambda`) times the task vector. A selection of more coefficients than are left selects all that are.

        Args:
            name: one of the merged tasks.
            model: its fine-tuned tower.
            pretrained: the tower that it was fine-tuned from.

        Raises:
            ConfigError: if only one of the towers is given.
            ModelError: if the task was not merged, or is the last.
        """
        drop_task(self, name, model, pretrained)

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
        refuse_unknown(kwargs, f"{type(self).__name__}.save_pretrained")
        folder = Path(save_directory).expanduser()
        for name, layer in moe_layers(self.vision_model).items() if self.config.moe else ():
            self.config.moe[name] = layer.spec()  # the routing may have been changed
        self.config.measured_inputs = None if self.task_inputs is None else list(self.task_inputs.shape[2:])
        self.config.heads = [] if self.heads is None else self.heads.spec()
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
        dtype = chosen_dtype(kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        refuse_unknown(kwargs, f"{cls.__name__}.from_pretrained")
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
            install_empty_layers(tower, own_config)
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


AutoConfig.register(MergedCLIPVisionConfig.model_type, MergedCLIPVisionConfig, exist_ok=True)
AutoModel.register(MergedCLIPVisionConfig, MergedCLIPVisionModel, exist_ok=True)
