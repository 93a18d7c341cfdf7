"""What a reader must know of an adaptation besides the figures that came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def adaptation_notes(adaptation: Mapping[str, Any] | None) -> list[str]:
    """Return sentences without a full stop: that it was interrupted or ended early, and which tasks it harmed.

    Args:
        adaptation: what `AdaptationRecord.told` returned, if there was one.
    """
    if not adaptation:
        return []
    notes = []
    if adaptation.get("interrupted"):
        notes.append(f"adaptation was interrupted after {adaptation['steps']} steps")
    if adaptation.get("stopped"):
        notes.append(f"adaptation ended after {adaptation['steps']} steps: {adaptation['stopped']}")
    for task, step in (adaptation.get("collapsed") or {}).items():
        notes.append(f"`{task}` collapsed to one class from step {step} on")
    for done in adaptation.get("interventions") or ():
        notes.append(
            f"`{done['task']}` degraded: its {done['measure']} fell from {done['best']:.2f} to {done['score']:.2f} "
            f"within {done['step']} steps; the parameters after {done['back_to']} steps were put back, with "
            f"1/{round(1 / done['pace'])} of the learning rate ({done['action']})"
        )
    return notes
