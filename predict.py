#!/usr/bin/env python3
"""Label texts with a finished run, or with any transformers folder that classifies texts.

usage: predict.py RUN TEXT ...              a line each: label, its probability, the text
       predict.py RUN --file F [--out F]    every row as it was, with predicted and probability_*
       ... | predict.py RUN                 a text a line
"""

import signals

if __name__ == "__main__":
    signals.hold()  # the imports take seconds, in which a signal would show a traceback

import argparse
import contextlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} lacks the packages of this program; use its .venv/bin/python")

import config
import hardware
import tables
import writers
from errors import (
    BAD_DATA,
    CANNOT_WRITE,
    CRASH,
    MISSING,
    NON_FINITE,
    OK,
    STOPPED,
    USAGE,
    Refusal,
    printable,
)
from files import replacing, writing
from history import named
from signals import Stopped, StopRequest
from tables import Chunk, Table

MAX_LINE = 2000  # characters of a text on a line of its own
NO_TEXT = "-"  # in place of a label


def predict(args: argparse.Namespace) -> None:
    """Do what the command line asks for; Refusal for what cannot be done."""
    run = find_run(args.run)
    table = open_table(args, run)
    kind = tables.kind_of(args.out) if args.out else table.kind
    kind = table.kind if table.kind.startswith(kind) else kind  # semicolons stay semicolons
    if kind == "parquet" and not args.out:
        raise Refusal(USAGE, "Parquet is not written to standard output; give --out")
    name = args.run if run is None else str(best_of(run))
    hardware.share_cores()
    with signals.held():  # a library may not take an interrupted import well
        import classifier
    with output(args.out) as file:
        trained = classifier.load(
            name,
            device=args.device,
            precision=args.precision,
            batch_tokens=args.batch_tokens,
            is_argmax=args.argmax,
        )
        # Where the lines themselves come by, a bar would stand between them.
        is_hidden = args.out is None and sys.stdout.isatty()
        with tqdm(unit=" texts", leave=False, disable=is_hidden or None) as bar:
            counts = annotate(trained, table, kind, file, bar.update)
    report(counts, trained.labels, args.out)


def annotate(
    trained, table: Table, kind: str, file: IO[str], progressed: Callable[[int], object]
) -> Counter:
    """Write the rows of `table`, classified by the Classifier `trained`, as a file of `kind`.

    A chunk of them is held at a time. Returns how many got each label; None: without text.
    """
    counts: Counter[str | None] = Counter()
    columns = {"predicted": str} | {f"probability_{label}": float for label in trained.labels}
    if kind == "text":
        writer = LineWriter(file, trained.labels)
    else:
        writer = writers.writer(kind, file, table, columns)
    with contextlib.closing(writer), trained.autocast():  # in which weights are cast once
        for chunk in table.chunks:
            cells = classify(trained, chunk.texts, (table.name, counts.total()), progressed)
            writer.write(chunk, cells)
            counts.update(label for label, *_ in cells)
    return counts


def classify(
    trained,
    texts: Sequence[str],
    after: tuple[str, int],
    progressed: Callable[[int], object],
) -> list[tuple[object, ...]]:
    """The cells to add to each row: predicted, then each label's probability; None without text.

    `trained`: a Classifier; `after`: the table and how many of its rows came before; `progressed`
    is told of rows as they are done. Raises Refusal 76 if what the model computes is not finite.
    """
    places = [i for i, text in enumerate(texts) if text]
    logits = trained.logits([texts[i] for i in places], progressed)
    progressed(len(texts) - len(places))
    odd = (~(abs(logits) < float("inf")).all(axis=1)).nonzero()[0]
    if len(odd):
        row = f"{after[0]}: row {after[1] + places[odd[0]] + 1:,}"
        raise Refusal(NON_FINITE, f"{row}: what the model computes is not finite")
    probabilities = trained.decision.probabilities(logits)
    predicted = trained.decision.predict(probabilities)
    cells: list[tuple[object, ...]] = [(None,) * (1 + len(trained.labels))] * len(texts)
    for i, label, row in zip(
        places, predicted.tolist(), probabilities.round(7).tolist(), strict=True
    ):
        cells[i] = (trained.labels[label], *row)
    return cells


class LineWriter:
    """For people: label, its probability, and the text, which cannot steer the terminal."""

    def __init__(self, file: IO[str], labels: Sequence[str]):
        self.file = file
        self.places = {label: i for i, label in enumerate(labels)}
        self.width = max(len(printable(label)) for label in labels)

    def write(self, chunk: Chunk, added: Sequence[Sequence[object]]) -> None:
        """As writers.Writer has it."""
        for text, (label, *probabilities) in zip(chunk.texts, added, strict=True):
            share = "" if label is None else f"{probabilities[self.places[label]]:.4f}"
            shown = printable(NO_TEXT if label is None else label)
            line = f"{shown:<{self.width}}  {share:6}  {printable(text, MAX_LINE)}"
            self.file.write(line.rstrip() + "\n")

    def close(self) -> None:
        """Nothing is left to be written."""


def report(counts: Counter, labels: Sequence[str], out: Path | None) -> None:
    """Say what a file has got, and how many rows had no text."""
    empty, told = counts[None], []
    if out is not None:
        listed = ", ".join(f"{printable(label)}: {counts[label]:,}" for label in labels[:20])
        told.append(f"{counts.total():,} rows in {printable(out, 300)}: {listed}")
    if empty:
        told.append(f"{empty:,} of {counts.total():,} rows have no text, so no prediction")
    for line in told:
        print(line, file=sys.stderr)


# --- what is read and written ---------------------------------------------------------------------


def find_run(name: str) -> Path | None:
    """The run that is meant, by its directory or its best/; None for another folder or a hub name.

    Raises Refusal 66 where the folder above is there, and this one is not.
    """
    folder = named(Path(os.path.expanduser(name)))
    run = folder.parent if folder.name == "best" else folder
    if not run.exists() and len(run.parts) > 1 and run.parent.is_dir():  # no hub name
        raise Refusal(MISSING, f"no run: there is no {printable(run, 300)}")
    return run if os.path.isfile(run / "run_state.json") or os.path.isdir(run / "best") else None


def best_of(run: Path) -> Path:
    """The model of a run; Refusal 66 while it has none."""
    if not os.path.isdir(run / "best"):
        told = "no best/ in it; the command that began it goes on with it"
        raise Refusal(MISSING, f"{printable(run, 300)}: the run is not finished: {told}")
    return run / "best"


def open_table(args: argparse.Namespace, run: Path | None) -> Table:
    """The texts to classify: those of the command line, of --file, or of standard input."""
    source = args.file or Path("-")
    if args.text_column and (args.texts or str(source) == "-" or source.suffix.lower() == ".txt"):
        raise Refusal(USAGE, "--text-column: a text a line has no columns")
    if args.texts:
        for number, text in enumerate(args.texts, 1):
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise Refusal(BAD_DATA, f"text {number} of the command line is not UTF-8")
        return tables.of_texts(args.texts)
    column = args.text_column
    if column is None and run is not None and os.path.isfile(run / "config.yaml"):
        with contextlib.suppress(Refusal):  # of another version of this program
            column = config.load(run / "config.yaml").data.text_column
    return tables.read(source, column or "text")


@contextlib.contextmanager
def output(path: Path | None) -> Iterator[IO[str]]:
    """Where to write: a file that is there once it is whole, or standard output; Refusal 73."""
    if path is not None:
        if os.path.exists(path) and not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "no regular file"
            raise Refusal(CANNOT_WRITE, f"{printable(path, 300)}: is {kind}")
        with writing(path), replacing(Path(os.path.realpath(path))) as file:
            yield file
        return
    if sys.stdout is None:
        raise Refusal(CANNOT_WRITE, "standard output is closed")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BaseException as error:
        try:
            sys.stdout.flush()
        except OSError:  # what is buffered would fail once more when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError) or not isinstance(error, OSError):
            raise
        reason = f"standard output: cannot be written: {error.strerror}"
        raise Refusal(CANNOT_WRITE, reason) from None


def identity(path: Path | None) -> tuple[int, int] | None:
    """What tells a file from another that took its place; None for none."""
    try:
        found = os.stat(path or "")
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


# --- from the command line ------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; SystemExit for one that cannot be meant."""
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description=__doc__,
        allow_abbrev=False,
        usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = "a run, its name below runs/, a model's folder, or a hub name"
    parser.add_argument("run", metavar="RUN", nargs="?", help=which)
    parser.add_argument("texts", metavar="TEXT", nargs="*")
    kinds = f"{', '.join(tables.KINDS)}; - is standard input, a text a line"
    parser.add_argument("--file", type=Path, metavar="F", help=kinds)
    parser.add_argument("--out", type=Path, metavar="F", help="default: standard output")
    parser.add_argument("--text-column", metavar="NAME", help="default: the run's, else text")
    parser.add_argument("--argmax", action="store_true", help="without the fitted threshold")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="of one pass at most")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    args = parser.parse_intermixed_args(argv)
    if args.run is None:
        parser.error("name a RUN, a model's folder, or a hub name")
    if args.texts and args.file:
        parser.error("give texts or --file, not both")
    if not args.texts and not args.file and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("give texts, --file, or a text a line on standard input")
    if args.batch_tokens is not None and args.batch_tokens < 1:
        parser.error(f"--batch-tokens: expected at least 1, found {args.batch_tokens}")
    return args


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Classify what the command line names; the exit code of errors.py."""
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as end:
        return USAGE if end.code else OK
    if stop is None:
        stop = StopRequest(at_second="ended at once")
        stop.listen()
    before = identity(args.out)
    try:
        with stop.at_once():
            predict(args)
    except Stopped:
        how = "as it was" if identity(args.out) == before else "written"
        kept = f"; {printable(args.out, 300)} is {how}" if args.out else ""
        print(f"stopped by {stop.name}{kept}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # the reader of standard output has seen enough
        return OK
    except Refusal as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if "out of memory" in str(error) or isinstance(error, MemoryError):
            print("out of memory; lower --batch-tokens", file=sys.stderr)
        else:
            traceback.print_exc()
        return CRASH
    return OK


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main())
