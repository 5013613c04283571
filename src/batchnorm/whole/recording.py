"""What `watch` records for each layer and step, where the records go, and the line that shows the current state."""

import csv
import sys
from collections import deque
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm.errors import InputError

__all__ = ["Record", "Recorder", "Sink"]


class Record(NamedTuple):
    """One layer in one step. Means and variances are averages over the channels.

    Attributes:
        step: The number of the training step, from 1.
        layer: The layer's name.
        batch_mean, batch_var: Those of the input; None if they are not known.
        running_mean, running_var: The running statistics after the step; None if there are none.
        gap: The distance between the statistics of the batch and the running ones, in running standard deviations: a
            root mean square over the channels; None if one of the two is not known.
        grad_out: The norm of the gradient with respect to the layer's output.
        grad_in: The norm of the gradient with respect to its input, over all paths to the loss.
        dead: The share of channels that are nowhere above 0 in the batch, so that a ReLU after them is off.
        skipped: The number of batches skipped since the start.
    """

    step: int
    layer: str
    batch_mean: float | None = None
    batch_var: float | None = None
    running_mean: float | None = None
    running_var: float | None = None
    gap: float | None = None
    grad_out: float | None = None
    grad_in: float | None = None
    dead: float | None = None
    skipped: int = 0


Sink = str | Path | Callable[[Record], object] | Any
"""A `.csv` file; a folder for TensorBoard; a writer with `add_scalar`; or a function that takes each record."""


class Recorder:
    """Passes records on as they arrive, and keeps the most recent ones.

    Args:
        to: Where the records go in addition to `records`; nowhere else if None.
        keep: The number of records to keep.
        live: Whether to show a line on stderr, if that is a terminal and rich is installed.

    Attributes:
        records: The most recent records.
        steps: The number of training steps so far.
    """

    def __init__(self, to: Sink | None, keep: int, live: bool) -> None:
        if keep < 1:
            raise ValueError(f"keep must be positive, got {keep}")
        self.records: deque[Record] = deque(maxlen=keep)
        self.steps = 0
        self.to = _check(to)
        self._live = live
        self._write: Callable[[Record], object] | None = None
        self._flush: Callable[[], object] | None = None
        self._closing: list[Callable[[], object]] = []
        self._line: Any = None
        self._layers: dict[str, Record] = {}

    def open(self) -> None:
        """Open the file, and show the line."""
        self.close()  # after a training that failed
        if isinstance(self.to, Path):
            try:
                open_file = self._open_csv if self.to.suffix == ".csv" else self._open_board
                open_file(self.to)
            except OSError as error:
                raise InputError(f"{self.to} cannot be written ({error.strerror}); choose another path.") from error
        elif self.to is not None:
            self._write = _to_board(self.to) if hasattr(self.to, "add_scalar") else self.to
        if self._live and sys.stderr.isatty() and find_spec("rich"):
            from rich.console import Console
            from rich.live import Live

            self._line = Live("", console=Console(stderr=True), transient=True, refresh_per_second=4)
            self._line.start()
            self._closing.append(self._line.stop)

    def _open_csv(self, path: Path) -> None:
        appends = self.steps > 0 and path.exists()  # a second training
        file = path.open("a" if appends else "w", newline="", encoding="utf-8")
        writer = csv.writer(file)
        if not appends:
            writer.writerow(Record._fields)
        self._write, self._flush = writer.writerow, file.flush
        self._closing.append(file.close)

    def _open_board(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # with the exceptions of Python, not of a framework
        from tensorboard.summary import Writer

        board = Writer(str(folder))
        self._write, self._flush = _to_board(board), board.flush
        self._closing.append(board.close)

    def add(self, records: Sequence[Record]) -> None:
        """Add the records of a step."""
        for record in records:
            self.records.append(record)
            self._layers[record.layer] = record
            if self._write is not None:
                self._write(record)
        if records and self._flush is not None:
            self._flush()
        if records and self._line is not None:
            self._line.update(str(self))

    def close(self) -> None:
        """Close the file, and remove the line."""
        while self._closing:
            self._closing.pop()()
        self._write = self._flush = self._line = None

    def __str__(self) -> str:
        """One line: the worst layers in the last recorded step."""
        last = list(self._layers.values())
        parts = [f"step {self.steps:,}"]
        if gaps := [(record.gap, record.layer) for record in last if record.gap is not None]:
            size, layer = max(gaps)
            parts.append(f"largest gap {size:.2g} in {layer or 'the layer'}")
        if dead := [(record.dead, record.layer) for record in last if record.dead is not None]:
            share, layer = max(dead)
            parts.append(f"most off {share:.0%} in {layer or 'the layer'}")
        if skipped := max((record.skipped for record in last), default=0):
            parts.append(f"{skipped:,} batches skipped")
        return "; ".join(parts)


def _check(to: Any) -> Any:
    """The destination of the records, with text as a path; one that cannot be used fails here, before training."""
    if isinstance(to, str):
        to = Path(to)
    if isinstance(to, Path):
        if to.suffix == ".csv":
            return to
        if to.suffix and not to.is_dir():
            raise InputError(f"{to} is neither a .csv file nor a folder for TensorBoard; choose one of them.")
        if not find_spec("tensorboard"):
            raise InputError(
                f"{to} is a folder for TensorBoard, which is not installed; install it with pip install tensorboard, "
                "or write a .csv file."
            )
        return to
    if to is None or callable(to) or hasattr(to, "add_scalar"):
        return to
    raise TypeError(
        f"records go to a .csv file, a folder, a writer with add_scalar, or a function, got {type(to).__name__}"
    )


def _to_board(board: Any) -> Callable[[Record], None]:
    """Each number of a record as a scalar of TensorBoard."""

    def write(record: Record) -> None:
        for name, value in record._asdict().items():
            if name not in ("step", "layer") and value is not None:
                board.add_scalar(f"{record.layer or 'layer'}/{name}", value, record.step)

    return write
