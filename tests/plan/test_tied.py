"""Output heads that are their embedding, and heads of their own: what is written, and that transformers reads it so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import merging
from merging.errors import InputError
from merging.sources.tied_weights import has_own_head, is_head, tied_to
from support.tiny import CONFIG, load, model, save

Tensors = dict[str, Tensor]

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20, "max_position_embeddings": 16,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
TOKENS = torch.tensor([[3, 5, 7, 2]])


def llama(seed: int, tied: bool) -> PreTrainedModel:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def saved(model: PreTrainedModel, folder: Path, **edits: Any) -> Path:
    """A model as transformers saves it, with changes to its config."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | edits).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mean_of(models: list[PreTrainedModel]) -> Tensors:
    """The mean of what the models are in memory, heads and all, in float64."""
    states = [each.state_dict() for each in models]
    return {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}


def reloaded(folder: Path, kind: str = "AutoModelForCausalLM") -> PreTrainedModel:
    """The model of a folder; no tensor may be missing or left over."""
    found, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return found.eval()


def right(got: PreTrainedModel, models: list[PreTrainedModel]) -> bool:
    want = mean_of(models)
    return all(torch.allclose(value.double(), want[name], atol=1e-6) for name, value in got.state_dict().items())


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True), (True, True, False)])
def test_tied_and_untied_models(tmp_path: Path, kinds: tuple[bool, ...]) -> None:
    """A head of its own for all if one has one; what transformers makes of the merge is the mean, in logits too."""
    models = [llama(seed, tied) for seed, tied in enumerate(kinds)]
    paths = [saved(each, tmp_path / f"m{i}") for i, each in enumerate(models)]
    out = merging.merge(paths, method="linear", output=tmp_path / "out").path
    assert ("lm_head.weight" in load(out)) == (not all(kinds))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is all(kinds)
    got = reloaded(out)
    assert right(got, models)
    state = {name: value.float() for name, value in mean_of(models).items()}
    reference = llama(9, all(kinds))
    reference.load_state_dict(state)
    assert torch.allclose(got(TOKENS).logits, reference(TOKENS).logits, atol=1e-6)


def with_copy(folder: Path, differs: bool = False, **config: Any) -> Path:
    """A tied model that stores its head all the same: a copy, or something else."""
    tensors = model(1)
    head = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = head + 1 if differs else head.clone()
    return save(folder, tensors, CONFIG | {"tie_word_embeddings": True} | config)


def test_copies_of_a_tied_head_are_no_heads(tmp_path: Path) -> None:
    tied = {name: value for name, value in model(2).items() if name != "lm_head.weight"}
    other = save(tmp_path / "other", tied, CONFIG | {"tie_word_embeddings": True})
    for i, paths in enumerate(([with_copy(tmp_path / "a"), other], [other, with_copy(tmp_path / "b")])):
        out = merging.merge(paths, method="linear", output=tmp_path / f"out{i}").path
        assert "lm_head.weight" not in load(out)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_untied_head_that_equals_its_embedding_stays_tied_beside_tied_models(tmp_path: Path) -> None:
    tied = {name: value for name, value in model(2).items() if name != "lm_head.weight"}
    other = save(tmp_path / "other", tied, CONFIG | {"tie_word_embeddings": True})
    equal = with_copy(tmp_path / "equal", tie_word_embeddings=False)
    differs = with_copy(tmp_path / "differs", differs=True, tie_word_embeddings=False)
    for paths, stays in (([other, equal], True), ([other, equal, differs], False), ([equal, other], False)):
        out = merging.merge(paths, method="linear", output=tmp_path / "out", overwrite=True).path
        assert ("lm_head.weight" not in load(out)) == stays
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is stays


def test_a_tied_config_with_another_head_is_never_written(tmp_path: Path) -> None:
    """transformers keeps both; other readers tie them, or ignore the head."""
    paths = [with_copy(tmp_path / "a", differs=True), with_copy(tmp_path / "b", differs=True)]
    out = merging.merge(paths, method="linear", output=tmp_path / "out").path
    assert "lm_head.weight" in load(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_random_masks_fall_alike_on_both_sides_of_a_tie(tmp_path: Path) -> None:
    """Merged apart, a copy would get masks of its own, and differ from its embedding afterwards."""
    base = with_copy(tmp_path / "base")
    tensors = {name: value + 0.1 for name, value in load(base).items()}
    tuned = save(tmp_path / "tuned", tensors, CONFIG | {"tie_word_embeddings": True})
    out = merging.merge([tuned], method="dare+task_arithmetic", base=base, drop=0.5, output=tmp_path / "out").path
    assert "lm_head.weight" not in load(out)


def test_missing_head(tmp_path: Path) -> None:
    """transformers would draw it at random."""
    tensors = {name: value for name, value in model(1).items() if name != "lm_head.weight"}
    broken, whole = save(tmp_path / "broken", tensors), save(tmp_path / "whole", model(2))
    for paths in ([broken, whole], [broken, broken]):
        with pytest.raises(InputError, match=r"broken: .*not tied .* has no head: set tie_word_embeddings to true"):
            merging.preview(paths, method="linear")
    with pytest.raises(InputError, match=r"broken lacks lm_head\.weight"):
        merging.preview([whole, broken], method="linear")


def test_a_config_that_does_not_mention_the_tie(tmp_path: Path) -> None:
    """As configs of the Hub do where the model type's default holds: a model without a head must be tied."""
    models = [
        transformers.Starcoder2ForCausalLM(
            transformers.Starcoder2Config(**SIZES, num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=tied)
        )
        for tied in (True, False)
    ]
    paths = [
        saved(models[0], tmp_path / "tied", tie_word_embeddings=None),
        saved(models[1], tmp_path / "untied"),
    ]
    out = merging.merge(paths, method="linear", output=tmp_path / "out").path
    assert right(reloaded(out), models)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_nested_configs(tmp_path: Path) -> None:
    """LLaVA's language model may state the tie, or the whole model."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    models = []
    for seed, tied in enumerate((True, False)):
        torch.manual_seed(seed)
        text = {"model_type": "llama", **SIZES, "tie_word_embeddings": tied}
        config = transformers.LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=19, tie_word_embeddings=tied
        )
        models.append(transformers.LlavaForConditionalGeneration(config).eval())
    paths = [saved(each, tmp_path / f"m{i}") for i, each in enumerate(models)]
    assert "lm_head.weight" not in {name.removeprefix("language_model.") for name in load(paths[0])}
    out = merging.merge(paths, method="linear", output=tmp_path / "out").path
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    got = reloaded(out, "LlavaForConditionalGeneration")
    assert right(got, models)
    want = models[1]
    want.load_state_dict({name: value.float() for name, value in mean_of(models).items()})
    assert torch.allclose(got(TOKENS).logits, want(TOKENS).logits, atol=1e-6)


def seq2seq(kind: str, seed: int, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(seed)
    if kind == "t5":
        config = transformers.T5Config(**T5, tie_word_embeddings=tied, decoder_start_token_id=0)
        made = transformers.T5ForConditionalGeneration(config)
        if not tied:
            made.lm_head.weight = torch.nn.Parameter(torch.randn(20, 16))
        return made.eval()
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**SEQ2SEQ, forced_eos_token_id=None, tie_word_embeddings=tied)
    ).eval()


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("legacy", ["none", "first", "second", "both"])
def test_shared_embeddings_of_encoder_and_decoder(tmp_path: Path, kind: str, legacy: str) -> None:
    """Old files hold the shared table again for the encoder, the decoder and the head; new ones hold it once."""
    models = [seq2seq(kind, seed) for seed in (1, 2)]
    paths = [saved(each, tmp_path / f"m{i}") for i, each in enumerate(models)]
    for path in {"none": [], "first": paths[:1], "second": paths[1:], "both": paths}[legacy]:
        tensors = load(path)
        prefix = "model." if kind == "bart" else ""
        shared = tensors[f"{prefix}shared.weight"]
        for name in (f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = shared.clone()
        save(path, tensors, json.loads((path / "config.json").read_text()))
    out = merging.merge(paths, method="linear", output=tmp_path / "out").path
    got = reloaded(out, "AutoModelForSeq2SeqLM")
    assert right(got, models)
    logits = [each(input_ids=TOKENS, decoder_input_ids=TOKENS).logits for each in (got, models[0])]
    models[0].load_state_dict({name: value.float() for name, value in mean_of(models).items()})
    assert not torch.allclose(*logits)
    assert torch.allclose(logits[0], models[0](input_ids=TOKENS, decoder_input_ids=TOKENS).logits, atol=1e-5)


def test_t5s_of_the_second_kind_keep_their_heads(tmp_path: Path) -> None:
    """And the two kinds, of which one scales what goes into its head, are not mixed."""
    models = [seq2seq("t5", seed, tied=False) for seed in (1, 2)]
    paths = [saved(each, tmp_path / f"m{i}") for i, each in enumerate(models)]
    out = merging.merge(paths, method="linear", output=tmp_path / "out").path
    got = reloaded(out, "T5ForConditionalGeneration")
    assert not got.config.scale_decoder_outputs
    assert right(got, models)
    first = saved(seq2seq("t5", 3), tmp_path / "first")
    with pytest.raises(InputError, match="one scales the outputs of its decoder and the other does not"):
        merging.preview([paths[0], first], method="linear")


def test_masked_language_models_of_old(tmp_path: Path) -> None:
    """BERT's decoder is its embedding, and the decoder's bias that of the predictions."""
    config = transformers.BertConfig(**SIZES)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(transformers.BertForMaskedLM(config).eval())
    paths = [saved(each, tmp_path / f"m{i}") for i, each in enumerate(models)]
    tensors = load(paths[1])
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    save(paths[1], tensors, json.loads((paths[1] / "config.json").read_text()))
    for i, order in enumerate((paths, paths[::-1])):
        out = merging.merge(order, method="linear", output=tmp_path / f"out{i}").path
        assert load(out).keys() == load(paths[0]).keys()
        assert right(reloaded(out, "BertForMaskedLM"), models)


def test_names_of_heads() -> None:
    assert is_head("lm_head.weight") and is_head("language_model.lm_head.weight") and is_head("proj_out.weight")
    assert not is_head("model.layers.0.attention.proj_out.weight")
    assert not is_head("down_blocks.1.attentions.0.proj_out.weight")
    two: dict[str, Any] = {"thinker.model.embed_tokens.weight": None, "talker.model.embed_tokens.weight": None}
    assert tied_to("thinker.lm_head.weight", two, True) == "thinker.model.embed_tokens.weight"
    assert tied_to("lm_head.weight", two, True) is None
    assert tied_to("thinker.lm_head.weight", two, False) is None
    assert has_own_head({}, {})
