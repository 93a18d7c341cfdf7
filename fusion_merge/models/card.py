"""The model card of a merged model: what it was made of, how, and what it scores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tabulate import tabulate

_USE = """```python
from fusion_merge import MergedCLIPVisionModel

model = MergedCLIPVisionModel.from_pretrained("FOLDER_OR_HUB_ID")
```"""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    *,
    method: str,
    options: Mapping[str, Any],
    base_model: str,
    models: Mapping[str, str],
    scores: Mapping[str, float],
    command: str,
) -> str:
    """Return a model card in Markdown, with the metadata that the hub reads.

    Args:
        method: the name of the method.
        options: its options.
        base_model: where the pretrained model came from.
        models: where each task's fine-tuned model came from.
        scores: accuracies in 0-1 by task, where they are known; they become the `model-index`.
        command: the command that made the model, if there was one.
    """
    name = f"{method} of {len(models)} models"
    data = ModelCardData(
        base_model=_on_hub([base_model, *models.values()]) or None,
        library_name="fusion_merge",
        pipeline_tag="image-feature-extraction",
        tags=["model-merging", "mixture-of-experts", "clip", method],
        model_name=name if scores else None,
        eval_results=[_result(task, score) for task, score in scores.items()] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}",
        "A CLIP vision tower that fusion_merge made: some of its layers are routed mixtures of experts. It is called "
        "like `transformers.CLIPVisionModel`; heads are made from class names by the base model.",
        _USE,
        "## Models",
        tabulate([["base", base_model], *models.items()], headers=["task", "model"], tablefmt="github"),
        "## Method",
        f"`{method}`, with these options:",
        tabulate(
            [(f"`{k}`", f"`{v}`") for k, v in sorted(options.items())], headers=["option", "value"], tablefmt="github"
        ),
    ]
    if scores:
        rows = [(task, f"{100 * score:.1f}") for task, score in scores.items()]
        table = tabulate(rows, headers=["task", "top-1"], tablefmt="github", disable_numparse=True)
        parts += ["## Accuracy in percent", table]
    if command:
        parts += ["## Command", f"```bash\n{command}\n```"]
    return str(ModelCard("\n\n".join(parts) + "\n"))


def _on_hub(sources: Iterable[str]) -> list[str]:
    """Return those that look like hub ids and are no paths here, without their revisions, each once."""
    ids = dict.fromkeys(source.partition("@")[0] for source in sources if not Path(source).exists())
    return [name for name in ids if _HUB_ID.fullmatch(name)]


def _result(task: str, score: float) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=task,
        dataset_name=task,
        metric_type="accuracy",
        metric_value=round(score, 6),
    )
