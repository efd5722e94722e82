"""The commands. This file has no logic, and imports slow modules only when a command needs them."""

from __future__ import annotations

import errno
import io
import json
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hyperprior import __version__, stack
from hyperprior.arguments import choose_existing, find_config, take_local_paths
from hyperprior.errors import ConfigError, DataError, HyperpriorError, hide_secrets
from hyperprior.terminal import Terminal, exit_soon, show_controls

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config of the package, such as photos.")
]
Overrides = Annotated[
    Optional[list[str]], typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that replace those of CONFIG.")
]
Model = Annotated[
    Optional[str], typer.Option(help="A run, an exported model, or a model in the box. Default: $HYPERPRIOR_MODEL.")
]
Effort = Annotated[
    int, typer.Option(min=0, metavar="ROUNDS", help="Rounds of a slow search for fewer bytes at equal quality; try 20.")
]
Engine = Annotated[
    str, typer.Option(help="numpy, tensorflow, or auto: NumPy, which starts at once, until TensorFlow saves time.")
]
Out = Annotated[Optional[str], typer.Option("-o", "--out", help="A file, a directory, or - for stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files.")]
Skip = Annotated[bool, typer.Option("--skip-existing", help="Leave out images whose file exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only warnings and errors.")]
AllowPipe = Annotated[bool, typer.Option("--allow-pipe", help="Allow `pipe:` sources, which run a shell command.")]
Sources = Annotated[list[str], typer.Argument(metavar="SOURCE", help="Tars, directories, patterns or URLs.")]


def print_version(asked: bool) -> None:
    if asked:
        print(f"hyperprior {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and which range coder is used.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train learned image compression with a scale hyperprior. A run can be resumed exactly.

    Exit codes: 0 finished, 1 a model is worse than its gate, 2 bad usage or config, 3 bad data, 4 diverged,
    75 start the same command again.
    """
    global show_traceback
    show_traceback = debug
    if debug:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("hyperprior").setLevel(logging.DEBUG)


show_traceback = False


@app.command()
def train(
    config: Annotated[
        Optional[str],
        typer.Argument(
            metavar="[CONFIG]", help="A YAML file, or the name of a config of the package. Default: that of --run."
        ),
    ] = None,
    overrides: Overrides = None,
    run: Annotated[
        Optional[Path], typer.Option(help="Run directory; resumed if it holds a run. Default: runs/NAME-OF-CONFIG.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train or resume a run, then measure it on held-out images.

    Example: `hyperprior train configs/quickstart.yaml train.steps=2000 --run runs/try`
    """
    from hyperprior.config import load_config
    from hyperprior.training import train_and_export

    stack.restart_with_allocator()
    path, overrides = find_config(config, overrides or [], run)
    settings = load_config(path, overrides)
    terminal = Terminal(quiet, as_json=as_json)
    folder = run or Path("runs") / path.stem
    result = train_and_export(settings, folder, terminal, owns_process=True)
    if result is None:  # not the chief
        return
    from hyperprior.training import progress  # needs TensorFlow, which has started now

    for line in progress.describe_result(result, folder):
        terminal.say(line)
    terminal.tell({"run": str(folder), **result})


@app.command()
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the runs. Default: runs/NAME-OF-CONFIG-sweep.")] = None,
    lambdas: Annotated[Optional[str], typer.Option(help="Lambdas to train, such as 0.0035,0.013,0.0483.")] = None,
    target_bpp: Annotated[Optional[float], typer.Option(help="Find the lambda for this rate instead.", min=0)] = None,
    target_psnr: Annotated[Optional[float], typer.Option(help="Find the lambda for this PSNR in dB instead.")] = None,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Start each run from the weights of the one before.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each on its own GPU if there are GPUs.")] = 1,
    images: Annotated[Optional[Path], typer.Option(help="Evaluate the models on these images, in OUT/results.")] = None,
    baselines: Annotated[str, typer.Option(help="Baselines of that evaluation, as in `hyperprior evaluate`.")] = "all",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train one run per lambda, or search for a lambda; then evaluate the runs together. Start it again to continue.

    A search uses the result on held-out images (data.test), with rates as estimated in training.

    Example: `hyperprior sweep configs/quickstart.yaml --lambdas 0.0035,0.013,0.0483 --images kodak/`
    """
    stack.restart_with_allocator()
    from hyperprior.training import sweep as job

    if images:
        from hyperprior.reference.baselines import choose

        if not images.is_dir():
            raise ConfigError(f"--images {images} is no directory; give a directory of images to evaluate on")
        choose(baselines, lambda text: None)
    terminal = Terminal(quiet, as_json=as_json)
    folder = out or Path("runs") / f"{config.stem}-sweep"
    plan = job.Plan(config, overrides or [], folder, jobs, warm_start, quiet or as_json)
    targets = {"bpp": target_bpp, "psnr_db": target_psnr}
    given = {column: value for column, value in targets.items() if value}
    if bool(lambdas) + len(given) != 1:
        raise ConfigError("give one of --lambdas, --target-bpp and --target-psnr")
    if lambdas:
        try:
            values = [float(text) for text in lambdas.split(",")]
        except ValueError as error:
            raise ConfigError(f"--lambdas {lambdas}: {error}; write numbers with commas between them") from error
        runs = job.sweep(plan, values, terminal)
    else:
        runs = [job.search_lambda(plan, *next(iter(given.items())), terminal)]
    if images:
        evaluate(runs, images, plan.out / "results", baselines=baselines, quiet=quiet or as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[
        Optional[Path],
        typer.Option(help="The model directory, or a .npz: one file with float16 weights. Default: RUN/model."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another model in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Make a codec from a run's best weights. Training does this at its end; use it for a run that is not finished.

    Example: `hyperprior export runs/a --out models/a`
    """
    stack.start_tensorflow()
    from hyperprior.training import export as job

    terminal = Terminal(as_json=as_json)
    terminal.tell(job.export(run, out, terminal, force))


@app.command()
def compress(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Images, directories, or - for stdin.")],
    model: Model = None,
    quality: Annotated[
        Optional[int],
        typer.Option(help="A model in the box; 1 makes the smallest files. Default: 3, unless a model is named."),
    ] = None,
    metric: Annotated[
        Optional[str], typer.Option(help="What a model in the box was trained for: mse, the default, or ms-ssim.")
    ] = None,
    out: Out = None,
    effort: Effort = 0,
    force: Force = False,
    skip_existing: Skip = False,
    verify: Annotated[bool, typer.Option("--verify", help="Also decode, and print PSNR and MS-SSIM.")] = False,
    engine: Engine = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress images to .hyp files.

    Examples: `hyperprior compress photo.jpg`, `hyperprior compress photos/ --model runs/a -o compressed/`
    """
    from hyperprior.codec import box, files

    terminal = Terminal(quiet, "-" in ([out] if out else images), as_json)
    existing = choose_existing(force, skip_existing)
    files.compress(images, box.choose(model, quality, metric), out, effort, existing, verify, terminal, engine)


@app.command()
def decompress(
    hyp: Annotated[list[str], typer.Argument(metavar="FILE", help=".hyp files, directories, or - for stdin.")],
    model: Model = None,
    out: Out = None,
    suffix: Annotated[str, typer.Option("--format", help="Extension of files that -o does not name.")] = ".png",
    force: Force = False,
    skip_existing: Skip = False,
    max_pixels: Annotated[
        Optional[int], typer.Option(min=1, help="Refuse larger images. Default: the limit of `compress`.")
    ] = None,
    engine: Engine = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decompress .hyp files to PNG, or another format by its extension.

    Files from the models in the box need no --model.

    Example: `hyperprior decompress compressed/ -o decoded/`
    """
    from hyperprior.codec import files

    terminal = Terminal(quiet, "-" in ([out] if out else hyp), as_json)
    existing, suffix = choose_existing(force, skip_existing), "." + suffix.lower().lstrip(".")
    files.decompress(hyp, model, out, suffix, existing, max_pixels, terminal, engine)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(metavar="FILE.hyp|MODEL|RUN")], model: Model = None, as_json: Json = False
) -> None:
    """Describe a file, a model or a run, and tell whether a model fits a file. Nothing is decoded.

    Example: `hyperprior info photo.hyp --model runs/a`
    """
    from hyperprior.training import info as job

    terminal, facts = Terminal(as_json=as_json), job.info(path, model)
    terminal.say("\n".join(job.lines(facts)))
    terminal.tell(facts)
    if facts.get("fits") is False:
        raise typer.Exit(DataError.exit_code)


@app.command()
def runs(
    folders: Annotated[
        Optional[list[Path]], typer.Argument(metavar="[DIR]", help="Runs, or directories of runs. Default: runs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs: state, step, last metrics, size.

    Example: `hyperprior runs runs/`
    """
    from hyperprior.training import runs as job

    terminal = Terminal(as_json=as_json)
    summaries = job.summarise_all(folders or [Path("runs")], terminal.warn)
    terminal.say(job.make_table(summaries))
    terminal.tell(summaries)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="RUN")],
    b: Annotated[Path, typer.Argument(metavar="RUN")],
    as_json: Json = False,
) -> None:
    """Show in which keys of the config and in which metrics two runs differ.

    Example: `hyperprior compare runs/a runs/b`
    """
    from hyperprior.training import runs as job

    terminal, comparison = Terminal(as_json=as_json), job.compare(a, b)
    terminal.say(job.make_comparison_table(comparison))
    terminal.tell(comparison)


@app.command()
def inspect(
    sources: Sources,
    patch_size: Annotated[int, typer.Option(help="Count images with a side below this.")] = 256,
    allow_pipe: AllowPipe = False,
    as_json: Json = False,
) -> None:
    """Describe sources: shards, images, sizes, formats, and everything unusable with the reason.

    Example: `hyperprior inspect ILSVRC2012_img_train.tar`
    """
    stack.start_tensorflow()
    from hyperprior.data import inspect as job

    terminal = Terminal(as_json=as_json)
    report = job.inspect(sources, patch_size, allow_pipe, terminal)
    terminal.say("\n".join(report.lines()))
    terminal.tell(report.to_dict())
    if report.damaged:
        raise typer.Exit(DataError.exit_code)


@app.command(name="pack")
def pack_command(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Directory of the shards.")],
    images_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    max_side: Annotated[Optional[int], typer.Option(min=1, help="Scale larger images to this longer side.")] = None,
    min_side: Annotated[int, typer.Option(help="Leave out images with a side below this.")] = 1,
    encode: Annotated[
        Optional[str],
        typer.Option(help="jpeg or png: re-encode every image. Default: keep the bytes of images that are not scaled."),
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of re-encoded JPEGs.")] = 95,
    allow_pipe: AllowPipe = False,
    as_json: Json = False,
) -> None:
    """Write WebDataset shards of equal size from images, tars or URLs. Start it again to continue.

    Example: `hyperprior pack photos/ --out shards/ --max-side 1200`
    """
    stack.start_tensorflow()
    from hyperprior.data import pack as job

    options = job.Options(images_per_shard, max_side, min_side, encode, quality)
    job.pack(sources, out, options, allow_pipe, Terminal(as_json=as_json))


@app.command()
def evaluate(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="Models in the box, .npz files, model directories, or runs.")
    ],
    images: Annotated[Path, typer.Option(help="Directory of images.")],
    out: Annotated[Path, typer.Option(help="Directory of the results; those of an earlier call are replaced.")],
    effort: Effort = 0,
    baselines: Annotated[
        str,
        typer.Option(help="all, none, or a list from jpeg,jpeg-opt,jpeg-444,webp,avif,avif-psnr,jpeg-2000,jpeg-xl."),
    ] = "all",
    published: Annotated[
        Optional[str],
        typer.Option(help="A CSV of published curves, or none. Default: curves on Kodak, if the images are Kodak's."),
    ] = None,
    cache: Annotated[
        Optional[Path], typer.Option(help="Directory that keeps baseline results. Default: the user's cache.")
    ] = None,
    gate: Annotated[
        Optional[Path],
        typer.Option(help="An earlier summary.json: exit 1 if a model is worse than the one with its lambda there."),
    ] = None,
    margin: Annotated[float, typer.Option(min=0, help="Margin of --gate, in percent of the loss.")] = 0.5,
    engine: Engine = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress and decompress images with models and baselines; compare, plot and show the results.

    Writes report.html, images.csv, summary.json, summary.md, rd_psnr and rd_ms_ssim (.png, .svg), and pictures.png.
    Models with the same metric form one curve. Four or more lambdas give BD-rates.

    Example: `hyperprior evaluate runs/a runs/b runs/c runs/d --images kodak/ --out results/`
    """
    if engine != "numpy" and stack.is_installed():
        stack.restart_with_allocator()
        stack.start_tensorflow()
    from hyperprior.evaluation import evaluate as job

    options = job.Options(effort, baselines, published, cache, gate, margin, engine)
    job.evaluate(models, images, out, options, Terminal(quiet, as_json=as_json))


@app.command()
def bench(
    config: ConfigFile,
    words: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[step|input|train|start|codec|all] [SECTION.KEY=VALUE]", help="Default: all parts."),
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(dir_okay=False, help="Also write the figures to this file, as JSON.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure training step, input, loop and codec, relative to the limits of this machine.

    Example: `hyperprior bench configs/imagenet_mse.yaml step train.batch_size=8`
    """
    from hyperprior.config import load_config

    parts = [word for word in words or [] if "=" not in word] or ["all"]
    for word in parts:
        if word not in ("step", "input", "train", "start", "codec", "all"):
            raise ConfigError(f"`{word}` cannot be measured; choose step, input, train, start, codec or all")
    stack.restart_with_allocator()
    settings = load_config(config, [word for word in words or [] if "=" in word])
    stack.start_tensorflow(settings.train.precision)
    from hyperprior import storage
    from hyperprior.machine import bench as job

    terminal = Terminal(as_json=as_json)
    figures = job.bench(settings, list(job.PARTS) if "all" in parts else parts, repeats, terminal)
    terminal.tell(figures)
    if out:
        storage.write_text(out, json.dumps(figures, indent=2) + "\n")


@app.command()
def doctor(
    config: Annotated[Optional[Path], typer.Argument(metavar="[CONFIG]", help="Also check sources and needs.")] = None,
    overrides: Overrides = None,
    run: Annotated[Path, typer.Option(help="Directory of the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Check this machine: GPUs and why they are not used, memory, disk, sources, and the bottleneck.

    Example: `hyperprior doctor configs/imagenet_mse.yaml`
    """
    from hyperprior.config import load_config

    settings = load_config(config, overrides or []) if config else None
    stack.start_tensorflow()
    from hyperprior.machine import doctor as job

    terminal, findings = Terminal(as_json=as_json), job.examine(settings, run)
    for finding in findings:
        terminal.say(finding.line())
    terminal.tell([finding._asdict() for finding in findings])
    if any(finding.is_fatal for finding in findings):
        raise typer.Exit(DataError.exit_code)


@app.command(name="config")
def config_command(
    config: Annotated[Optional[Path], typer.Argument(metavar="[CONFIG]", help="Default: the default values.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema for editors instead.")] = False,
) -> None:
    """Print the resolved config with the meaning of each key.

    Example: `hyperprior config configs/quickstart.yaml loss.lambda=0.025`
    """
    from hyperprior import config as settings

    if schema:
        print(json.dumps(settings.Config.model_json_schema(), indent=2))
    else:
        print(settings.render(settings.load_config(config, overrides or [])), end="")


def end_on_signal(number: int, frame: Any) -> None:
    for other in (signal.SIGTERM, signal.SIGINT):  # a second one would interrupt what removes half-written files
        if signal.getsignal(other) is end_on_signal:
            signal.signal(other, signal.SIG_IGN)
    exit_soon(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def main() -> None:
    """Runs a command. Prints an error meant for the user as one line, and exits with its code."""
    for stream in (sys.stdout, sys.stderr):  # the terminal's encoding may lack characters of file names
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"PIL\b")  # they name no image; `images.decode_photo` catches them
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # the default would leave half-written files
        signal.signal(signal.SIGTERM, end_on_signal)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_on_signal)
    try:
        take_local_paths(typer.main.get_command(app))()
    except (HyperpriorError, OSError) as error:
        if show_traceback:
            raise
        print(f"hyperprior: {show_controls(hide_secrets(str(error)))}", file=sys.stderr)
        if isinstance(error, HyperpriorError):
            sys.exit(error.exit_code)
        # For example, a full disk behind stdout, or a file name that is too long.
        sys.exit(75 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2)
    except ModuleNotFoundError as error:  # installed without all dependencies
        if show_traceback or not error.name or error.name.startswith("hyperprior"):
            raise
        package = error.name.partition(".")[0]
        print(
            f"hyperprior: this command needs {package}, which is not installed: `pip install {package}`",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
