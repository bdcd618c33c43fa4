"""What a LoRA of PEFT wraps that is no module's weight: parameters by their names, and torch's multi-head attention.

Neither is told by the names in the file alone. Several parameters of one module are wrapped one in another
(``experts.base_layer.lora_A``, ``experts.lora_A``), and only the config names them.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["in_order"]


def in_order(parameters: Iterable[str]) -> list[str]:
    """The names of a module's parameters in the order in which modules of experts define them, and PEFT wraps them.

    What goes into the experts comes first: ``gate_up_proj``, ``up_proj`` or ``w1`` before ``down_proj`` or ``w2``.
    """
    return sorted(parameters, key=lambda name: ("down" in name or name == "w2", name))
