"""Make mixtures with mergekit's command, in float32: started by the peer's own Python, as mergekit_runner.py is.

    python mergekit_moe_runner.py RECIPE.yml OUT [RECIPE.yml OUT ...]

The peer runs prompts in bfloat16 whatever the recipe says; here its model is loaded in float32, so that the formulas
can be compared.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def main(arguments: list[str]) -> None:
    """Make every mixture."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from mergekit.scripts.moe import main as mergekit_moe

    load = transformers.AutoModelForCausalLM.from_pretrained.__func__

    def load_in_float32(cls: Any, *names: Any, **options: Any) -> Any:
        options.pop("torch_dtype", None)
        return load(cls, *names, **{**options, "dtype": torch.float32})

    transformers.AutoModelForCausalLM.from_pretrained = classmethod(load_in_float32)
    for recipe, output in zip(arguments[::2], arguments[1::2], strict=True):
        mergekit_moe([recipe, output, "--quiet"], standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1:])
