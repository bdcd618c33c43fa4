"""The page about recipes of mergekit, what matches and what differs: python docs/generate/mergekit_page.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

__all__ = ["DIFFERENCES", "RECIPES", "Difference", "mergekit_page"]

RECIPES = {file.stem: file for file in sorted((Path(__file__).parents[2] / "tests" / "recipes").glob("*.yml"))}
"""The recipes that are compared, by their names."""


@dataclass(frozen=True)
class Difference:
    """A difference from mergekit 0.1.5 on purpose.

    Attributes:
        recipes: patterns of the recipes that show it.
        seen: patterns of the lines in which the comparison reports it.
        peer: what mergekit does.
        ours: what happens here.
        reason: why.
        by_chance: whether only some runs of mergekit show it.
    """

    recipes: tuple[str, ...]
    seen: tuple[str, ...]
    peer: str
    ours: str
    reason: str
    by_chance: bool = False

    def applies(self, recipe: str) -> bool:
        """Return whether a recipe shows the difference."""
        return any(fnmatchcase(recipe, pattern) for pattern in self.recipes)

    def explains(self, line: str) -> bool:
        """Return whether a line of the comparison is this difference."""
        return any(fnmatchcase(line, pattern) for pattern in self.seen)


_PADDED = (
    *("card-chat-template-jinja", "card-dare-ties-moon", "card-della-eight-points", "card-della-per-model-epsilon"),
    *("card-gpt2-debias", "card-karcher-deep", "card-model-stock-named", "card-tokenizer-base-padded"),
    *("card-union-chatml", "docs-chat-template"),
)
_TOKENIZED = (
    *_PADDED,
    *(
        "card-chat-template-alone",
        "card-tokenizer-mapping",
        "card-tokenizer-of-model",
        "card-union-three",
        "docs-tokens",
        "oracle-25-tokenizer-*",
    ),
)

DIFFERENCES = (
    Difference(
        ("card-dare-*", "card-della-*", "oracle-15-*"),
        ("values: random",),
        "drops changes by torch's random numbers, others in each run",
        "drops by a `seed`, 0 by default, whatever the number of threads; with nothing dropped the values are the same",
        "the same recipe makes the same bytes",
    ),
    Difference(
        ("card-breadcrumbs-plain",),
        ("values: *",),
        "keeps some of the changes whose size is exactly the bound of a density, in the order of its sort",
        "keeps all of them, or none",
        "in bfloat16 many changes have one size, and which of them a sort puts first differs between machines",
    ),
    Difference(
        ("card-arcee-fusion-float16",),
        ("dtype: *",),
        "`arcee_fusion` and `ramplus_tl` write float32, and config.json says otherwise",
        "writes the type of the recipe",
        "the files are half as large, and as the config says",
    ),
    Difference(
        ("card-karcher-base", "card-linear-base-global-weight"),
        ("values: *",),
        "`linear` and `karcher` count a `base_model` that is none of the models as one more model",
        "does not merge it, and says so; the weight of a base among the models counts",
        "a base is a model that others start from; to merge it, list it",
    ),
    Difference(
        (*_TOKENIZED, "card-lora-as-base", "card-lora-passthrough"),
        ("generation_config.json: *",),
        "loses generation_config.json where the recipe has a tokenizer or a chat template, or its base has an adapter",
        "copies it, with the ids of the new tokenizer",
        "without it a model may not stop at its end of turn",
    ),
    Difference(
        _PADDED,
        ("shape: *", "config.json: vocab_size: *"),
        "cuts the rows of the vocabulary to the number of tokens",
        "keeps the rows that pad it; `pad_to_multiple_of` chooses another number",
        "models have such rows so that matrices have a round size, and programs that serve them count on it",
    ),
    Difference(
        ("card-model-stock-named",),
        ("values: lm_head.weight", "values: model.embed_tokens.weight"),
        "takes angles between tables without the rows that pad them",
        "takes them with all rows of the output",
        "follows from the row above",
    ),
    Difference(
        ("card-union-three", "oracle-25-tokenizer-union"),
        ("tokenizer: ids: *", "tokenizer: encoding: *"),
        "numbers the tokens of other models in an order that changes from run to run, and adds no merges for them",
        "numbers them in the order of the models and of their own ids, with the merges that lead to them",
        "the same recipe makes the same bytes, and the new tokens occur when text is encoded; rows match by token",
    ),
    Difference(
        ("card-chat-template-alone",),
        ("tokenizer: chat template: *",),
        "`alpaca`: writes the heading of the answer behind the question, on one line, and no end of sequence",
        "with empty lines between the parts, and the end of sequence behind answers",
        "as models of this format were trained",
    ),
    Difference(
        ("card-tokenizer-mapping",),
        ("tokenizer: chat template: *",),
        "`chat_template: auto`, of two templates with as many models: takes either",
        "takes the template of the tokenizer's model",
        "the template uses tokens that its own tokenizer has",
        by_chance=True,
    ),
    Difference(
        ("card-model-mapping", "card-nuslerp-gradient", "oracle-18-nuslerp"),
        ("tokenizer: chat template: *", "generation_config.json: *"),
        "without `base_model` and `tokenizer_source`, copies config and tokenizer of a model in an order by chance",
        "copies the files of the first model",
        "the same recipe makes the same files",
        by_chance=True,
    ),
    Difference(
        ("card-stack-gpt2",),
        ("extra: lm_head.weight", "config.json: tie_word_embeddings: *"),
        "stacks two models with tied heads: the embedding of the first one is the head",
        "writes the head of the last model, and says in config.json that it is not tied",
        "the last blocks and the final norm were trained with that head",
    ),
    Difference(
        ("card-stack-dangling",),
        ("values: lm_head.weight", "values: model.norm.weight"),
        "merges the head and the final norm of as many models as the first slice has, if the last slice has more",
        "of all models of the last slice",
        "these tensors come after its blocks",
    ),
    Difference(
        ("card-stack-tied", "card-stack-window-layers"),
        ("refused by the peer: StrictDataclassClassValidationError: *",),
        "fails on models whose config lists a kind of attention for each layer",
        "puts these lists together like the layers",
        "layers of Gemma, Qwen and others can be stacked",
    ),
    Difference(
        ("card-clip",),
        ("refused by the peer: NotImplementedError: *",),
        "fails on CLIP, GPT-NeoX, Whisper, BERT, T5 without gates, and others that its definitions do not fit",
        "merges models of any architecture by the names of their tensors",
        "a merge needs names and shapes, and no definition of the architecture",
    ),
    Difference(
        ("card-model-stock-weights", "card-sce-gradient", "card-stack-revision", "card-unknown-keys"),
        ("refused here: *",),
        "ignores keys and parameters that it does not know, and parameters in places where they have no effect",
        "refuses them with their line; with `--lenient` ignores them, names them, and makes the same model",
        "a misspelled `density` or a `revision` without effect makes another model than its author meant",
    ),
    Difference(
        ("docs-modules",),
        ("extra: shared.weight",),
        "leaves out the table that the encoder and the decoder of a T5 share",
        "writes every tensor; the table is the encoder's",
        "a model must be whole",
    ),
    Difference(
        ("card-slerp-other-base", "card-weight-misplaced"),
        ("refused by the peer: *", "refused here: *", "refused with --lenient: *"),
        "refuses a base that is no source of a slice, and a model without a weight that the method needs",
        "refuses them too, with the line",
        "nothing says what is meant",
    ),
)
"""All differences. The comparison with mergekit fails where it sees another one, or does not see one of these."""


def mergekit_page() -> str:
    """Return the page."""
    same = [name for name in RECIPES if not any(each.applies(name) for each in DIFFERENCES)]
    rows = ["| | mergekit 0.1.5 | here | why | recipes |", "|---|---|---|---|---|"]
    for number, each in enumerate(DIFFERENCES, 1):
        shown = ", ".join(f"`{name}`" for name in RECIPES if each.applies(name))
        rows.append(f"| {number} | {each.peer} | {each.ours} | {each.reason} | {shown} |")
    table = ["| recipe | of | what it shows | result |", "|---|---|---|---|"]
    for name, file in RECIPES.items():
        numbers = [str(number) for number, each in enumerate(DIFFERENCES, 1) if each.applies(name)]
        text = file.read_text(encoding="utf-8")
        models = ", ".join(sorted(set(re.findall(r"\b(llama|mistral|qwen2|qwen3|gemma|gpt2|t5|clip)/", text))))
        result = f"differs: {', '.join(numbers)}" if numbers else "the same"
        table.append(f"| `{name}` | {models} | {_about(text)} | {result} |")
    return _TEXT.format(count=len(RECIPES), same=len(same), differences="\n".join(rows), recipes="\n".join(table))


def _about(text: str) -> str:
    """Return the first line of a recipe, if it is a comment, else its method."""
    first = text.lstrip().splitlines()[0]
    if first.startswith("# "):
        return first[2:].replace("|", "\\|")
    method = re.findall(r"merge_method\"?: *\"?(\w+)", text)
    return f"`{method[-1]}`" if method else ""


_TEXT = """\
# Recipes of mergekit: matches and differences

{count} recipes are run here and by mergekit 0.1.5, on tiny models of eight architectures, by a test of this project.
They are the configurations by which its methods are compared, the examples of its documentation, and the forms that
recipes on model cards have. Of {same} the outputs are the same. The others differ, nearly all on purpose, as the first
table says. The test fails on any other difference, and on a difference that is no longer there.

The same means: names, shapes and types of all tensors; values that are mergekit's, computed by it in float64, rounded
once to the type of the output (float32 within 1e-6, for weights up to 1); each field of config.json and
generation_config.json; tokens with the same ids, special tokens, the encoding of texts, and what the chat template
writes. mergekit itself computes in the type of the recipe, so that its own bfloat16 outputs differ in some last digits.

## Differences

{differences}

## Recipes

They are in `tests/recipes/` of the repository.

{recipes}
"""


if __name__ == "__main__":
    print(mergekit_page())
