"""The command line: parses and calls, nothing else. `--json` prints one document on stdout; text for people goes to stderr.

Exit codes: 0 done; 1 our bug; 2 the user can repair it; 3 does not fit, or a proof failed; 129, 130 and 143 stopped by a signal.
"""

import errno
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_lite import show
from qlora_lite.device.out_of_memory import is_out_of_memory
from qlora_lite.docs import list_pages, read_page
from qlora_lite.errors import QloraLiteError, RecipeError, UserError
from qlora_lite.recipe import (
    SHIPPED_MODELS,
    copy_recipe,
    list_recipes,
    parse_hub_name,
    recipe_json_schema,
    show_recipe,
)
from qlora_lite.standard_streams import refuse_closed_stdin, refuse_closed_stdout, standard_streams

app = typer.Typer(
    name="qlora-lite",
    help="Fine-tune a language model in 4 bits, merge it, and prove the merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="The recipes shipped with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory that `train` wrote.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe; may be repeated.")
]
EvalSetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="eval.KEY=VALUE", help="Change a scoring key, such as eval.max_seq_length=1024."),
]
BaseOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The folder of the run's base, if it was moved; verified by hash."),
]
MixOption = Annotated[
    list[str],
    typer.Option("--mix", metavar="RUN_DIR:WEIGHT", help="Use a weighted sum of adapters; repeat for each adapter."),
]
DtypeOption = Annotated[
    str, typer.Option(metavar="TYPE", help="Type of the written factors: fp32, bf16, or int8 (not for plain peft).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
# Full disks, unwritable and missing paths: the user can repair them, wherever in the program they occur.
_USER_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME[@REVISION]", help="ORG/NAME on the hub, or a shipped model.")],
    json: JsonOption = False,
) -> None:
    """Download a model into the cache. The only command that opens a connection."""
    if name not in SHIPPED_MODELS:
        parse_hub_name(name)  # report a wrong name before torch is imported
    with _quick_imports():
        from qlora_lite.commands.fetch import fetch

    _print(fetch(name).to_json_dict(), json)


@app.command()
def check(
    recipe: Annotated[list[str], typer.Argument(metavar="RECIPE", help="Recipe files or shipped names.")],
    set_: SetOption = [],  # noqa: B006  (typer reads the default; it is never changed)
    json: JsonOption = False,
) -> None:
    """Check everything except training: recipe, data, rendered rows with their trained tokens, lengths."""
    with _quick_imports():
        from qlora_lite.commands.check import check

    checked = [one.to_json_dict() for one in check(recipe, set_)]
    _print(checked[0] if len(checked) == 1 else {"recipes": checked}, json)


@app.command()
def plan(
    what: Annotated[
        str | None, typer.Argument(metavar="[RECIPE_OR_MODEL]", help="A recipe, a model's name or a model folder.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help='Memory limit, such as "24GiB" or 24.')] = None,
    card: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for this card, such as rtx-4090 or t4.")
    ] = None,
    cards: Annotated[bool, typer.Option("--cards", help="List the cards that --card knows.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="F", help="Also write the plan as an HTML page.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Plan every known model on every usual card.")] = False,
    set_: SetOption = [],  # noqa: B006
    json: JsonOption = False,
) -> None:
    """Memory for training by every method, and sizes that fit, here or on another card. Needs the model's config only."""
    with _quick_imports():
        from qlora_lite.commands import plan

    if cards:
        _print(plan.cards().to_json_dict(), json)
        return
    if sweep == (what is not None):
        raise UserError("plan: give a recipe or a model's name, or --sweep for all known models")
    if sweep and html is not None:
        raise UserError("plan: --html writes the page of one recipe or model, so it does not go with --sweep")
    if sweep and card is not None:
        raise UserError(
            "plan: --card plans one recipe or model for one card, so it does not go with --sweep, which covers all card sizes"
        )
    if what is None:
        _print(plan.sweep_models(set_).to_json_dict(), json)
        return
    document = plan.plan(what, set_, budget=budget, card=card, html=html)
    _print(document.to_json_dict(), json)
    if not document.fits:
        raise typer.Exit(3)


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006
    run_dir: Annotated[Path | None, typer.Option(help="Folder to write; default runs/<recipe>-<n>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Record a timeline of two steps in RUN_DIR/profile.")
    ] = False,
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Plan, load, train, evaluate, report."""
    _recipe_first(recipe, set_, resume=resume, base=base)
    with _quick_imports():
        from qlora_lite.commands.train import train

    trained = train(recipe, set_, run_dir=run_dir, resume=resume, profile=profile, base=base)
    _print(trained.to_json_dict(), json)


@app.command("eval")
def evaluate(
    run_dir: RunArgument,
    which: Annotated[str, typer.Option(help="base, adapter or merged.")] = "adapter",
    data: Annotated[Path | None, typer.Option(help="Score this file instead of the recipe's.")] = None,
    scales: Annotated[
        str | None,
        typer.Option(metavar="S,S,...", help="Score the change at each scale: 0 is the base, 1 as trained."),
    ] = None,
    set_: EvalSetOption = [],  # noqa: B006
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Score one of the run's models: exact match, F1 and loss."""
    _refuse_other_keys(set_, "eval")
    numbers = None if scales is None else _numbers(scales, "--scales")
    with _quick_imports():
        from qlora_lite.commands.evaluate import evaluate
        from qlora_lite.commands.scales import evaluate_scales

    if numbers is not None:
        _print(evaluate_scales(run_dir, numbers, data=data, overrides=set_, base=base).to_json_dict(), json)
    else:
        _print(evaluate(run_dir, which=which, data=data, overrides=set_, base=base).to_json_dict(), json)


@app.command()
def merge(
    run_dir: RunArgument,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Default: RUN_DIR/merged.")] = None,
    mix: MixOption = [],  # noqa: B006
    set_: SetOption = [],  # noqa: B006
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Write a dequantized 16-bit checkpoint with the adapter added, and prove that it is the same model."""
    with _quick_imports():
        from qlora_lite.commands.merge import merge
        from qlora_lite.commands.mixed import merge_mix

    if mix:
        _print(merge_mix(run_dir, out, mix, set_, base=base).to_json_dict(), json)
    else:
        _print(merge(run_dir, out, set_, base=base).to_json_dict(), json)


@app.command()
def ask(
    run_dir: RunArgument,
    question: Annotated[str, typer.Argument(help="The question; - reads one question per line from stdin.")],
    context: Annotated[Path | None, typer.Option(help="A text file with the passage to answer from.")] = None,
    which: Annotated[str, typer.Option(help="base, adapter, merged or all.")] = "adapter",
    mix: MixOption = [],  # noqa: B006
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Answer a question with the template of training. --mix uses a sum of adapters; with -, a line `/use NAME:WEIGHT ...` changes it."""
    if question == "-":
        refuse_closed_stdin("ask")
        if which != "adapter":
            raise UserError("ask: --which needs the question as an argument; with -, a line /use NAME:0 asks the base")
    with _quick_imports():
        from qlora_lite.commands import ask, ask_lines, mixed

    if question == "-":
        lines, passage = ask_lines.questions_of_stdin(), ask.read_context(context)
        _print(ask_lines.ask_lines(run_dir, lines, mix, passage=passage, base=base).to_json_dict(), json)
    elif mix:
        passage = ask.read_context(context)
        _print(mixed.ask_mix(run_dir, question, mix, passage=passage, base=base).to_json_dict(), json)
    else:
        _print(ask.ask(run_dir, question, context=context, which=which, base=base).to_json_dict(), json)


@app.command()
def report(run_dir: RunArgument, json: JsonOption = False) -> None:
    """Write one HTML page about the run, and show its tables."""
    with _quick_imports():
        from qlora_lite.commands.report import report

    _print(report(run_dir).to_json_dict(), json)


@app.command()
def rank(
    what: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run or an adapter; with --try, a recipe.")],
    other: Annotated[
        Path | None, typer.Option("--with", metavar="RUN_DIR", help="Compare with this adapter: the shared directions.")
    ] = None,
    to: Annotated[int | None, typer.Option(metavar="R", help="Write the best adapter of this rank.")] = None,
    parameters: Annotated[
        int | None, typer.Option(metavar="N", help="Write the best adapter with at most N parameters.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the adapter that is written.")] = None,
    dtype: DtypeOption = "fp32",
    score: Annotated[bool, typer.Option(help="Score a shorter adapter on held-out rows.")] = True,
    try_: Annotated[
        str | None, typer.Option("--try", metavar="R,R,...", help="Train the recipe with each rank and compare.")
    ] = None,
    base: BaseOption = None,
    share: Annotated[
        float | None, typer.Option(help="With --try: the share of the recipe's epochs for each rank, by default 0.5.")
    ] = None,
    set_: SetOption = [],  # noqa: B006
    json: JsonOption = False,
) -> None:
    """Show the spectrum of a run's change, and recommend a rank."""
    if try_ is None and set_:
        raise UserError("rank: --set changes a recipe, so it needs --try; a finished run cannot change")
    if dtype != "fp32" and to is None and parameters is None:
        raise UserError("rank: --dtype is the type of a shorter adapter, so it needs --to R or --parameters N")
    if out is not None and to is None and parameters is None and try_ is None:
        raise UserError("rank: --out is the folder of a shorter adapter, so it needs --to R or --parameters N")
    if try_ is None and share is not None:
        raise UserError("rank: --share is the share of the epochs for each rank, so it needs --try")
    if try_ is not None and base is not None:
        raise UserError("rank: --base is the moved base of a run; with --try, use --set model.base=DIR")
    if try_ is not None:
        ranks = _whole_numbers(try_, "--try")
        alone = {"--with": other, "--to": to, "--parameters": parameters, "--out": out}
        for option in (name for name, value in alone.items() if value is not None):
            raise UserError(
                f"rank: {option} needs an existing adapter, and --try trains a recipe. Leave one of them out"
            )
        _recipe_first(what, set_)
    with _quick_imports():
        from qlora_lite.commands.rank import rank
        from qlora_lite.commands.try_ranks import try_ranks

    if try_ is not None:
        tried = try_ranks(what, set_, ranks=ranks, share=0.5 if share is None else share)
        _print(tried.to_json_dict(), json)
    else:
        ranked = rank(
            Path(what), other=other, to=to, num_parameters=parameters, out=out, dtype=dtype, score=score, base=base
        )
        _print(ranked.to_json_dict(), json)


@app.command()
def mix(
    parts: Annotated[list[str], typer.Argument(metavar="RUN_DIR:WEIGHT...", help="Such as runs/a:0.7 runs/b:0.3.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the sum.")],
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Rank of the sum; by default the sum is exact and ranks add up.")
    ] = None,
    dtype: DtypeOption = "fp32",
    score: Annotated[bool, typer.Option(help="Measure the share of the effect that --rank or --dtype loses.")] = True,
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Add adapters: 0.7 of one and 0.3 of another, or one minus another. Exact, or the best of a rank."""
    with _quick_imports():
        from qlora_lite.commands.mix import mix

    _print(mix(parts, out, rank=rank, dtype=dtype, score=score, base=base).to_json_dict(), json)


@app.command()
def verify(run_dir: RunArgument, json: JsonOption = False) -> None:
    """Compare every file with its hash: checkpoints, adapter, merged model, records. Exits with 2 when one has changed."""
    with _quick_imports():
        from qlora_lite.commands.verify import verify

    document = verify(run_dir)
    _print(document.to_json_dict(), json)
    if not document.ok:
        raise typer.Exit(2)


@app.command()
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure sizes and times that a plan cannot know; half a minute.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Describe this machine, and tell whether training will work here. Exits with 2 when it cannot."""
    from qlora_lite.commands.doctor import doctor

    document = doctor(measure=measure)
    _print(document.to_json_dict(), json)
    if not document.can_train:
        raise typer.Exit(2)


@app.command()
def docs(
    page: Annotated[
        str | None, typer.Argument(metavar="[PAGE]", help="A page's name; without it, list all pages.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Print a page of the documentation, or list the pages."""
    if page is not None:
        text = read_page(page)
        if not json:
            show.print_markdown(text)
        _print({"page": page.removesuffix(".md"), "text": text}, json)
        return
    pages = list_pages()
    if not json:
        width = max(len(entry.name) for entry in pages)
        typer.echo("\n".join(f"{entry.name:<{width}}  {entry.title}" for entry in pages))
    _print({"pages": [{"name": entry.name, "title": entry.title} for entry in pages]}, json)


@recipes_app.command("list")
def recipes_list(json: JsonOption = False) -> None:
    """List the recipes with their descriptions."""
    recipes = list_recipes()
    show.show_table("recipes", ["name", "description"], [[recipe.name, recipe.description] for recipe in recipes])
    _print({"recipes": [{"name": recipe.name, "description": recipe.description} for recipe in recipes]}, json)


@recipes_app.command("show")
def recipes_show(name: RecipeArgument) -> None:
    """Print a recipe on stdout."""
    typer.echo(show_recipe(name), nl=False)


@recipes_app.command("copy")
def recipes_copy(
    name: RecipeArgument, dest: Annotated[Path, typer.Argument(help="Folder to copy to.")] = Path(".")
) -> None:
    """Copy a recipe and its data to a folder."""
    for path in copy_recipe(name, dest):
        show.say(f"written: {path}")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    show.print_json(recipe_json_schema())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (`arguments`, or those of the process) and exit with its code."""
    _let_segments_grow()
    with standard_streams():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> None:
    _end_on_signals()
    try:
        if "--json" in arguments:
            refuse_closed_stdout()
        app(arguments, standalone_mode=True)
    except QloraLiteError as error:
        _leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        _leave("stopped", 130)
    except SystemExit as end:
        if end.code in (129, 130, 143):  # typer makes 130 of Ctrl-C
            _leave("stopped", end.code)
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):  # training handles it; scoring, merging and asking do not
            raise
        message = (str(error).splitlines() or [""])[0] or "the machine has no memory left"
        _leave(
            f"out of memory ({message}). Close other programs that use the device, or reduce the memory: "
            "--set memory.eval_batch_tokens=1024, a smaller memory.budget, data.max_seq_length or model",
            3,
        )
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        where = error.filename or "a file"
        _leave(
            f"{where}: {error.strerror}. Free some space there, or name another folder; files written before are intact",
            2,
        )


def _end_on_signals() -> None:
    """Make SIGTERM and SIGHUP (the terminal is gone) exit normally, so that half-written folders are removed; `nohup` stays in force."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Import torch and other large libraries without the garbage collector, which would walk a million objects and free none.

    Later collections skip the imported objects too: `time qlora-lite plan llama-3.1-8b --card t4` fell from 13.7 to 11.0 s on two cores.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _let_segments_grow() -> None:
    """Let torch's allocator map memory page by page; call before torch is imported.

    A block is then never larger than requested, which plans rely on, and rows of many lengths leave no holes. The user's own setting
    stays; Windows has no such memory.
    """
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option}: expected numbers with commas between them, such as 1,2,4; got {text!r}") from error


def _whole_numbers(text: str, option: str) -> list[int]:
    """Parse different whole numbers above 0."""
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not (word.isascii() and word.isdecimal() and len(word) < 10 and int(word) > 0)]
    if wrong:
        raise UserError(
            f"{option}: expected whole numbers above 0 with commas between them, such as 1,2,4; got {wrong[0]!r}"
        )
    twice = sorted({number for number in map(int, words) if list(map(int, words)).count(number) > 1})
    if twice:
        raise UserError(f"{option}: {twice[0]} is given twice; give each number once")
    return [int(word) for word in words]


def _refuse_other_keys(overrides: list[str], verb: str) -> None:
    foreign = [override for override in overrides if not override.startswith("eval.")]
    if foreign:
        raise UserError(
            f"{verb}: --set {foreign[0]} has no effect here; set only keys of eval, such as eval.max_seq_length"
        )


def _recipe_first(recipe: str, overrides: list[str], *, resume: bool = False, base: Path | None = None) -> None:
    """Report problems of a recipe before torch is imported. On a resume with `--base`, its files may have moved."""
    from qlora_lite.recipe import load_recipe

    try:
        load_recipe(recipe, overrides=overrides, files_must_exist=base is None)
    except RecipeError as error:
        if not resume:
            raise
        hint = "; for a base that was moved, add --base DIR"
        problems = [problem + hint if "model.base" in problem else problem for problem in error.problems]
        raise RecipeError(error.where, problems) from error


def _print(result: dict[str, Any], json: bool) -> None:
    if json:
        show.print_json(result)


def _leave(message: str, code: int) -> None:
    show.say_error(message)
    with suppress(UserError):
        sys.stdout.flush()
    sys.exit(code) if code < 128 else os._exit(code)


if __name__ == "__main__":
    main()
