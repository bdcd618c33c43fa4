"""``merge continual``: a store that grows as models arrive."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING, Any

import click

from .errors import reported
from .merging import written_method
from .output import Size, progress_bar, size_text

if TYPE_CHECKING:
    from merging.continual.manifest import StepRecord

__all__ = ["continual_command"]

_json = click.option("--json", "as_json", is_flag=True, help="print as JSON")
_debug = click.option("--debug", is_flag=True, help="show a traceback with errors")
_store = click.argument("store", type=click.Path())


def _working(command: Any) -> Any:
    """The options of commands that merge."""
    for option in reversed(
        [
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto"),
            click.option("--threads", type=int, help="workers  [default: all cores]"),
            click.option("--max-memory", type=Size(), help="most memory above the imports, such as 500MB"),
        ]
    ):
        command = option(command)
    return command


@click.group(name="continual", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def continual_command() -> None:
    """Merge models as they arrive, one step each, in constant memory, without keeping the old ones.

    \b
    merge continual init STORE --base BASE        an empty store
    merge continual add STORE one/ two/           in this order
    merge continual export STORE -o merged/       the merge of all so far
    """


class InitCommand(click.Command):
    """A command whose options include those of the method that its own arguments choose."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.own = list(self.params)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the method's options in before the rest is read."""
        from merging.methods import links

        from .fields import chain_options

        with reported():
            self.params = [*self.own, *chain_options(links(written_method(args) or "opcm"))]
        return super().parse_args(ctx, args)


@continual_command.command(name="init", cls=InitCommand)
@_store
@click.option("--base", required=True, help="the model that all others were trained from")
@click.option("-m", "--method", default="opcm", show_default=True, help="how it grows; its options join these")
@click.option("--max-rank", type=int, help="most rank of what is held as factors  [default: as long as it is worth it]")
@_json
@_debug
def init_command(
    store: str, base: str, method: str, max_rank: int | None, as_json: bool, debug: bool, **options: Any
) -> None:
    """Make an empty store.

    Methods: opcm, task_arithmetic, linear (a running mean), magmax, ties, and lines around a sum or mean.
    """
    with reported(debug):
        from merging.continual import ContinualStore

        parameters = {name.replace("__", "."): value for name, value in options.items() if value is not None}
        made = ContinualStore.create(store, base=base, method=method, max_rank=max_rank, **parameters)
        chain = made.method.chain
    click.echo(json.dumps({"store": store, "method": chain, "base": base}) if as_json else f"{store}: grows by {chain}")


@continual_command.command(name="add")
@_store
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--again", is_flag=True, help="add a model even if one of the same content is there")
@click.option("--allow-different-bases", is_flag=True, help="add what says, or seems, to be of another base")
@click.option("--wait", type=float, default=-1, help="most seconds to wait for another writer  [default: no limit]")
@_working
@click.option("--progress/--quiet", default=None, help="progress bar on stderr  [default: on a terminal]")
@_json
@_debug
def add_command(
    store: str, models: tuple[str, ...], progress: bool | None, as_json: bool, debug: bool, **options: Any
) -> None:
    """Add models in the order in which they are given; each is one step, whole or not at all."""
    with reported(debug):
        from merging.continual import ContinualStore

        opened = ContinualStore(store)
        for model in models:
            with progress_bar(progress) as report:
                step = opened.add(model, progress=report, **options)
            if as_json:
                click.echo(json.dumps({"model": model, "step": step.model_dump() if step else None}))
            elif step:
                click.echo(f"step {step.number}: {model}: {_told(step)}")
            else:
                click.echo(f"{model}: a model of the same content was added before: nothing to do (--again adds it)")


def _told(step: StepRecord) -> str:
    rank = f", rank {step.rank}" if step.rank else ""
    lost = f", {step.discarded:.1%} of a tensor's energy discarded at worst" if step.discarded > 5e-4 else ""
    return f"norm {step.norm:.4g}, kept {step.kept:.1%}, cosine {step.cosine:+.3f}, merge {step.merged:.4g}{rank}{lost}"


@continual_command.command(name="status")
@_store
@click.option("--spectrum", is_flag=True, help="also how the merge is spread over layers and directions; reads it all")
@_json
@_debug
def status_command(store: str, spectrum: bool, as_json: bool, debug: bool) -> None:
    """What the store holds, and what each model brought.

    norm: of the model's change. kept: the share of it that was added. cosine: between the change and the merge then.
    rank: of what is held as factors. merge: the norm of what is held then, before the scale.
    """
    with reported(debug):
        from merging.continual import ContinualStore

        facts = ContinualStore(store).status(spectrum=spectrum)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{store}: {len(facts['steps'])} models by {facts['method']}, on {facts['base']}")
    for line in facts["holds"]:
        click.echo(f"  {line}")
    if facts["steps"]:
        click.echo(f"  published times {facts['scale']:.4g}")
        click.echo(f"\n{'step':>4}  {'norm':>9}  {'kept':>6}  {'cosine':>6}  {'rank':>4}  {'merge':>9}  model")
    for step in facts["steps"]:
        click.echo(
            f"{step['number']:>4}  {step['norm']:>9.4g}  {step['kept']:>6.1%}  {step['cosine']:>+6.3f}  "
            f"{step['rank'] or '-':>4}  {step['merged']:>9.4g}  {step['source']}"
        )
    for layer in facts.get("layers", ()):
        place = "outside" if layer["layer"] is None else f"layer {layer['layer']}"
        click.echo(
            f"{place:>10}: norm {layer['norm']:.4g}, leading directions {layer['leading']:.1%}, "
            f"stable rank {layer['stable_rank']:.1f}"
        )
    for each in facts["refused"]:
        click.echo(f"refused: {each['source']}: {each['reason']}")


@continual_command.command(name="log")
@_store
@_json
@_debug
def log_command(store: str, as_json: bool, debug: bool) -> None:
    """The history: every step, the newest first."""
    with reported(debug):
        from merging.continual import ContinualStore

        steps = ContinualStore(store).manifest().steps[::-1]
    if as_json:
        click.echo(json.dumps([step.model_dump() for step in steps], indent=2))
        return
    for step in steps:
        click.echo(f"step {step.number}  {step.time}\n  {step.source} ({step.kind}, sha256 {step.sha256[:16]})")
        click.echo(f"  {_told(step)}")


@continual_command.command(name="export")
@_store
@click.option("-o", "--output", required=True, type=click.Path(), help="a folder, or a file ending in .safetensors")
@click.option("--as", "kind", type=click.Choice(["model", "adapter"]), default="model", show_default=True)
@click.option("--rank", type=int, help="rank of the adapter  [default: that of what is held]")
@click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]), help="type of every tensor")
@click.option("--overwrite", is_flag=True, help="replace an existing output")
@_working
@click.option("--progress/--quiet", default=None, help="progress bar on stderr  [default: on a terminal]")
@_json
@_debug
def export_command(store: str, output: str, progress: bool | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Write the merge of all models so far, as a full model or as an adapter."""
    with reported(debug):
        from merging.continual import ContinualStore

        with progress_bar(progress) as report:
            merged = ContinualStore(store).export(output, progress=report, **options)
    if as_json:
        click.echo(json.dumps(merged.to_dict(), indent=2))
        return
    rank = f" of rank {merged.rank}" if merged.rank and merged.kind == "adapter" else ""
    click.echo(f"{output}: {merged.kind}{rank}, {merged.tensors} tensors, {size_text(merged.bytes)}")
    if merged.discarded:
        click.echo(f"energy kept: {1 - sum(merged.discarded.values()) / len(merged.discarded):.1%} on average")


@continual_command.command(name="rollback")
@_store
@click.option("--to", type=int, required=True, help="the step to go back to; 0 is the empty store")
@_json
@_debug
def rollback_command(store: str, to: int, as_json: bool, debug: bool) -> None:
    """Go back to the state after a step; later ones are forgotten."""
    with reported(debug):
        from merging.continual import ContinualStore

        steps = len(ContinualStore(store).rollback(to).steps)
    click.echo(json.dumps({"steps": steps}) if as_json else f"{store}: {steps} models")


@continual_command.command(name="verify")
@_store
@_json
@_debug
def verify_command(store: str, as_json: bool, debug: bool) -> None:
    """Hash all states and the base, and hold them against the manifest; exit code 1 if something is wrong."""
    with reported(debug):
        from merging.continual import ContinualStore

        verdict = ContinualStore(store).verify()
    if as_json:
        facts = {"steps": verdict.steps, "removed": verdict.removed, "problems": verdict.problems}
        click.echo(json.dumps(facts, indent=2))
    elif not verdict.problems:
        gone = f", states of {len(verdict.removed)} removed" if verdict.removed else ""
        click.echo(f"{store}: {verdict.steps} models{gone}, all as it was written")
    for problem in verdict.problems if not as_json else ():
        click.echo(problem, err=True)
    if verdict.problems:
        raise click.exceptions.Exit(1)


@continual_command.command(name="gc")
@_store
@click.option("--keep", type=int, required=True, help="how many of the last states stay, to roll back to")
@_json
@_debug
def gc_command(store: str, keep: int, as_json: bool, debug: bool) -> None:
    """Remove all states but the last ones."""
    with reported(debug):
        from merging.continual import ContinualStore

        gone = ContinualStore(store).gc(keep)
    click.echo(json.dumps({"removed": gone}) if as_json else f"{store}: {len(gone)} states removed")


@continual_command.command(name="watch")
@_store
@click.option("--from", "folder", required=True, type=click.Path(), help="where models appear")
@click.option("--interval", type=float, default=10.0, show_default=True, help="seconds between two looks")
@click.option("--once", is_flag=True, help="look twice, add what is complete, and end")
@_working
@_json
@_debug
def watch_command(
    store: str, folder: str, interval: float, once: bool, as_json: bool, debug: bool, **options: Any
) -> None:
    """Add every new model of a folder when it is complete, the oldest first, until SIGTERM or Ctrl-C.

    What is refused is noted in the store with the reason and left alone until it changes. A signal ends the watch; a
    step that is under way is finished first, or with a second signal given up (the store is then as before).
    """
    with reported(debug):
        from merging.continual import ContinualStore
        from merging.continual.watch import Event, watch

        def tell(event: Event) -> None:
            if as_json:
                told = {"what": event.what, "model": str(event.source), "step": event.step, "reason": event.reason}
                click.echo(json.dumps(told))
            else:
                more = f" as step {event.step}" if event.step else f": {event.reason}" if event.reason else ""
                click.echo(f"{event.what}: {event.source}{more}")

        interrupt = signal.getsignal(signal.SIGTERM)

        signals: list[int] = []

        def finish(number: int, frame: Any) -> None:
            if signals and callable(interrupt):
                interrupt(number, frame)
            signals.append(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, finish)

        def pause(seconds: float) -> bool:
            end = time.monotonic() + seconds
            while not signals and (left := end - time.monotonic()) > 0:
                time.sleep(min(left, 0.2))
            return bool(signals)

        watch(ContinualStore(store), folder, interval=interval, pause=pause, tell=tell, once=once, **options)


@continual_command.command(name="plot")
@_store
@click.option("-o", "--output", required=True, type=click.Path(), help="a .png, .svg or .pdf")
@_debug
def plot_command(store: str, output: str, debug: bool) -> None:
    """Draw norms, kept shares, cosines and ranks over the steps (needs matplotlib)."""
    with reported(debug):
        from merging.continual import ContinualStore
        from merging.continual.plot import plot

        plot(ContinualStore(store), output)
    click.echo(output)
