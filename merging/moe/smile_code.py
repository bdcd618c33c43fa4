"""The program that a SMILE mixture brings in its folder, so that transformers loads it without this package."""

from __future__ import annotations

from string import Template

__all__ = ["AUTO_CLASSES", "CODE_FILE", "smile_code"]

CODE_FILE = "modeling_smile.py"
"""The file of the program."""

AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
"""The class of transformers that loads a model, by the ending of the model's class; AutoModel for all others."""

_CODE = Template('''\
"""A mixture of low-rank experts on a $architecture (SMILE, arXiv 2408.10174). Apache-2.0.

    $auto.from_pretrained(FOLDER, trust_remote_code=True)
"""

import torch
from torch import nn
from transformers import $config, $architecture


class SmileConfig($config):
    """The base's config, and ``smile``: how many experts, how many a token, and the rank of each module."""

    model_type = "smile_$model_type"


class SmileLinear(nn.Linear):
    """A linear layer of the base, with low-rank experts that the token's own projections choose between."""

    def __init__(self, layer, smile, rank, rows, bias):
        where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, **where)
        self.rank, self.gate_rank, self.chosen = rank, smile["gate_rank"], smile["experts_per_token"]
        self.smile_up = nn.Parameter(torch.zeros(smile["experts"], layer.out_features, rank, **where))
        self.smile_down = nn.Parameter(torch.zeros(smile["experts"], rows, layer.in_features, **where))
        shape = (smile["experts"], layer.out_features)
        self.smile_bias = nn.Parameter(torch.zeros(shape, **where)) if bias else None

    def forward(self, x):
        """Return the base's output plus the chosen experts'."""
        inner = torch.einsum("...i,eri->...er", x, self.smile_down)
        exact = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(inner[..., : self.gate_rank], dim=-1, dtype=exact)
        largest, chosen = norms.topk(self.chosen, dim=-1)
        shares = torch.zeros_like(norms).scatter(-1, chosen, largest.softmax(-1)).to(x.dtype)
        change = torch.einsum("...er,eor->...o", inner[..., : self.rank] * shares[..., None], self.smile_up)
        if self.smile_bias is not None:
            change = change + shares @ self.smile_bias
        return super().forward(x) + change


class $name($architecture):
    """The base with experts in its linear layers."""

    config_class = SmileConfig

    def __init__(self, config):
        super().__init__(config)
        for path, (rank, rows, bias) in config.smile["modules"].items():
            parent, _, leaf = path.rpartition(".")
            layer = self.get_submodule(path)
            setattr(self.get_submodule(parent), leaf, SmileLinear(layer, config.smile, rank, rows, bias))
''')


def smile_code(architecture: str, config: str, model_type: str) -> tuple[str, str, str]:
    """Return the program for a type of model, the name of its class, and the class of transformers that loads it.

    Args:
        architecture: the class of the base in transformers.
        config: the class of its config.
        model_type: the name of the base's type.
    """
    name = f"Smile{architecture}"
    auto = next((found for ending, found in AUTO_CLASSES.items() if architecture.endswith(ending)), "AutoModel")
    names = {"architecture": architecture, "config": config, "model_type": model_type, "auto": auto, "name": name}
    return _CODE.substitute(names), name, auto
