"""The only file that knows the insides of CLIP and the versions of transformers (4.57 and 5.x).

transformers 4 nests the vision transformer (`CLIPVisionModel.vision_model`), transformers 5 is flat, and files exist
in both layouts. Here *canonical* names are the flat ones, for example `encoder.layers.0.mlp.fc1.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging as transformers_logging

from fusion_merge.commits import atomic_files
from fusion_merge.errors import ModelError, reason
from fusion_merge.models.clip_config import check_same_arithmetic as check_same_arithmetic
from fusion_merge.models.clip_config import check_whole_clip as check_whole_clip
from fusion_merge.models.clip_config import vision_config as vision_config
from fusion_merge.models.offline import WAY_OUT, asking_the_hub, is_offline
from fusion_merge.models.pictures import as_bytes
from fusion_merge.models.sources import WEIGHT_PATTERNS
from fusion_merge.task_vectors import State, check_same_shape_tables, shapes_of

_PREFIXES = ("module.", "clip.", "model.", "vision_model.")
_ROOTS = ("embeddings.class_embedding", "embeddings.patch_embedding.", "embeddings.position_embedding.")
_PARTS = ("pre_layrnorm.", "encoder.layers.", "post_layernorm.")


PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
"""The names that the files of a CLIP processor may have; none has all of them."""

_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


class Tokenizer(Protocol):
    """What turns prompts into token ids: a Hugging Face tokenizer or processor."""

    def __call__(self, text: list[str], **kwargs: Any) -> Mapping[str, Tensor]:
        """Tokenize prompts."""
        ...


@dataclass(frozen=True)
class Processor:
    """The two halves of a CLIP processor.

    Attributes:
        image_processor: from images to `pixel_values`.
        tokenizer: from prompts to token ids.
    """

    image_processor: Callable[..., Mapping[str, Tensor]]
    tokenizer: Tokenizer

    def preprocess(self, image: Any) -> Tensor:
        """Return one preprocessed image.

        Args:
            image: a PIL image, or an array or tensor of three channels, first or last: whole numbers 0-255, or
                floating-point numbers 0-1 as torchvision's `ToTensor` makes them.

        Shape:
            → (3, height, width), the processor's own height and width.

        Raises:
            DataError: if an array holds other values.
        """
        picture = as_bytes(image)
        options = {"return_tensors": "pt"}
        if getattr(picture, "height", None) in (1, 3):  # which transformers 4 takes for a number of channels
            options["input_data_format"] = "channels_last"
        pixels: Tensor = self.image_processor(images=picture, **options)["pixel_values"][0]
        return pixels


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Return which name of a checkpoint holds each tensor of the vision tower.

    Args:
        names: the names in the checkpoint, in any of the layouts; others than the vision tower's are ignored.

    Returns:
        The checkpoint's name by canonical name.

    Raises:
        ModelError: if two names stand for one tensor.
    """
    found: dict[str, str] = {}
    for name in names:
        short = _strip(name)
        if not short.startswith(_ROOTS + _PARTS):
            continue
        if short in found:
            raise ModelError(f"`{found[short]}` and `{name}` are the same tensor of a vision tower")
        found[short] = name
    return found


def _strip(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name


def part_of_tensor(name: str) -> tuple[int | None, str]:
    """Return which layer a tensor belongs to (None outside of layers), and whether to its `mlp`, `attention` or `rest`.

    Args:
        name: its canonical name.
    """
    path = name.split(".")
    layer = next((int(n) for before, n in pairwise(path) if before == "layers" and n.isdigit()), None)
    if layer is None:
        return None, "rest"
    return layer, "mlp" if "mlp" in path else "attention" if "self_attn" in path else "rest"


def vision_backbone(model: nn.Module) -> nn.Module:
    """Return the flat vision transformer inside a CLIP model of either layout.

    Args:
        model: a `CLIPModel`, a `CLIPVisionModel`, or the transformer itself.

    Raises:
        ModelError: if there is none.
    """
    while isinstance(inner := getattr(model, "vision_model", None), nn.Module):
        model = inner
    if not hasattr(model, "embeddings") or not hasattr(model, "post_layernorm"):
        raise ModelError(f"`{type(model).__name__}` is not a CLIP vision model")
    return model


def module_config(model: nn.Module) -> CLIPVisionConfig:
    """Return the vision configuration of a CLIP module.

    Args:
        model: a `CLIPModel`, a `CLIPVisionModel`, or the transformer itself.
    """
    config = vision_backbone(model).config
    if not isinstance(config, CLIPVisionConfig):
        raise ModelError(f"`{type(model).__name__}` carries no CLIPVisionConfig")
    return config


def module_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module's vision tower under canonical names, detached but not copied.

    Args:
        model: a `CLIPModel`, a `CLIPVisionModel`, or the transformer itself.
    """
    state = vision_backbone(model).state_dict()
    return {short: state[name].detach() for short, name in canonical_names(state).items()}


def empty_tower(config: CLIPVisionConfig) -> CLIPVisionModel:
    """Make a `CLIPVisionModel` without spending time on random weights; its values are still to be loaded.

    Args:
        config: its configuration.
    """
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    model.to_empty(device="cpu")
    embeddings: Any = vision_backbone(model).embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)
    return model.eval()


def expected_shapes(config: CLIPVisionConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a vision tower, without memory for it.

    Args:
        config: its configuration.
    """
    with torch.device("meta"):
        return shapes_of(module_state(CLIPVisionModel(config)))


def build_tower(config: CLIPVisionConfig, state: State, *, where: str) -> CLIPVisionModel:
    """Make a `CLIPVisionModel` with the given weights; a missing or unexpected one is an error.

    Args:
        config: its configuration.
        state: its tensors under canonical names; they are copied.
        where: what the tower is, for errors.

    Raises:
        ModelError: if names or shapes do not fit the configuration.
    """
    model = empty_tower(config)
    load_tower_state(model, state, where=where)
    return model


def load_tower_state(model: nn.Module, state: State, *, where: str) -> None:
    """Copy tensors into a vision tower; a missing or unexpected one is an error.

    Args:
        model: a `CLIPVisionModel` or the transformer itself.
        state: its tensors under canonical names.
        where: what they are, for errors.

    Raises:
        ModelError: if names or shapes do not fit the model, or a tensor holds NaN or infinite values.
    """
    own = module_state(model)
    check_same_shape_tables(shapes_of(own), shapes_of(state), where=where)
    for name, tensor in own.items():
        tensor.copy_(state[name])
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{where} would hold NaN or infinite values in `{name}`; choose smaller coefficients, or other weights"
            )


def save_tower(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a vision tower so that transformers 4.57 and 5.x both read it as a `CLIPVisionModel`.

    A model that was there is replaced as a whole or not at all; weights of its in other files are removed.

    Args:
        model: a `CLIPVisionModel` or the transformer itself.
        folder: where `config.json` and `model.safetensors` go; it is made.
        dtype: what to store; by default as the model is.

    Raises:
        FusionMergeError: if the folder cannot be written.
    """
    config = CLIPVisionConfig.from_dict(module_config(model).to_dict())
    config.architectures = ["CLIPVisionModel"]
    tensors = {f"vision_model.{n}": t.to("cpu", dtype).contiguous() for n, t in module_state(model).items()}
    with atomic_files(folder, replaces=WEIGHT_PATTERNS) as place:
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(config.to_json_string(use_diff=True), encoding="utf-8")


def pooled_output(output: Any) -> Tensor:
    """Return the pooled output of a vision tower: an object in every version, a tuple if asked for.

    Args:
        output: what the tower returned.

    Shape:
        → (B, D).
    """
    if isinstance(output, Tensor):
        return output
    pooled: Tensor = output[1] if isinstance(output, tuple) else output.pooler_output
    return pooled


@torch.no_grad()
def text_embeddings(model: CLIPModel, tokenizer: Tokenizer, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Embed prompts with the text tower, each of unit length.

    Args:
        model: a CLIP model with its text tower.
        tokenizer: its tokenizer or processor.
        prompts: the texts; longer ones than the tower takes are cut.
        batch_size: how many are embedded at a time.

    Shape:
        → (number of prompts, P), P the width of the common space.

    Raises:
        ModelError: if the tokenizer is not that of the model.
    """
    device = model.text_projection.weight.device
    config: Any = model.config
    limit = config.text_config.max_position_embeddings
    chunks = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        try:
            tokens = tokenizer(text=batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            output = model.text_model(
                input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
            )
        except Exception as error:  # tokenizers raise errors of their own
            raise ModelError(
                f"the text tower cannot read what its tokenizer makes of {batch[0]!r}: {reason(error)}; "
                "give the `processor` that belongs to the CLIP model"
            ) from error
        chunks.append(F.normalize(model.text_projection(pooled_output(output)), dim=-1))  # (batch, P)
    return torch.cat(chunks)  # (number of prompts, P)


def load_clip(path: str, *, where: str, **hub_options: Any) -> CLIPModel:
    """Load a whole CLIP model, text tower included, in float32.

    Args:
        path: a folder or a hub id.
        where: what it is, for errors.
        **hub_options: `revision` and the like.

    Raises:
        ModelError: if it cannot be read, or is not a whole CLIP model.
    """
    try:
        with asking_the_hub(path), _no_progress():
            loaded: Any = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **hub_options)
        model, info = loaded
    except Exception as error:  # configurations and unpicklers fail in ways of their own
        raise ModelError(f"cannot read {where} as a CLIP model: {str(error) or reason(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{where} lacks `{missing[0]}` and {len(missing) - 1} more tensors of a whole CLIP model; "
            "give a checkpoint that has its text tower, as `clip_model`"
        )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{where} holds NaN or infinite values in `{name}`; use another copy of the model")
    return model.eval().requires_grad_(False)


@contextmanager
def _no_progress() -> Iterator[None]:
    """Keep transformers from drawing a progress bar of its own."""
    drawn = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers_logging.enable_progress_bar()


def load_processor(path: str, *, where: str, **hub_options: Any) -> Processor:
    """Load a CLIP processor; images go through PIL, as the published figures did.

    Args:
        path: a folder or a hub id.
        where: what it is, for errors.
        **hub_options: `revision` and the like.

    Raises:
        ModelError: if it cannot be read.
    """
    backend = {"backend": "pil"} if _TRANSFORMERS_5 else {"use_fast": False}
    with asking_the_hub(path):
        try:
            options = {"trust_remote_code": False, **hub_options}  # nothing is run, and nobody is asked
            image_processor = AutoImageProcessor.from_pretrained(path, **backend, **options)
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except Exception as error:  # tokenizers and image processors fail in ways of their own
            if is_offline() and not Path(path).exists():
                raise ModelError(f"the CLIP processor of {where} is not in the cache; {WAY_OUT}") from error
            raise ModelError(
                f"cannot read a CLIP processor from {where}; save one there, or name another place as the pool's "
                f"`processor` ({str(error) or reason(error)})"
            ) from error
    return Processor(image_processor, tokenizer)


def split_processor(processor: Any) -> Processor:
    """Return the halves of a processor object.

    Args:
        processor: a `CLIPProcessor`, or a `Processor`.

    Raises:
        ModelError: if it is neither.
    """
    if isinstance(processor, Processor):
        return processor
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return Processor(processor.image_processor, processor.tokenizer)
    raise ModelError(f"`processor` is a {type(processor).__name__}; give a CLIPProcessor, a folder or a hub id")
