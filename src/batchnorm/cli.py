"""The command line: parsing only. What a command does is imported when it is called, so that `--help` is quick."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import batchnorm
from batchnorm.errors import InputError

try:
    import typer
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    sys.exit(
        "batchnorm: the command line needs typer, which comes with the extra of each command: "
        'pip install "batchnorm[study]", "batchnorm[bench]" or, to fold, "batchnorm[onnx]".'
    )

__all__ = ["app", "main"]

NEEDS = ("torch", "sklearn", "joblib", "plotly", "jinja2", "rich", "onnx")

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


@contextmanager
def _one_sentence(what: str, extra: str) -> Iterator[None]:
    """Say what the user can mend in one sentence on stderr. Anything else is a bug, and its traceback belongs to it."""
    try:
        yield
    except InputError as error:
        _stop(str(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDS:
            raise
        _stop(f'{what} needs {error.name}, which is not installed; pip install "batchnorm[{extra}]" brings it.', 2)
    except KeyboardInterrupt as error:
        _stop(str(error) or "interrupted.", 130)


def _stop(sentence: str, code: int) -> None:
    if os.environ.get("RANK", "0") == "0":  # of processes that were started together, one speaks
        typer.echo(f"batchnorm: {sentence}", err=True)
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchnorm {batchnorm.__version__}")
        raise typer.Exit


@app.callback()
def _batchnorm(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Batch normalization, whole: fast layers, tools for whole models, and a study of what it does."""


@app.command()
def study(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes; made if need be.")] = Path(
        "study-report"
    ),
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Other images: a folder with the files of MNIST, Fashion-MNIST (IDX) or CIFAR-10 (binary), gzipped or "
            "not, or an .npz file with x_train, y_train, x_test, y_test (or x, y, which are split). "
            "[default: scikit-learn's digits]",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="mlp, cnn, resnet, or MODULE:FACTORY, a function that makes your own network with batch normalization "
            "in it; it may take `shape`, `inputs` and `classes`.",
        ),
    ] = "mlp",
    claims: Annotated[
        str, typer.Option(metavar="A,B", help="Only these claims or sections, by their ids. [default: all]")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Smaller everything, and quicker.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More seeds, more steps: several times as long.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interrupted study has left in DIR, and do the rest.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="How often everything is repeated. [default: 6; 5, 12]")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Passes through the training images. [default: 6; 4, 15]")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images per step.")] = 32,
    target: Annotated[
        float, typer.Option(metavar="ACCURACY", help="The test accuracy, from 0 to 1, that steps are counted to.")
    ] = 0.95,
    base_seed: Annotated[int, typer.Option(metavar="N", help="Another number, other weights and orders.")] = 0,
    paper_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps of the paper's network; 50000 there. [default: 1000; 600, 10000]"),
    ] = None,
) -> None:
    """Check what is said of batch normalization, by training.

    A network is trained with batch normalization, without it and with what is meant to replace it, from several seeds.
    The study prints what came of it, claim by claim, and writes a report to look at and the numbers behind it. The
    default takes about a minute and a half. Several processes, started by torchrun, train together.
    """
    with _one_sentence("the study", "study"):
        if quick and full:
            raise InputError("--quick and --full exclude each other.")
        from batchnorm.study.settings import Settings
        from batchnorm.study.terminal import study

        study(
            Settings(
                "quick" if quick else "full" if full else "default",
                seeds, epochs, batch_size, target, model, base_seed, paper_steps,
            ),
            out,
            data,
            [name.strip() for name in claims.split(",") if name.strip()],
            resume,
        )  # fmt: skip


@app.command()
def bench(
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only cases whose name contains this.")] = "",
    seconds: Annotated[
        float, typer.Option(metavar="S", help="How long each case is timed, in training and in evaluation.")
    ] = 1.0,
    compile: Annotated[
        bool, typer.Option("--compile", help="Against torch.compile too. Compiling takes seconds for each case.")
    ] = False,
    jax: Annotated[bool, typer.Option("--jax", help="Against JAX and TensorFlow too, where installed.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the numbers as CSV too, with the versions of everything.")
    ] = None,
) -> None:
    """Time the layers on this machine.

    Each case is a normalization with its activation, in the shape of a layer of a real network or a small one. All
    candidates take turns: this package's layer, PyTorch's, and a plain copy of the tensor, which is the unit. The
    default takes about three minutes.
    """
    with _one_sentence("the benchmark", "bench"):
        from batchnorm.bench import terminal

        terminal.bench(only, seconds, compile, jax, out)


@app.command()
def fold(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The model, with what it refers to beside it.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.onnx", help="Where the new model goes; it may be the same file.")
    ],
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Write the new model without running both on random inputs.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing unless something is wrong.")] = False,
) -> None:
    """Fold the batch normalizations of an ONNX model into the layers beside them.

    Prints what each went into, or why it stays. The new model is written only if its outputs are those of the old one
    but for rounding; running both takes onnxruntime.
    """
    with _one_sentence("folding", "onnx"):
        from batchnorm.onnx.command import fold_file

        fold_file(source, target, not no_check, quiet)


def main() -> None:
    """Run the command line. To be terminated is to be interrupted: worker processes do not outlive the command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
