"""What vLLM makes of adapters: started by the peer's own Python, since it is never installed beside us.

    python vllm_runner.py OUT.json BASE ADAPTER [ADAPTER ...]

Serves the base once, asks for every adapter, and writes by path the log-probabilities of all tokens behind the prompt,
or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PROMPT = [3, 5, 7, 11]

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


def main(out: Path, base: str, adapters: list[str]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=base, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2,
        max_logprobs=96, enable_lora=True, max_lora_rank=16, enable_prefix_caching=False,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, logprobs=96, temperature=0, detokenize=False)

    def logprobs(request: LoRARequest | None) -> list[float] | str:
        try:
            if request is not None:
                engine.llm_engine.add_lora(request)  # a request that fails later stays in the queue for ever
            (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], asked, lora_request=request, use_tqdm=False)
        except Exception as error:  # whatever it is, it is the answer
            return f"{type(error).__name__}: {error}"[:500]
        found = answer.outputs[0].logprobs[0]
        return [found[token].logprob for token in sorted(found)]

    told = {base: logprobs(None)}
    for number, adapter in enumerate(adapters, 1):
        told[adapter] = logprobs(LoRARequest(adapter, number, adapter))
    out.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
