"""LoRA files of Kohya's sd-scripts, of LyCORIS and of OneTrainer, whose modules have flat names.

``lora_unet_mid_block_attentions_0_proj_in`` was ``mid_block.attentions.0.proj_in`` once. The underscores cannot be
turned back into dots, so flat names stay what they are until a base tells its modules' names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from merging.errors import FormatError
from merging.sources.adapter import Adapter
from merging.sources.lycoris import leaf_of, module_changes
from merging.sources.stored import Opened, Stored, open_tensors

__all__ = ["open_kohya", "recognises"]

_FLAT = re.compile(r"(?:lora_(?:unet|te\d?|transformer|prior_unet|prior|text_encoder)|lycoris|oft_(?:unet|te))_[^.]+\.")
_EMBEDDINGS = ("bundle_emb.", "emb_params", "string_to_param")


def recognises(names: Mapping[str, Stored]) -> bool:
    """Whether these are the tensor names of a file with flat module names."""
    return any(_FLAT.match(name) for name in names)


def open_kohya(path: Path, alpha: float | None = None, opened: Opened | None = None) -> Adapter:
    """The adapter of such a file; values are not read, but for the alphas.

    ``alpha`` replaces what the file states. Raises :class:`~merging.errors.FormatError` for any name that has no place.
    """
    tensors, metadata = opened or open_tensors(path)
    where = str(path)
    modules: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    for name, stored in tensors.items():
        if name.startswith(_EMBEDDINGS):
            raise FormatError(
                f"{path}: holds a textual-inversion embedding ({name}), which is no LoRA: take it out first"
            )
        module, _, rest = name.partition(".")
        found = leaf_of(name)
        leaf = "weight" if rest == "weight" else found[1] if found and found[0] == module else None
        if leaf is None or not _FLAT.match(name):
            raise FormatError(f"{path}: {name} is no tensor that a Kohya or LyCORIS file is known to hold")
        if leaf in modules[module]:
            raise FormatError(f"{path}: {name} is there twice, under two names")
        modules[module][leaf] = stored
    changes = [change for module, parts in modules.items() for change in module_changes(module, parts, where, alpha)]
    return Adapter(
        path=path,
        changes={change.target: change for change in changes},
        files=(path,),
        dialect="Kohya",
        base=metadata.get("ss_base_model_version"),
        config={key: metadata[key] for key in ("ss_base_model_version", "ss_v2") if key in metadata},
    )
