"""PEFT's types whose change is a full matrix from few numbers: spectra, circulants, sparse entries, random bases."""

from __future__ import annotations

from math import ceil

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.changes import Change
from merging.sources.computed import ComputedChange, Formula, Parts, WeightView
from merging.sources.peft.module import Module

__all__ = ["c3a", "fourierft", "osf", "randlora", "shira", "waveft"]


def fourierft(module: Module) -> list[Change]:
    """FourierFT (Gao et al. 2024, arXiv 2405.03003): real part of the inverse transform of a sparse spectrum.

    The positions of its numbers are the first of a permutation that torch draws on the CPU with the config's seed.
    """
    count = module.sizes(fourierft_spectrum="n")["n"]
    scale, seed = module.config.number("scaling", 150), _seed(module)

    def formula(parts: Parts, view: WeightView) -> Tensor:
        spectrum = _scatter(parts["fourierft_spectrum"], view, seed)
        change: Tensor = torch.fft.ifft2(spectrum).real * scale
        return change

    return [_scattering(module, formula, "fourierft_spectrum", count, scale)]


def waveft(module: Module) -> list[Change]:
    """WaveFT (Bilican et al. 2025, arXiv 2505.12532): few coefficients of Haar wavelets, or entries of the change.

    Coefficients fill the four quarters of a matrix, padded to even sizes: means, then differences along the outputs,
    along the inputs, and along both. The seed determines their positions. Only ``db1``, PEFT's default, is read.
    """
    count = module.sizes(waveft_spectrum="n")["n"]
    scale, seed = module.config.number("scaling", 25), _seed(module)
    back, family = bool(module.config.get("use_idwt", True)), module.config.get("wavelet_family", "db1")
    if back and family not in ("db1", "haar"):
        raise module.config.error(f"its wavelets are {family!r}, and only db1 (Haar) is read")

    def formula(parts: Parts, view: WeightView) -> Tensor:
        entries = _scatter(parts["waveft_spectrum"], view, seed)
        if not back:
            return entries * scale
        padded = torch.nn.functional.pad(entries, (0, view.width % 2, 0, view.outputs % 2))
        top, bottom = padded.chunk(2)
        (mean, down), (right, both) = top.chunk(2, 1), bottom.chunk(2, 1)
        rows = [mean + down + right + both, mean + down - right - both, mean - down + right - both]
        rows.append(mean - down - right + both)
        quads = torch.stack(rows, -1).reshape(*mean.shape, 2, 2) / 2
        whole = quads.transpose(1, 2).reshape(padded.shape)
        return whole[: view.outputs, : view.width] * scale

    return [_scattering(module, formula, "waveft_spectrum", count, scale)]


def _seed(module: Module) -> int:
    seed = module.config.number("random_loc_seed", 777)
    if seed != int(seed) or not -(2**63) <= seed < 2**64:
        raise module.config.error(f"random_loc_seed in its config is {seed!r}, and should be a whole number")
    return int(seed)


def _scatter(values: Tensor, view: WeightView, seed: int) -> Tensor:
    """Return zeros ``[outputs, width]`` with the values at the first positions of a seeded permutation."""
    order = torch.randperm(view.outputs * view.width, generator=torch.Generator().manual_seed(seed))
    flat = values.new_zeros(len(order))
    flat[order[: len(values)]] = values
    return flat.reshape(view.outputs, view.width)


def _scattering(module: Module, formula: Formula, name: str, count: int, scale: float) -> ComputedChange:
    return module.computed_change(
        formula,
        name,
        scale=scale,
        allows=lambda outputs, width: count <= outputs * width,
        needs_base="its file does not say how large the module is",
    )


def shira(module: Module) -> list[Change]:
    """SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): entries of the weight, at ``indices [2, n]`` (output, input)."""
    module.sizes(shira_weight="n", shira_indices="int 2 n")

    def formula(parts: Parts, view: WeightView) -> Tensor:
        rows, columns = (each.long() for each in parts["shira_indices"])
        inside = (rows >= 0) & (rows < view.outputs) & (columns >= 0) & (columns < view.width)
        if not bool(inside.all()):
            raise module.error(f"has entries outside of its weight, which is {view.shape}")
        weight = parts["shira_weight"]
        return weight.new_zeros(view.outputs, view.width).index_put_((rows, columns), weight, accumulate=True)

    return [
        module.computed_change(
            formula,
            "shira_weight",
            "shira_indices",
            transposed=False,
            needs_base="its file does not say how large the module is",
        )
    ]


def c3a(module: Module) -> list[Change]:
    """C3A (Chen et al. 2024, arXiv 2407.19342): circulant blocks of ``kernel [out / b, in / b, b]``, over ``in``."""
    size = module.sizes(c3a_kernel="m n b")

    def formula(parts: Parts, view: WeightView) -> Tensor:
        steps = torch.arange(size["b"])
        blocks = parts["c3a_kernel"][:, :, (steps[None] - steps[:, None]) % size["b"]]
        return blocks.transpose(1, 2).reshape(view.outputs, view.width) / view.width

    outputs, inputs = size["m"] * size["b"], size["n"] * size["b"]
    return [module.computed_change(formula, "c3a_kernel", transposed=False, outputs=outputs, inputs=inputs)]


def randlora(module: Module) -> list[Change]:
    """RandLoRA (Albert et al. 2025, arXiv 2502.00987): a sum of random bases, scaled: ``alpha / r B (lambda A gamma)``.

    ``A [r, 1, narrowest]`` and ``B [widest, bases, r]`` are shared and cut to the module's size; ``lambda [r, bases]``
    and ``gamma [bases, min]`` are trained. ``B`` is ordered by base and rank, ``A`` by rank and base, as in PEFT.
    """
    for name in ("randlora_A", "randlora_B"):
        if name not in module.parts and name not in module.shared:
            raise module.config.error(
                "the random bases were not saved, and are known only to the program that drew them: save it again with "
                "save_projection=True"
            )
    layout = {
        "randlora_lambda": "r n",
        "randlora_gamma": "n m",
        "randlora_A": "r 1 w",
        "randlora_B": "t b r",
    }
    size = module.sizes(**layout)
    bases, least = size["n"], size["m"]
    if bases > size["b"] or least > size["w"] or bases != ceil(least / size["r"]):
        raise module.error(f"needs {bases} random bases of {least}, and its file has {size['b']} of {size['w']}")
    scale = module.config.number("randlora_alpha", 640) / size["r"]

    def formula(parts: Parts, view: WeightView) -> Tensor:
        most = max(view.outputs, view.width)
        scaled = parts["randlora_lambda"][:, :, None] * parts["randlora_A"][..., :least] * parts["randlora_gamma"]
        product = parts["randlora_B"][:most, :bases].flatten(1) @ scaled.flatten(0, 1)
        return product * scale if view.width == least else product.T * scale

    return [
        module.computed_change(
            formula,
            *layout,
            scale=scale,
            allows=lambda outputs, width: min(outputs, width) == least and max(outputs, width) <= size["t"],
            needs_base="RandLoRA does not say how large the module is",
        )
    ]


def osf(module: Module) -> list[Change]:
    """OSF (Nayak et al. 2025, arXiv 2504.07097): the base's smallest singular directions replaced by ``U S V``."""
    names = {f"osf_svd_params.{name}": axes for name, axes in (("U_low", "o N"), ("S_low", "N"), ("V_low", "N i"))}
    size = module.sizes(**names)
    count = size["N"]

    def formula(parts: Parts, view: WeightView) -> Tensor:
        u, s, vh = torch.linalg.svd(view.weight, full_matrices=False)
        trained: Tensor = parts["osf_svd_params.U_low"] * parts["osf_svd_params.S_low"] @ parts["osf_svd_params.V_low"]
        least = slice(len(s) - count, None)
        start: Tensor = (u[:, least] * s[least]) @ vh[least]
        return trained - start

    return [
        module.computed_change(
            formula,
            *names,
            transposed=False,
            outputs=size["o"],
            inputs=size["i"],
            allows=lambda outputs, width: count <= min(outputs, width),
            needs_base="OSF starts from the base's weight",
        )
    ]
