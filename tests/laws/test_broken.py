"""What a tester broke once, and must stay mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import merging
from merging.cli.main import cli
from merging.errors import FormatError, InputError, MergingError, OptionError, OutputError
from merging.hub.address import hub_address
from merging.hub.open_model import open_model
from merging.sources.adapter import LoraChange

FACTORS = {
    "base_model.model.layers.0.q.lora_A.weight": torch.ones(2, 4),
    "base_model.model.layers.0.q.lora_B.weight": torch.ones(4, 2),
}


def adapter(folder: Path, config: dict[str, object] | None) -> Path:
    """An adapter of one module, with or without a config."""
    folder.mkdir()
    save_file(FACTORS, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def scale(path: Path) -> float:
    """The scale of the only change."""
    (change,) = open_model(path).changes.values()
    assert isinstance(change, LoraChange)
    return change.scale


def test_folder_without_config_is_an_adapter_with_a_notice(tmp_path: Path) -> None:
    opened = open_model(adapter(tmp_path / "a", None))
    assert opened.notices and "--lora-alpha" in opened.notices[0]
    assert scale(tmp_path / "a") == 1


def test_config_without_alpha_means_what_peft_makes_of_it(tmp_path: Path) -> None:
    assert scale(adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2})) == 8 / 2


def test_dora_without_its_magnitudes_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="lora_magnitude_vector"):
        open_model(adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}))


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"tie_word_embeddings": False}, {}])
def test_missing_head_is_an_error_unless_it_is_tied(tmp_path: Path, config: dict[str, object]) -> None:
    embedding = {"model.embed_tokens.weight": torch.ones(3, 2)}
    for name, tensors in (("full", {**embedding, "lm_head.weight": torch.ones(3, 2)}), ("headless", embedding)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"headless lacks lm_head\.weight"):
        merging.preview([tmp_path / "full", tmp_path / "headless"], method="linear")


def test_nothing_to_merge_is_said(tmp_path: Path) -> None:
    save_file({"codes": torch.ones(3, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="nothing to merge"):
        merging.preview([tmp_path / "a.safetensors"], method="linear")


def test_overflow_in_float32_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.full((4,), 3e38)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="beyond the range of F32"):
        merging.merge(
            [tmp_path / "a.safetensors"] * 2, method="linear", normalize=False, output=tmp_path / "out.safetensors"
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_key_twice_in_a_recipe() -> None:
    with pytest.raises(FormatError, match="'method' stands twice"):
        merging.load_recipe("models: [a]\nmethod: linear\nmethod: slerp\n")


def test_scalars_slerp() -> None:
    merged = merging.merge_state_dicts([{"s": torch.tensor(1.0)}, {"s": torch.tensor(3.0)}], method="slerp")
    assert float(merged["s"]) == 2


def test_messages_can_be_printed() -> None:
    r"""What a file holds may be an escape of a terminal, half a character, or a book."""
    message = str(FormatError("a\x1b[2J\u202e\ud800\0 b\nc é 模型"))
    assert message == "a\\x1b[2J\\u202e\\ud800\\x00 b\\nc é 模型"
    assert len(str(FormatError("x" * 10**6))) < 6100


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: &a [*a]\nmethod: linear", "holds itself"),  # a list in itself
        ("a: &a [1, 1]\nb: &b [*a, *a]\nmodels: [*b, *b]", "no list of values"),  # the beginning of a billion
        ("models: [a]\nmethod: !!bool perhaps", "not valid YAML"),
        ("models: [a]\nmethod: !!int ''", "not valid YAML"),
        (f"models: [a]\nmethod: {'9' * 5000}", "not valid YAML"),
        (f"models: {'[' * 3000}", "nested too deeply"),
        ("models: [a]\nmethod: {linear: 1}", "method should be a name"),
    ],
)
def test_recipes_that_are_none(text: str, told: str) -> None:
    with pytest.raises(MergingError, match=told):
        merging.load_recipe(text)


def test_recipe_with_dates_for_names() -> None:
    assert merging.load_recipe("models: [2001-01-01]\nmethod: linear").models == ("2001-01-01",)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "empty name"),
        ("~nobody-of-this-name/model", "no such file"),
        ("x" * 5000, "cannot be looked for"),
        ("https://[::1/a/b", "is no address"),
        ("a\0b", "no such file"),
    ],
)
def test_names_that_are_none(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        open_model(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", 3),
        ("architectures", {"0": "LlamaForCausalLM"}),
        ("model_type", ["llama"]),
        ("text_config", "x"),
        ("tie_word_embeddings", "no"),
        ("_name_or_path", "\ud800"),
    ],
)
def test_config_of_a_model_with_wrong_types(tmp_path: Path, field: str, value: object) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({field: value}))
    with pytest.raises(FormatError, match=r"config\.json: (.* should be|holds half a character)"):
        open_model(tmp_path)


def test_config_of_more_layers_than_there_are(tmp_path: Path) -> None:
    """transformers would begin to make them all."""
    save_file({"model.embed_tokens.weight": torch.ones(3, 2), "w": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2})
    with pytest.raises(FormatError, match="num_hidden_layers is 1000000000, and its weights are 2 tensors"):
        merging.preview([path], method="linear", base=tmp_path)


def test_magnitudes_of_other_outputs(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "use_dora": True})
    magnitudes = {"base_model.model.layers.0.q.lora_magnitude_vector": torch.ones(3)}
    save_file(FACTORS | magnitudes, path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="3 magnitudes are not those of 4 outputs"):
        open_model(path)


def test_tensors_of_a_pickle_that_are_not_in_it(tmp_path: Path) -> None:
    """A number that is said to be a matrix of forty gigabytes, tensors without values, keys that are no names."""
    cases = (
        ({"w": torch.ones(1).expand(10**5, 10**5)}, "larger than its file"),
        ({"w": torch.empty(3, device="meta")}, "no ordinary tensor"),
        ({"w": torch.eye(3).to_sparse()}, "no ordinary tensor"),
        ({3: torch.ones(2)}, "is no name"),
    )
    for state, told in cases:
        torch.save(state, tmp_path / "a.bin")
        with pytest.raises(FormatError, match=told):
            open_model(tmp_path / "a.bin")


def test_output_that_is_a_link_to_itself(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    for output in (tmp_path / "loop", tmp_path / "loop" / "x"):
        with pytest.raises(OutputError, match="is a link to itself"):
            merging.merge([tmp_path / "a.safetensors"], method="linear", output=output)


@pytest.mark.parametrize("revision", ["main", "refs/pr/3", "feature%2Fx", "refs%2F", "100%25"])
def test_addresses_mean_what_they_print(revision: str) -> None:
    address = hub_address(f"hf://org/name@{revision}/folder")
    assert address is not None and hub_address(f"hf://{address}") == address
    assert str(address) == f"org/name@{revision}/folder"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no such device here")
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "folder/adapter_model.bin", "folder/pytorch_model.bin"])
def test_devices_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(MergingError, match=r"is a device, and should be a file|is a link out of its folder"):
        open_model(tmp_path / name if name.startswith("a.") else tmp_path / "folder")


@pytest.mark.parametrize("alpha", [1e999, 10**400, "4", True], ids=["infinite", "huge", "text", "flag"])
def test_alpha_that_is_none(tmp_path: Path, alpha: object) -> None:
    with pytest.raises(FormatError, match=r"lora_alpha of layers\.0\.q is .* should be a number"):
        open_model(adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))


def test_names_that_command_a_terminal(tmp_path: Path) -> None:
    name = "base_model.model.layers.0.\x1b[31mq"
    path = adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "org/\x1b[2Jbase"})
    tensors = {f"{name}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(tensors, path / "adapter_model.safetensors")
    shown = CliRunner().invoke(cli, ["inspect", str(path)], color=True).output
    assert r"org/\x1b[2Jbase" in shown and r"\x1b[31mq" in shown and "\x1b" not in shown


def test_name_of_a_model_that_is_no_unicode(tmp_path: Path) -> None:
    """Linux takes any bytes for a name; a recipe is text."""
    path = tmp_path / "a\udcff.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(OptionError, match=r"a\\udcff.safetensors: the name is no Unicode"):
        merging.merge([path], method="linear", output=tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv"])
def test_change_of_a_single_number(tmp_path: Path, method: str) -> None:
    """A module saved in full may hold a parameter without axes."""
    base = {"layers.0.q.weight": torch.zeros(4, 4), "scale.value": torch.tensor(1.0)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    path = adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["scale"]})
    saved = {"base_model.model.scale.value": torch.tensor(3.5)}
    save_file(FACTORS | saved, path / "adapter_model.safetensors")
    output = tmp_path / "out.safetensors"
    merging.merge([path], method=method, base=tmp_path / "base", kind="model", output=output)
    merged = load_file(output)
    assert merged["scale.value"].shape == () and float(merged["scale.value"]) == 3.5
    assert torch.allclose(merged["layers.0.q.weight"], torch.full((4, 4), 2.0))
