"""The commands. No logic lives here, and nothing slow is imported until a command needs it."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from hyperprior import __version__, prefer_onednn
from hyperprior.errors import HyperpriorError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    Optional[list[str]], typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that replace those of CONFIG.")
]
Model = Annotated[
    Optional[str],
    typer.Option(help="A run, what `hyperprior export` wrote, or a model in the box. Default: $HYPERPRIOR_MODEL."),
]
Effort = Annotated[
    int,
    typer.Option(min=0, metavar="ROUNDS", help="Of a search for a smaller file of the same quality; try 20. Slower."),
]
Out = Annotated[Optional[str], typer.Option("-o", "--out", help="A file, a directory, or - for stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only warnings and errors.")]
Sources = Annotated[list[str], typer.Argument(metavar="SOURCE", help="Tars, directories, patterns or URLs.")]


def print_version(asked: bool) -> None:
    if asked:
        print(f"hyperprior {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train learned image compression with a scale hyperprior, exactly resumable.

    Exit codes: 0 finished, 1 a model is worse than its gate, 2 bad usage or config, 3 bad data, 4 diverged,
    75 start the same command again.
    """
    global show_traceback
    show_traceback = debug


show_traceback = False


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run: Annotated[
        Optional[Path], typer.Option(help="Run directory; resumed if it holds a run. Default: runs/NAME-OF-CONFIG.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train, or resume, a run; ends with its result on held-out images.

    Example: `hyperprior train configs/quickstart.yaml train.steps=2000 --run runs/try`
    """
    from hyperprior.config import load_config
    from hyperprior.terminal import Terminal

    settings = load_config(config, overrides or [])
    terminal = Terminal(quiet, as_json=as_json)
    folder = run or Path("runs") / config.stem
    use_the_cpu_well(settings.train.precision)
    from hyperprior import train as job

    result = job.train(settings, folder, terminal)
    if result is None:  # not the chief: the rest is its business
        return
    from hyperprior.export import export

    export(folder, None, terminal)
    for line in job.describe_result(result, folder):
        terminal.say(line)
    terminal.tell({"run": str(folder), **result})


@app.command()
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the runs. Default: runs/NAME-OF-CONFIG-sweep.")] = None,
    lambdas: Annotated[Optional[str], typer.Option(help="As in 0.0035,0.013,0.0483: a run each.")] = None,
    target_bpp: Annotated[Optional[float], typer.Option(help="Find the lambda for this rate instead.", min=0)] = None,
    target_psnr: Annotated[Optional[float], typer.Option(help="Find the lambda for this PSNR in dB instead.")] = None,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Start each run from the weights of the one before.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each on a GPU of its own where there are any.")] = 1,
    images: Annotated[
        Optional[Path], typer.Option(help="Evaluate the models on these images, into OUT/results.")
    ] = None,
    baselines: Annotated[str, typer.Option(help="Of that evaluation, as in `hyperprior evaluate`.")] = "all",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train one run per lambda, or search for a lambda; then evaluate them together. Started again, it goes on.

    The searches judge by the run's held-out images (data.test), rates as estimated in training.

    Example: `hyperprior sweep configs/quickstart.yaml --lambdas 0.0035,0.013,0.0483 --images kodak/`
    """
    use_the_cpu_well()
    from hyperprior import sweep as job
    from hyperprior.errors import ConfigError
    from hyperprior.terminal import Terminal

    if images:
        from hyperprior.baselines import choose

        if not images.is_dir():
            raise ConfigError(f"--images {images} is no directory; the models are evaluated on its images")
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
        runs = [job.search(plan, *next(iter(given.items())), terminal)]
    if images:
        evaluate(runs, images, plan.out / "results", baselines=baselines, quiet=quiet or as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[
        Optional[Path],
        typer.Option(help="The model directory, or with .npz one file with float16 weights. Default: RUN/model."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another model in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Make a codec of a run's best weights. Training ends with it; do it by hand for a run that goes on.

    Example: `hyperprior export runs/a --out models/a`
    """
    from hyperprior import export as job
    from hyperprior.terminal import Terminal

    terminal = Terminal(as_json=as_json)
    terminal.tell(job.export(run, out, terminal, force))


@app.command()
def compress(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Images, directories, or - for stdin.")],
    model: Model = None,
    quality: Annotated[
        Optional[int], typer.Option(help="A model in the box: 1 is smallest. Default: 3, unless a model is named.")
    ] = None,
    out: Out = None,
    effort: Effort = 0,
    force: Force = False,
    verify: Annotated[bool, typer.Option("--verify", help="Decode too, and tell PSNR and MS-SSIM.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress images to .hyp files.

    Examples: `hyperprior compress photo.jpg`, `hyperprior compress photos/ --model runs/a -o compressed/`
    """
    from hyperprior import files, models
    from hyperprior.terminal import Terminal

    terminal = Terminal(quiet, "-" in ([out] if out else images), as_json)
    files.compress(images, models.chosen(model, quality), out, effort, force, verify, terminal)


@app.command()
def decompress(
    hyp: Annotated[list[str], typer.Argument(metavar="FILE", help=".hyp files, directories, or - for stdin.")],
    model: Model = None,
    out: Out = None,
    suffix: Annotated[str, typer.Option("--format", help="Extension of files that -o does not name.")] = ".png",
    force: Force = False,
    max_pixels: Annotated[
        Optional[int], typer.Option(min=1, help="Refuse larger images. Default: those that `compress` refuses.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decompress .hyp files to PNG, or another format by its extension.

    Files that the models in the box wrote need no --model.

    Example: `hyperprior decompress compressed/ -o decoded/`
    """
    from hyperprior import files
    from hyperprior.terminal import Terminal

    terminal = Terminal(quiet, "-" in ([out] if out else hyp), as_json)
    files.decompress(hyp, model, out, "." + suffix.lower().lstrip("."), force, max_pixels, terminal)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(metavar="FILE.hyp|MODEL|RUN")], model: Model = None, as_json: Json = False
) -> None:
    """What a file, a model or a run says of itself, and whether a model fits a file; nothing is decoded.

    Example: `hyperprior info photo.hyp --model runs/a`
    """
    from hyperprior import files
    from hyperprior.terminal import Terminal

    terminal, found = Terminal(as_json=as_json), files.info(path, model)
    terminal.say("\n".join(files.lines(found)))
    terminal.tell(found)


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
    from hyperprior import runs as job
    from hyperprior.terminal import Terminal

    found = [job.describe(run) for run in job.find(folders or [Path("runs")])]
    terminal = Terminal(as_json=as_json)
    terminal.say(job.table(found))
    terminal.tell(found)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="RUN")],
    b: Annotated[Path, typer.Argument(metavar="RUN")],
    as_json: Json = False,
) -> None:
    """Show in which keys of the config and in which metrics two runs differ.

    Example: `hyperprior compare runs/a runs/b`
    """
    from hyperprior import runs as job
    from hyperprior.terminal import Terminal

    terminal, found = Terminal(as_json=as_json), job.compare(a, b)
    terminal.say(job.comparison(found))
    terminal.tell(found)


@app.command()
def inspect(
    sources: Sources,
    patch_size: Annotated[int, typer.Option(help="Count images with a side below this.")] = 256,
    allow_pipe: Annotated[
        bool, typer.Option("--allow-pipe", help="Allow `pipe:` sources, which run a shell command.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What sources hold: shards, images, sizes, formats, and everything unusable with its reason.

    Example: `hyperprior inspect ILSVRC2012_img_train.tar`
    """
    from hyperprior import pack
    from hyperprior.terminal import Terminal

    terminal = Terminal(as_json=as_json)
    report = pack.inspect(sources, patch_size, allow_pipe, terminal)
    terminal.say("\n".join(report.lines()))
    terminal.tell(report.to_dict())
    if report.damaged:
        raise typer.Exit(3)


@app.command(name="pack")
def pack_command(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Directory of the shards.")],
    images_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    max_side: Annotated[
        Optional[int], typer.Option(min=1, help="Scale larger images down to this longer side.")
    ] = None,
    min_side: Annotated[int, typer.Option(help="Leave out images with a side below this.")] = 1,
    encode: Annotated[
        Optional[str],
        typer.Option(help="jpeg or png: re-encode every image; default: keep the bytes of images that are not scaled."),
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG re-encoding.")] = 95,
    allow_pipe: Annotated[
        bool, typer.Option("--allow-pipe", help="Allow `pipe:` sources, which run a shell command.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write even WebDataset shards from images, tars or URLs. Started again, it goes on where it stopped.

    Example: `hyperprior pack photos/ --out shards/ --max-side 1200`
    """
    from hyperprior import pack
    from hyperprior.terminal import Terminal

    options = pack.Options(images_per_shard, max_side, min_side, encode, quality)
    pack.pack(sources, out, options, allow_pipe, Terminal(as_json=as_json))


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
        typer.Option(help="A CSV of published curves, or none. Default: those on Kodak, when the images are Kodak's."),
    ] = None,
    cache: Annotated[
        Optional[Path], typer.Option(help="Directory of kept baseline results. Default: the user's cache.")
    ] = None,
    gate: Annotated[
        Optional[Path],
        typer.Option(help="An earlier summary.json: exit 1 if a model is worse than the one of its lambda there."),
    ] = None,
    margin: Annotated[float, typer.Option(min=0, help="Of --gate: percent of the loss.")] = 0.5,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress and decompress images with models and baselines; compare, plot and show the results.

    Writes report.html, images.csv, summary.json, summary.md, rd_psnr and rd_ms_ssim (.png, .svg), and pictures.png.
    Models that share a metric are one curve: four or more lambdas give BD-rates.

    Example: `hyperprior evaluate runs/a runs/b runs/c runs/d --images kodak/ --out results/`
    """
    from hyperprior.terminal import Terminal

    use_the_cpu_well()
    from hyperprior import evaluate as job

    options = job.Options(effort, baselines, published, cache, gate, margin)
    job.evaluate(models, images, out, options, Terminal(quiet, as_json=as_json))


@app.command()
def bench(
    config: ConfigFile,
    what: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[step|input|train|start|codec|all] [SECTION.KEY=VALUE]", help="Default: all parts."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Write the figures as JSON.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure training step, input, loop and codec, as ratios to what this machine can do.

    Example: `hyperprior bench configs/imagenet_mse.yaml step train.batch_size=8`
    """
    from hyperprior.config import load_config
    from hyperprior.errors import ConfigError

    parts = [word for word in what or [] if "=" not in word] or ["all"]
    for word in parts:
        if word not in ("step", "input", "train", "start", "codec", "all"):
            raise ConfigError(f"`{word}` cannot be measured; step, input, train, start, codec and all can")
    settings = load_config(config, [word for word in what or [] if "=" in word])
    use_the_cpu_well(settings.train.precision)
    from hyperprior import bench as job
    from hyperprior import checkpoint
    from hyperprior.terminal import Terminal

    terminal = Terminal(as_json=as_json)
    found = job.bench(settings, list(job.PARTS) if "all" in parts else parts, repeats, terminal)
    terminal.tell(found)
    if out:
        checkpoint.write_text(out, json.dumps(found, indent=2) + "\n")


@app.command()
def doctor(
    config: Annotated[
        Optional[Path], typer.Argument(metavar="[CONFIG]", help="Also judge its sources and needs.")
    ] = None,
    overrides: Overrides = None,
    run: Annotated[Path, typer.Option(help="Where runs go.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Tell what this machine is to a run: GPUs and why not, memory, disk, sources, what will bind.

    Example: `hyperprior doctor configs/imagenet_mse.yaml`
    """
    from hyperprior.config import load_config
    from hyperprior.terminal import Terminal

    settings = load_config(config, overrides or []) if config else None
    from hyperprior import doctor as job

    terminal, found = Terminal(as_json=as_json), job.examine(settings, run)
    for finding in found:
        terminal.say(finding.line())
    terminal.tell(job.to_dict(found))


@app.command(name="config")
def config_command(
    config: Annotated[Optional[Path], typer.Argument(metavar="[CONFIG]", help="Default: the defaults.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema for editors instead.")] = False,
) -> None:
    """Print the resolved config with the meaning of each key.

    Example: `hyperprior config configs/quickstart.yaml loss.lambda=0.025`
    """
    from hyperprior import config as settings

    if schema:
        print(json.dumps(settings.schema(), indent=2))
    else:
        print(settings.render(settings.load_config(config, overrides or [])), end="")


def use_the_cpu_well(precision: str = "float32") -> None:
    """Starts this process anew with an allocator that keeps freed tensors, then imports TensorFlow with oneDNN on.

    glibc reads these settings only when a process starts; training steps take 0.8 of the time with them on
    the CPU, where freed tensors are faulted in again otherwise. Memory use is that of the largest step either way.
    """
    settings = {
        "MALLOC_MMAP_THRESHOLD_": str(2**34),
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**28),
    }
    if sys.platform == "linux" and not settings.keys() & os.environ.keys():
        again = getattr(sys, "orig_argv", ["python", "-m", "hyperprior", *sys.argv[1:]])  # since Python 3.10
        os.execve(sys.executable, [sys.executable, *again[1:]], {**os.environ, **settings})
    if precision == "float32":  # on a CPU without AVX-512 oneDNN does not know the others
        prefer_onednn()


def main() -> None:
    """Runs a command; an error meant for the user becomes one line and its exit code."""
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # TensorFlow's errors reach Python as exceptions; what else it prints at start is noise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else what is half written would stay
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except (HyperpriorError, OSError) as error:
        if show_traceback:
            raise
        print(f"hyperprior: {error}", file=sys.stderr)
        if isinstance(error, HyperpriorError):
            sys.exit(error.exit_code)
        # Such as a full disk behind stdout, or a name that is too long.
        sys.exit(75 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
