"""What is said of llama.cpp and vLLM is what they do with the same files, in environments of their own (tests/peer).

``LLAMA_CPP_PYTHON`` and ``VLLM_PYTHON`` name Pythons that have them. A case is what was done to a sound adapter: what
is refused fails there, what is ignored gives other answers than PEFT, and all else gives the same.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from merging.serving import verify
from support.adapters import QUIRKS, peft, quiet, reload, train
from support.architectures import DECODER, tiny
from support.paths import TESTS
from support.serving_cases import ADAPTERS, laid
from support.serving_edits import SERVED, Edit

pytestmark = [pytest.mark.exhaustive, *QUIRKS]

PROMPT = [3, 5, 7, 11]
EQUAL = 1e-3
"""How far the log-probabilities of the same adapter may be apart: what is wrong is off by ten times as much."""

PEERS = {"llama.cpp": ("LLAMA_CPP_PYTHON", "llama_cpp_runner.py"), "vllm": ("VLLM_PYTHON", "vllm_runner.py")}

BOTH = (
    "sound", "modules in full", "norms in full", "DoRA", "tokens", "alpha missing", "with the adapter's name",
    "queries alone", "alphas by module", "ranks by module", "rsLoRA", "PiSSA", "LoRA-GA", "repeated blocks",
    "saved embedding", "head",
)  # fmt: skip
CASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm", "llama"): (
        *BOTH, "r missing", "rank of 17", "aLoRA", "regular expression", "LoRA's biases on layers without",
    ),
    ("llama.cpp", "llama"): BOTH,
    ("llama.cpp", "llama-tied"): ("tied head", "tied embedding"),
    ("llama.cpp", "gpt2"): ("square layers of GPT-2", "other layers of GPT-2"),
}  # fmt: skip
"""By program and base the cases, which are those of tests/support/serving_cases.py."""

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
BASES = {
    "llama": tiny("LlamaConfig", "LlamaForCausalLM", DECODER, SIZES),
    "llama-tied": tiny("LlamaConfig", "LlamaForCausalLM", DECODER, SIZES, tie_word_embeddings=True),
    "gpt2": tiny(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=2, n_ctx=64
    ),
}
"""vLLM has no attention for heads that are narrower than 32."""


def edit_of(case: str) -> Edit:
    return (lambda folder: folder) if case == "sound" else ADAPTERS[case][0]


def by_peft(base: Path, adapter: Path) -> list[float]:
    """The log-probabilities of all tokens behind the prompt, by PEFT."""
    model = peft.PeftModel.from_pretrained(reload(base), adapter).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    found: list[float] = torch.log_softmax(logits.double(), -1).tolist()
    return found


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, dict[str, list[float] | str]]]:
    """The folder with a base and its cases, and what a program answered to each."""
    root = tmp_path_factory.mktemp("servers")
    with quiet():
        for name, made in BASES.items():
            torch.manual_seed(7)
            made().save_pretrained(root / "shelf" / name)
        train(root / "shelf" / "adapter", root / "shelf" / "llama", 1, SERVED)

    @cache
    def ask(program: str, base: str) -> tuple[Path, dict[str, list[float] | str]]:
        variable, runner = PEERS[program]
        folder = root / program / base
        folder.mkdir(parents=True)
        paths = [edit_of(case)(laid(root / "shelf", folder / case, "adapter")) for case in CASES[program, base]]
        words = [os.environ[variable], TESTS / "peer" / runner, folder / "out.json",
                 root / "shelf" / base, *paths]  # fmt: skip
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        told = json.loads((folder / "out.json").read_text())
        return root, {Path(path).name: answer for path, answer in told.items()}

    return ask


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("program", "base", "case"), [(*where, case) for where, cases in CASES.items() for case in cases]
)
def test_what_is_said_is_what_it_does(
    program: str, base: str, case: str, asked: Callable[[str, str], tuple[Path, dict[str, list[float] | str]]]
) -> None:
    if not os.environ.get(PEERS[program][0]):
        pytest.skip(f"{PEERS[program][0]} does not name a Python that has {program}")
    root, answers = asked(program, base)
    adapter, served = root / program / base / case, answers[case]
    findings = verify(str(adapter), [program], base=str(root / "shelf" / base)).findings
    said = {each.severity for each in findings if each.program == program}
    assert isinstance(answers[base], list), answers[base]
    if "refuses" in said:
        assert isinstance(served, str)
        return
    assert isinstance(served, list), served
    wanted = by_peft(root / "shelf" / base, adapter)
    off = max(abs(one - other) for one, other in zip(served, wanted, strict=True))
    assert off > 10 * EQUAL if "ignores" in said else off < EQUAL, off
