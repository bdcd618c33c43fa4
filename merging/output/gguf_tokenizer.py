"""The tokenizer of a model in a GGUF file, rebuilt by transformers from the file's metadata."""

from __future__ import annotations

from pathlib import Path

from merging.errors import OutputError
from merging.sources import Checkpoint

__all__ = ["rebuild_tokenizer"]


def rebuild_tokenizer(model: Checkpoint, folder: Path) -> str | None:
    """Write the tokenizer of a model in a GGUF file into a folder, as transformers reads it from the file.

    Nothing is written for other models, or where transformers cannot read it.

    Returns:
        A remark for people where it is missing, None otherwise.

    Raises:
        OutputError: if it cannot be written.
    """
    file = model.files[0] if model.files else None
    if file is None or file.suffix != ".gguf" or not model.config.get("model_type"):
        return None
    from transformers import AutoTokenizer
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # whatever a stranger's tokenizer makes of the library
        first = str(error).partition("\n")[0][:160] or type(error).__name__
        return (
            f"the output has no tokenizer, as transformers does not read it from {file} ({first}): copy it from the "
            f"folder of the model it was made from"
        )
    finally:
        logging.set_verbosity(said)
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # of a full disk tokenizers raises this very class
        raise OutputError(f"{folder}: the tokenizer cannot be written: {error}") from None
    return None
