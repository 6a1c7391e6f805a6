"""``sar-fast demo``: questions about pictures with and without SAR, as one HTML page and one JSON file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sar_fast.base.extras import need
from sar_fast.cli import options
from sar_fast.cli.errors import UserError
from sar_fast.lab.run.threads import one_thread_for

if TYPE_CHECKING:
    from sar_fast.lab.demo.results import Results


def demo(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for report.html and metrics.json.")] = Path(
        "results/demo"
    ),
    model: options.Model = options.MINIATURE,
    base_model: options.BaseModel = None,
    image: Annotated[str | None, typer.Option("--image", help="Your picture; needs --question.")] = None,
    question: Annotated[str | None, typer.Option("--question", help="Your question; needs --image.")] = None,
    k: options.K = None,
    beta: options.Beta = None,
    normalize: options.Normalize = None,
    weighting: options.WeightingRule = None,
    backend: options.Backend = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the drawn pictures and of the timed inputs.")] = 0,
    num_questions: Annotated[
        int, typer.Option("--num_questions", min=1, max=60, help="Questions about drawn pictures that the page shows.")
    ] = 10,
    sample_size: Annotated[
        int, typer.Option("--sample_size", min=0, help="Questions per kind and background that are counted; 0 = none.")
    ] = 100,
    timings: Annotated[
        bool,
        typer.Option("--timings/--no_timings", help="Time SAR, and the eager formulation unless --weighting is given."),
    ] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Ask a model about pictures with and without SAR, and write a page that shows what changed.

    By itself it takes the small model that is shipped, pictures that it draws, and no network. With --model, --image
    and --question it takes yours.

    **Examples**

    * `sar-fast demo`

    * `sar-fast demo --k 4 --beta 0.1 --seed 7`

    * `sar-fast demo --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is left of the car?"`
    """
    from sar_fast.cli import loading

    start = time.perf_counter()
    if (image is None) != (question is None):
        missing, given = ("--question", "--image") if question is None else ("--image", "--question")
        raise UserError(f"{missing} is missing; {given} needs it")
    if model != options.MINIATURE and image is None:
        raise UserError("--model needs --image and --question: the drawn questions are the shipped model's own")
    need("the report", "matplotlib", *(["skimage"] if image is None else []))
    picture = None if image is None else loading.open_image(image)
    given = {"beta": beta, "normalize": normalize, "weighting": weighting, "backend": backend}
    options.check_sar(k, **given)
    options.make_folder(output_dir)
    console = Console()
    with one_thread_for(model), _progress(console) as say:
        say("loading the model")
        loaded, processor = loading.load_model(model, device, dtype, base_model)
        config = options.sar_config(loaded, k, **given)

        from sar_fast.lab.demo import results as work
        from sar_fast.lab.demo.examples import Prompt, drawn_prompts

        say("asking with and without SAR")
        prompts = drawn_prompts(seed, num_questions) if picture is None else [Prompt(picture, question)]
        results = work.ask_both(loaded, processor, prompts, config, model_name=model, seed=seed)
        if picture is None and sample_size:
            work.count_right(results, loaded, processor, sample_size, say)
        if timings:
            work.time_everything(results, loaded, processor, say)
        results.seconds = time.perf_counter() - start
        report = work.write(results, output_dir)
    _print(console, results, report)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """What says what is being done: a line that changes on a terminal, lines on stderr elsewhere."""
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield lambda words: typer.echo(f"-- {words}", err=True)


def _print(console: Console, results: Results, report: Path) -> None:
    answers = Table(title="Answers", title_justify="left")
    for name in ("question", "truth", "without SAR", "with SAR"):
        answers.add_column(name)
    for example in results.examples:
        answers.add_row(
            example.prompt.question,
            example.prompt.truth or "not known",
            _marked(example.reply_off, example.right_off),
            _marked(example.reply_on, example.right_on),
        )
    console.print(answers)
    if results.accuracy:
        total = results.total
        console.print(
            f"\nOver {total.questions} questions: {total.right_off} right without SAR, {total.right_on} with it "
            f"({total.changed} answers changed, {total.gained} became right, {total.lost} wrong).\n{results.verdict}"
        )
    for timing in results.timings:
        console.print(f"\n[bold]{timing.title}[/bold] ({timing.shape})", highlight=False)
        for name, seconds in timing.seconds.items():
            console.print(f"  {name:<40} {1e3 * seconds:8.1f} ms", highlight=False)
    console.print(f"\nReport: {report}  ({results.seconds:.0f} s)", highlight=False, soft_wrap=True)


def _marked(reply: str, right: bool | None) -> str:
    mark = "" if right is None else " [green]✓[/green]" if right else " [red]✗[/red]"
    return escape(reply or "(nothing)") + mark
