"""Commands that train: ``run`` and ``compare``."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.panel import Panel

from fedfm.cli.app import STOPPED, app, output, progress
from fedfm.errors import RecipeError
from fedfm.recipe import Recipe, read

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as [bold]training.max_steps=4[/]; repeatable."),
]
Engine = Annotated[
    str | None,
    typer.Option("--engine", metavar="ENGINE", help="Where clients work: fused, sequential, ray or ray-fused."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last finished round in the run folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the run folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]


@app.command(rich_help_panel="Train")
def run(
    recipe: Annotated[
        Path, typer.Argument(help="The recipe, a YAML file; or the folder of a federation.", metavar="RECIPE")
    ],
    set_: Set = None,
    engine: Engine = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Run a recipe: train, compare with its references on held-out data, write adapter and report.

    Ctrl-C stops at once; the last finished round is kept, and --resume goes on from there. So it does after a crash.

    With the folder of a federation ([bold]fedfm deploy init[/]), it runs over the sites that are there.

    Example: fedfm run recipes/demo.yaml --set rounds=3 --set output_dir=runs/short
    """
    from fedfm.cli import deploy

    if deploy.is_federation(recipe):
        if set_ or engine or overwrite:
            raise RecipeError(
                f"{recipe} is a federation, whose sites have agreed to its recipe: --set, --engine and --overwrite do "
                "not go with it. Change app/recipe.yaml there, and move coordinator/run away for a new run."
            )
        deploy.start(recipe, resume, json_)
        return
    _execute(_plan(recipe, set_, engine), resume, overwrite, json_)


@app.command(rich_help_panel="Train")
def compare(
    recipe: RecipePath,
    methods: Annotated[
        str,
        typer.Option(
            help="Ids of methods, separated by commas; see [bold]fedfm methods[/]. all-lora means all of that family "
            "that can run by the recipe."
        ),
    ] = "",
    attacks: Annotated[
        str, typer.Option(help="Ids of threats, separated by commas: one method under each of them; in simulation.")
    ] = "",
    defences: Annotated[
        str,
        typer.Option(
            help="Ids of screens, estimators, stages and schedules, separated by commas: each against each attack."
        ),
    ] = "",
    hostile: Annotated[
        float | None, typer.Option(help="Share of the clients that --attacks make hostile; 0.2 unless given.")
    ] = None,
    set_: Set = None,
    engine: Engine = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Run a recipe by several methods, or by one under several attacks with several defences, on the same clients,
    seeds and budget, and set them side by side.

    Example: fedfm compare recipes/demo.yaml --methods fedit,fedavg,local-only

    Example: fedfm compare recipes/demo.yaml --attacks sign-flip,alie --defences krum,median
    """
    plan = _plan(recipe, set_, engine)
    if attacks or defences or plan.attacks or plan.defences:
        _execute(_table(plan, methods, attacks, defences, hostile), resume, overwrite, json_)
        return
    if hostile is not None:
        raise RecipeError("--hostile is the share of hostile clients of --attacks, which are not given.")
    wanted = _wanted(plan, words(methods))
    if len(wanted) < 2 or len(set(wanted)) < len(wanted):
        raise RecipeError(f"--methods takes at least two different ids separated by commas, but got {methods!r}.")
    place = plan.output_dir or f"runs/{plan.name}-compare"
    chosen = {"method": wanted[0], "references": tuple(wanted[1:]), "output_dir": place}
    _execute(plan.model_copy(update=chosen), resume, overwrite, json_)


def _table(plan: Recipe, methods: str, attacks: str, defences: str, hostile: float | None) -> Recipe:
    """The recipe of a table of attacks against defences."""
    from fedfm import parts

    if len(words(methods)) > 1:
        raise RecipeError(f"attacks and defences are tried on one method, but --methods got {methods!r}.")
    chosen: dict[str, Any] = {"method": methods.strip() or plan.method, "references": ()}
    if attacks:
        kinds: list[Any] = [parts.find("attack", word, "--attacks") for word in words(attacks) if word != "none"]
        share = {} if hostile is None else {"clients": hostile}
        chosen["attacks"] = tuple({"kind": cls.id, **({} if cls.server else share)} for cls in kinds)
    elif hostile is not None:
        raise RecipeError("--hostile is the share of hostile clients of --attacks, which are not given.")
    if defences:
        chosen["defences"] = tuple(word for word in words(defences) if word != "none")
    chosen["output_dir"] = plan.output_dir or f"runs/{plan.name}-attacks"
    made = plan.model_copy(update=chosen)
    made.resolved()
    return made


def words(text: str) -> list[str]:
    """What stands between the commas of an option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _wanted(plan: Recipe, words: Sequence[str]) -> list[str]:
    """Ids of methods, with families written out; who of a family cannot run by the recipe is named and left out."""
    from fedfm import parts
    from fedfm.experiment import Experiment

    if not any(word.startswith("all-") for word in words):
        return list(words)
    experiment, found = Experiment(plan), [word for word in words if not word.startswith("all-")]
    for word in words:
        for method in parts.family("methods", word.removeprefix("all-")) if word.startswith("all-") else ():
            if method in found:
                continue
            if why := experiment.refusal(method):
                progress.print(f"[dim]without {method}: {escape(why)}[/]", highlight=False)
            else:
                found.append(method)
    return found


def _plan(recipe: Path, set_: Sequence[str] | None, engine: str | None) -> Recipe:
    return read(recipe, [*(set_ or ()), *([f"engine={engine}"] if engine else [])])


def _execute(recipe: Recipe, resume: bool, overwrite: bool, as_json: bool) -> None:
    from fedfm.experiment import Experiment
    from fedfm.observe.observer import Observer
    from fedfm.observe.progress import TerminalProgress
    from fedfm.observe.tensorboard import TensorBoard

    experiment = Experiment(recipe)
    bar = TerminalProgress(progress)

    def observers(folder: Path) -> Sequence[Observer]:
        return bar, TensorBoard(folder / "tensorboard")

    with stoppable(experiment.stop):
        progress.print("loading model and data ...", style="dim")
        people, model = experiment.population, experiment.main.bench.loaded
        progress.print(
            f"[bold]{escape(recipe.title or recipe.name)}[/]: {experiment.main.method.id} of {escape(model.name)} "
            f"over {len(people)} clients",
            highlight=False,
        )
        for name, run in experiment.runs.items():
            if run.space.id != experiment.main.space.id:
                progress.print(f"[dim]{name} works in the space {run.space.id}, with the same settings[/]")
        for said in {run.attack.describe(): None for run in experiment.runs.values() if run.attack}:
            progress.print(f"[bold red]attack:[/] {escape(said)}", highlight=False)
        for who, of in experiment.main.spent(experiment.main.plan.rounds).items():
            progress.print(f"privacy of {who}: {promised(of)}, after all rounds", highlight=False)
        results = experiment.run(resume=resume, overwrite=overwrite, observers=observers)
    if results["status"] == "stopped":
        progress.print(f"stopped; go on with: fedfm run {recipe.folder / 'recipe.yaml'} --resume", highlight=False)
        raise typer.Exit(STOPPED)
    print(json.dumps(results)) if as_json else show(results, recipe.folder)


def promised(spent: Mapping[str, float]) -> str:
    """What a run spends of privacy, and by which noise, in words."""
    return "epsilon {epsilon:.3g} at delta {delta:g} with noise_multiplier {noise_multiplier:.6g}".format(**spent)


def show(results: dict[str, Any], folder: Path) -> None:
    """Print results for a person."""
    from fedfm import report
    from fedfm.observe.progress import size

    output.print(report.matrix(results) if "matrix" in results else report.table(results))
    for name, share in results.get("attack_success", {}).items():
        if "matrix" not in results and share is not None:
            output.print(f"{name:<14} attack succeeds on {100 * share:.1f} % of held-out rows", highlight=False)
    if "watermark" in results:
        output.print(f"watermark      {results['watermark']['says']}", highlight=False, markup=False, soft_wrap=True)
    for sample in results["samples"]:
        output.print(
            Panel(
                f"[bold]asked[/]   {escape(sample['prompt'])}\n"
                f"[dim]before  {escape(_short(sample['before']))}[/]\n"
                f"[green]after   {escape(_short(sample['after']))}[/]\n"
                f"wanted  {escape(_short(sample['reference']))}",
                title=escape(sample["client"]),
                title_align="left",
            )
        )
    for name, cost in list(results["runs"].items())[: 1 if "matrix" in results else None]:
        output.print(
            f"{name:<14} {cost['rounds']} rounds  {cost['seconds']:.0f} s  up {size(cost['bytes_up'])}  "
            f"down {size(cost['bytes_down'])}  peak memory {size(cost['peak_memory_mb'] * 1e6)}",
            highlight=False,
        )
    if results["final"]:
        output.print(f"adapter  {folder / results['final']}", highlight=False, soft_wrap=True)
    else:
        output.print(f"clients  {folder / 'clients'}  (no global model)", highlight=False, soft_wrap=True)
    output.print(f"report   {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


@contextmanager
def stoppable(stop: Any) -> Iterator[None]:
    """The first Ctrl-C asks for a stop; the second one interrupts."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        progress.print("stopping; press Ctrl-C again to stop without waiting", style="yellow")
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
