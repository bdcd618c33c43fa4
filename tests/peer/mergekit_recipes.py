"""Run recipe files through mergekit's own commands, all in one process: started by the peer's own Python.

    python mergekit_recipes.py CACHE RECIPE.yml OUT [RECIPE.yml OUT ...]

A file of several documents goes to ``mergekit-multi``, any other to ``mergekit-yaml``. CACHE is a folder for merged
LoRAs and named stages. Prints one JSON list with the error of each recipe, null if it succeeded.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Merge every pair of arguments and print the errors."""
    if len(arguments) < 3 or not len(arguments) % 2:
        raise SystemExit(__doc__)

    import yaml
    from mergekit.scripts import multimerge, run_yaml

    cache, *pairs = arguments

    def merge(recipe: str, output: str) -> str | None:
        options = ["--quiet", "--no-write-model-card", "--lora-merge-cache", f"{cache}/loras"]
        stages = f"{cache}/stages-{Path(recipe).stem}"
        try:
            documents = [each for each in yaml.safe_load_all(Path(recipe).read_text("utf-8")) if each]
            if len(documents) > 1:
                command = [recipe, "--out-path", output, "-I", stages, "--no-lazy", *options]
                multimerge.main.main(command, standalone_mode=False)
            else:
                run_yaml.main.main([recipe, output, *options], standalone_mode=False)
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return None

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON alone
        errors = [merge(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
    print(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1:])
