"""What a run says while it trains: progress bar, a line per epoch, TensorBoard events, curves."""

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from files import writing
from plots import curves
from runs import seconds_of, terms_of

try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
except ImportError:  # the events are an extra; metrics.csv holds the same numbers
    EventsWriter = None


def tensorboard(folder: Path, start: int):
    """A writer of TensorBoard events that hides what an interrupted run logged after epoch `start`.
    Not SummaryWriter: its thread dies of a full disk, and the run would wait for it for ever."""
    folder.mkdir(exist_ok=True)
    writer, log = EventsWriter(str(folder / "events")), SessionLog(status=SessionLog.START)
    writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=log))
    return writer


def log_epoch(writer, row: dict) -> None:
    for name, value in row.items():
        if name != "epoch":
            group = "gradient" if name.startswith("grad_") else "train"
            told = scalar(f"{group}/{name.removeprefix('grad_')}", value)
            writer.write_event(Event(wall_time=time.time(), step=row["epoch"], summary=told))
    writer.flush()


class Log:
    """The progress bar, a line per epoch, TensorBoard events and, every few minutes, curves.png."""

    def __init__(self, run: Path, start: int, epochs: int, crops: int, main: bool):
        """start: epochs done before; crops: of one epoch; main: of several ranks, the one that
        speaks."""
        self.run, self.start, self.epochs, self.main = run, start, epochs, main
        self.drawn = time.perf_counter()
        self.writer, self.events = None, run / "tensorboard"
        with writing(self.events):
            if EventsWriter and main and start < epochs:
                self.writer = tensorboard(self.events, start)
        shown = {"unit": "patch", "leave": False, "disable": None if main else True}
        self.bar = tqdm(total=(epochs - start) * crops, **shown)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        with suppress(OSError):  # of a full disk, which log_epoch has told
            if self.writer:
                self.writer.close()

    def tell(self, rows: list[dict]) -> None:
        """Tell the last of the rows of metrics.csv."""
        if not self.main:
            return
        row = rows[-1]
        with writing(self.events):
            if self.writer:
                log_epoch(self.writer, row)
        done = row["epoch"] - self.start
        left = seconds_of(rows[-done:]) / done * (self.epochs - row["epoch"])
        tqdm.write(epoch_line(row, left, heading=done == 1))
        if time.perf_counter() - self.drawn > 180:  # a figure takes a second or two
            curves(self.run)
            self.drawn = time.perf_counter()


def epoch_line(row: dict, left: float, heading: bool) -> str:
    """One aligned line per epoch, under a heading before the first; left: seconds to the end."""
    terms = terms_of(row)
    head = f"{'epoch':>5}{'loss':>9}" + "".join(f"{term:>11}" for term in terms)
    head += f"{'val Dice':>10}{'patches/s':>11}{'wait':>6}{'left':>9}"
    line = f"{row['epoch']:>5}{row['loss']:>9.4f}" + "".join(f"{row[t]:>11.4f}" for t in terms)
    dice = f"{row['val_dice']:.4f}" if "val_dice" in row else ""
    line += f"{dice:>10}{row['patches_per_s']:>11.1f}{row['data_wait']:>6.0%}"
    line += f"{timedelta(seconds=round(left))!s:>9}"
    return f"{head}\n{line}" if heading else line
