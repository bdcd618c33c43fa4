"""Checking an output against its sources: all tensors that its recipe makes, and pieces merged once more."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from merging.api.arguments import check_path
from merging.api.chosen_ranks import open_decomposed
from merging.api.output_files import write_companions, write_constants
from merging.api.recipe_records import MOE_KEY
from merging.api.rerun import PlannedRerun, hash_weights, plan_rerun
from merging.display.progress import Progress, announce_phase, resolve_progress
from merging.display.tables import format_size, plural
from merging.engine.comparing import ComparingSink, Difference
from merging.engine.download import download_plan
from merging.engine.resources import workers_within
from merging.engine.run import Done, run
from merging.engine.samples import cut_pieces, sample_pieces
from merging.engine.stages import StageSettings, open_stages
from merging.engine.threads import cores
from merging.errors import InputError, OptionError, option
from merging.hub.address import hub_address
from merging.maths.lazy_torch import torch
from merging.output.model_folder import companion_patterns
from merging.plan import Plan
from merging.serving import Finding, Verdict
from merging.serving.subject import Subject, open_subject, open_weights
from merging.sources.stored import Stored
from merging.sources.weight_files import find_weights
from merging.storage.output_tensor import OutputTensor
from merging.storage.quantizing_writer import QuantizingWriter
from merging.type_checks import check_types

__all__ = ["verify_against_sources"]

_PROGRAM = "sources"
_CONFIGS = ("config.json", "adapter_config.json")
_CARD = "README.md"
_COPIED = 1 << 22
"""Elements of a copied tensor that are compared at a time."""


@check_types("sample", "max_memory", "progress")
def verify_against_sources(
    path: str | Path,
    *,
    sources: Mapping[str, str | Path] | None = None,
    sample: int | Literal["all"] = 256,
    seed: int = 0,
    threads: int | None = None,
    max_memory: int | str | None = None,
    progress: Progress | bool | None = None,
) -> Verdict:
    """Check an output against the sources that its recipe names.

    The recipe in the output's header is planned again. Every tensor of the plan must be there, with its type and shape,
    and no other one; so must the files that go with the weights. A sample of the tensors' pieces is merged once more
    from the sources, and compared bit for bit. Statistics over the whole model are gathered in full.

    Args:
        path: the output, on this machine: a folder or weights file.
        sources: places of models that were moved, by their names in the recipe.
        sample: the number of pieces to merge, of as many tensors as possible, or ``"all"``. A piece is a tile of two
            megabytes (as float32), or a whole tensor where the method needs that.
        seed: the seed that the pieces are chosen by.
        threads: the number of threads; by default one for each processor core, as far as the memory allows.
        max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.

    Returns:
        The verdict. Each tensor that differs is a finding of severity ``differs``, with the first place and both
        values. Where another version or a GPU made the output, differences within rounding are of severity ``warns``.

    Raises:
        InputError: if the output states no recipe, or a source is missing.
        MergingError: for everything that :func:`~merging.merge` refuses.

    Example:
        >>> import merging
        >>> merged = merging.merge(["a", "b"], method="linear", output="merged", overwrite=True)
        >>> verdict = merging.verify_against_sources("merged")
        >>> [finding.severity for finding in verdict.findings]
        ['ok']
    """
    name = str(check_path(path, "path"))
    if sample != "all" and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 1):
        raise OptionError(f"sample = {sample!r}: use a number of pieces from 1 on, or all")
    if hub_address(name) is not None:
        raise InputError(f"{name}: is not on this disk: download it, and verify the folder")
    subject = open_subject(name)
    if MOE_KEY in subject.metadata:
        raise InputError(f"{name}: is a mixture of experts: `merge rerun` makes it once more, and compares all bytes")
    place = subject.folder or subject.weights or Path(name)
    planned = plan_rerun(name, place, sources or {}, allow_changed=True, hashes=False)
    verdict = Verdict(name, subject.kind, (_PROGRAM,), (), values_read=True)
    if planned.changed:
        todo = f"get them as they were, or give their places with {option('source', 'NAME=PATH')}"
        changed = Finding(_PROGRAM, "differs", "the sources changed since the output was made", planned.changed, todo)
        return replace(verdict, findings=(changed,))
    with tempfile.TemporaryDirectory(prefix="merging-") as scratch:
        settings = StageSettings(
            threads=workers_within(planned.plan, cores() if threads is None else threads, max_memory),
            scratch=Path(scratch),
            progress=resolve_progress(progress),
        )
        findings = _check(planned, subject, settings, None if sample == "all" else sample, seed)
    return replace(verdict, findings=tuple(findings))


def _check(
    planned: PlannedRerun, subject: Subject, settings: StageSettings, count: int | None, seed: int
) -> list[Finding]:
    """Return all findings; ``count`` is the number of pieces to merge, None for all."""
    plan = download_plan(planned.plan, companion_patterns(planned.plan), progress=settings.progress)
    elsewhere = tuple(planned.notices)
    findings = [Finding(_PROGRAM, "warns", each) for each in elsewhere]
    with open_stages(plan, settings) as (ready, report, _):
        settings = replace(settings, progress=report)
        with open_decomposed(ready, settings) as (sized, decomposition):
            shown = planned.shown
            if decomposition is not None:
                shown = replace(sized, recipe=shown.recipe, sources=shown.sources)
            expected, tensors = _list_tensors(sized), _open_all(sized, subject)
            alike = {name: each for name, each in tensors.items() if expected.get(name) == _kind(each)}
            sink = ComparingSink(alike)
            pieces = cut_pieces(sized, torch.device("cpu"))
            chosen = pieces if count is None else sample_pieces(pieces, count, seed)
            encodings = sized.quantized.encodings if sized.quantized else {}
            run(
                sized,
                QuantizingWriter(sink, encodings) if encodings else sink,
                threads=settings.threads,
                progress=settings.progress if decomposition is None else None,
                scratch=settings.scratch,
                decomposition=decomposition,
                pieces=chosen,
            )
            write_constants(sized, sink)
    _compare_kept(plan, sink, count, seed)
    findings += _tensor_findings(expected, tensors)
    findings += [
        _difference_finding(name, sink.differences[name], sink.elements[name], tensors[name].shape, bool(elsewhere))
        for name in sorted(sink.differences)
    ]
    if subject.folder is not None and settings.scratch is not None:
        announce_phase(settings.progress, "comparing files")
        findings += _companion_findings(shown, subject.folder, settings.scratch / "companions")
    if all(each.severity == "warns" for each in findings):
        merged = f"{len(chosen):,} of {plural(len(pieces), 'piece')}"
        findings.append(
            Finding(
                _PROGRAM,
                "ok",
                f"all {plural(len(expected), 'tensor')} are there; {merged} merged from the sources again, "
                f"{format_size(sink.bytes)}, {'within rounding' if sink.differences else 'have the same bits'}",
            )
        )
    return findings


def _kind(tensor: Stored | OutputTensor) -> tuple[str, tuple[int, ...]]:
    """Return the type and the shape of a tensor."""
    return tensor.dtype_name, tuple(tensor.shape)


def _list_tensors(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and the shape of each tensor of the output, by its name."""
    return {out.name: _kind(out) for out in plan.outs} | {name: _kind(each) for name, each in _kept_tensors(plan)}


def _kept_tensors(plan: Plan) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of components that are copied, by their names in the output."""
    for component, model in plan.kept.items():
        for name, stored in model.tensors.items():
            yield f"{component}.{name}", stored


def _open_all(plan: Plan, subject: Subject) -> dict[str, Stored]:
    """Return the tensors of the output, and of components that its config does not name."""
    tensors = dict(subject.tensors)
    for component in plan.reference.components if plan.reference and subject.folder else ():
        inner = subject.folder / component if subject.folder and component else None
        if inner is None or not inner.is_dir() or any(name.startswith(f"{component}.") for name in tensors):
            continue
        if weights := find_weights(inner):
            tensors |= open_weights({component: weights})[0]
    return tensors


def _compare_kept(plan: Plan, sink: ComparingSink, count: int | None, seed: int) -> None:
    """Compare components that are copied with their sources: all, or ``count`` pieces."""
    pieces = [
        (name, stored, start) for name, stored in _kept_tensors(plan) for start in range(0, stored.numel, _COPIED)
    ]
    if count is not None and count < len(pieces):
        pieces = random.Random(seed).sample(pieces, count)
    for name, stored, start in pieces:
        values = torch.empty(min(_COPIED, stored.numel - start), dtype=stored.dtype)
        stored.read_into(values, start)
        sink.write(name, values, start)


def _tensor_findings(
    expected: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Mapping[str, Stored]
) -> Iterator[Finding]:
    """Yield findings on tensors that are missing, are not of the recipe, or have other types or shapes."""
    missing = tuple(name for name in expected if name not in tensors)
    others = tuple(name for name in tensors if name not in expected)
    unlike = tuple(
        f"{name}: {stored.dtype_name} {list(stored.shape)}, planned {expected[name][0]} {list(expected[name][1])}"
        for name, stored in tensors.items()
        if name in expected and expected[name] != _kind(stored)
    )
    for what, where in (
        ("tensors that the recipe makes are missing", missing),
        ("the recipe makes no such tensors", others),
        ("tensors have other types or shapes than the recipe makes", unlike),
    ):
        if where:
            yield Finding(_PROGRAM, "differs", what, where, "make it once more with `merge rerun`")


def _difference_finding(
    name: str, difference: Difference, compared: int, shape: Sequence[int], elsewhere: bool
) -> Finding:
    """Return the finding on a tensor with other values; ``elsewhere``: another version or device may have made it."""
    where = (
        f"at {_index(difference, shape)}: {difference.found!r} here, {difference.expected!r} from the sources",
        f"{difference.count:,} of {compared:,} compared elements differ"
        + (", within rounding" if difference.rounding else ""),
    )
    if difference.rounding and elsewhere:
        return Finding(_PROGRAM, "warns", f"{name}: values differ within rounding", where)
    todo = "make it once more with `merge rerun`"
    if difference.rounding:
        todo = "make it once more with `merge rerun`, unless another kind of processor made it"
    return Finding(_PROGRAM, "differs", f"{name}: other values than the sources give", where, todo)


def _index(difference: Difference, shape: Sequence[int]) -> list[int]:
    """Return the place of the first element that differs, by axes."""
    index, rest = [], difference.position
    for size in reversed(shape):
        rest, within = divmod(rest, size)
        index.append(within)
    return index[::-1]


def _companion_findings(plan: Plan, folder: Path, scratch: Path) -> Iterator[Finding]:
    """Yield findings on the files that go with the weights, which are written to ``scratch`` to compare them."""
    for component in ("", *(plan.reference.components if plan.reference else ())):
        (scratch / component).mkdir(parents=True, exist_ok=True)
    write_companions(plan, scratch, Done(0.0, [], {}, {}), weights=False)
    files = sorted(file.relative_to(scratch).as_posix() for file in scratch.rglob("*") if file.is_file())
    missing = tuple(name for name in files if not (folder / name).is_file())
    edited = tuple(
        name
        for name in files
        if name != _CARD and name not in missing and hash_weights(folder / name) != hash_weights(scratch / name)
    )
    configs = tuple(name for name in edited if name.rpartition("/")[2] in _CONFIGS)
    others = tuple(name for name in edited if name not in configs)
    if missing:
        yield Finding(_PROGRAM, "differs", "files that go with the weights are missing", missing)
    if configs:
        yield Finding(_PROGRAM, "differs", "the config is not as it was written: was it edited?", configs)
    if others:
        yield Finding(_PROGRAM, "warns", "files are not as they were written: were they edited?", others)
