#!/usr/bin/env python3
"""Show a run from its directory, while it trains or afterwards; compare runs, report on one.

usage: monitor.py [RUN] [--once]      a picture that is redrawn; lines where there is no terminal
       monitor.py [RUN] --report      write RUN/report.html, a page that stands alone
       monitor.py [FOLDER] --list     all runs below a folder (runs/), the best first
       monitor.py --compare RUN RUN ...
       monitor.py [RUN] --export csv|tensorboard [--out PATH]

RUN is a folder or its name below runs/, by default the newest. Reads only, but for the report, and
needs neither torch nor a service. Exit codes of --once: 0, 1 where there are alarms, 66 without a
run.
"""

import argparse
import contextlib
import errno
import os
import signal
import socket
import stat
import sys
import time
from collections import deque
from pathlib import Path

import screen
import words
from columns import fitting
from errors import MISSING, OK, UNAVAILABLE, USAGE, Refusal, printable
from files import open_regular
from hardware import Machine, Recorder
from history import LOG, RUNS, Follower, gpus_of, named
from view import View

ALARMED = 1
EVERY_S = 1.0
FINAL = ("completed", "failed")  # lines end here; what was preempted or killed may go on


class Watcher:
    """A run that is followed, beside what this machine does."""

    def __init__(self, run: Path):
        self.run, self.log = run, Follower(run)
        self._looks: deque[dict] = deque(maxlen=1)
        self._recorder: Recorder | None = None
        self._visible: str | None = None

    def look(self) -> View:
        """The run as it is now; the first look is at the log alone, as NVML may take seconds."""
        self.log.poll()
        return self.view()

    def view(self) -> View:
        """The run as of the last `look`."""
        live = self._looks[0] if self._looks else None
        return View(self.run, self.log.history, time.time(), live)

    def watch_machine(self) -> None:
        """Look at this machine every second, beside; at other GPUs once the log has named them."""
        visible = self._gpus()
        if self._recorder is None or visible != self._visible:
            self.close()
            self._visible = visible
            self._recorder = Recorder(Machine(self.run, visible), EVERY_S, self._note)
            self._recorder.start()

    def look_once(self) -> None:
        """Look at this machine now."""
        machine = Machine(self.run, self._gpus())
        time.sleep(0.1)  # what the CPU does is told of a span
        self._note(machine.look())

    def _note(self, record: dict) -> None:
        self._looks.append(record | {"time": time.time()})

    def close(self) -> None:
        """Stop looking."""
        if self._recorder:
            self._recorder.stop()
        self._recorder = None

    def _gpus(self) -> str | None:
        """The run's GPUs on this machine by UUID, as its log has them; else our environment's."""
        record = self.log.history.hardware.get(socket.gethostname(), {})
        uuids = [str(gpu.get("uuid")) for gpu in gpus_of(record)]
        return ",".join(uuids) if uuids else os.environ.get("CUDA_VISIBLE_DEVICES")


# --- following ------------------------------------------------------------------------------------


def find(asked: Path | None) -> Path | None:
    """The run asked for, else the newest below runs/ by its log; None while there is no log."""
    logs = RUNS.glob(f"*/{LOG}") if asked is None else [named(asked) / LOG]
    times = {}
    for log in logs:
        with contextlib.suppress(OSError):  # there is none, or it has just gone
            if stat.S_ISREG((found := os.stat(log)).st_mode):
                times[log.parent] = found.st_mtime
    return max(times, key=times.get, default=None)


def wait_for(asked: Path | None) -> Path:
    """The run, once there is one; says what it waits for."""
    is_told = False
    while (run := find(asked)) is None:
        if not is_told:
            print(_waiting(asked), flush=True)
        is_told = True
        time.sleep(EVERY_S)
    return run


def follow_on_screen(asked: Path | None) -> None:
    """Draw a run every second until the user leaves; of no run in particular, the newest."""
    from terminal import Terminal

    style = {"colour": screen.has_colour(os.environ)}
    style |= {"unicode": screen.is_unicode(sys.stdout.encoding)}
    watcher, view, keys, lines = None, None, "", []
    try:
        with Terminal() as terminal:
            while not {"q", "Q", "\x04"} & set(keys):
                newest, pause_s = find(asked), EVERY_S
                if view and newest not in (None, watcher.run) and not view.is_running:
                    watcher.close()
                    watcher = view = None
                if newest and not watcher:
                    watcher, pause_s = Watcher(newest), 0.2  # in which this machine is looked at
                if watcher:
                    view = watcher.look()
                    lines = screen.draw(view, *terminal.size, **style)
                    (watcher.watch_machine if view.is_live else watcher.close)()
                else:
                    lines = fitting([_waiting(asked)], terminal.size[0])
                terminal.draw(lines)
                keys = terminal.wait(pause_s)
    except KeyboardInterrupt:
        pass
    print(*lines, sep="\n")  # the last picture stays to be read


def follow_in_lines(asked: Path | None) -> None:
    """Tell what is known of a run, then a line for each event and alarm until it has ended."""
    watcher = Watcher(wait_for(asked))
    view = watcher.look()
    print(*words.tell(view), sep="\n", flush=True)
    has_ended = view.state.get("status") in FINAL
    while not has_ended:
        time.sleep(EVERY_S)
        has_ended = watcher.view().state.get("status") in FINAL
        for event in watcher.log.new():  # after that look, so that nothing is missed
            print(words.event_line(event), flush=True)
        known, view = {alarm.code for alarm in view.alarms}, watcher.view()
        if {alarm.code for alarm in view.alarms} - known:
            print(*words.alarms(view), sep="\n", flush=True)


def show_once(asked: Path | None) -> int:
    """Tell what is known of a run now."""
    run = find(asked)
    if run is None:
        raise Refusal(MISSING, f"no run: there is no {_place(asked)}")
    try:
        open_regular(run / LOG).close()
    except OSError as error:
        raise Refusal(MISSING, f"{printable(run / LOG, 300)}: {error.strerror}") from None
    watcher = Watcher(run)
    view = watcher.look()
    if view.is_live:
        watcher.look_once()
        view = watcher.view()
    print(*words.tell(view), sep="\n", flush=True)
    return ALARMED if view.alarms else OK


def _waiting(asked: Path | None) -> str:
    return f"no run yet: waiting for {_place(asked)}"


def _place(asked: Path | None) -> str:
    if asked is None:
        return printable(RUNS / "*" / LOG)
    places = [named(asked), *[RUNS / asked] * (len(asked.parts) == 1 and not os.path.exists(asked))]
    return " or ".join(printable(p / LOG, 200) for p in dict.fromkeys(places))


# --- from the command line ------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; SystemExit for one that cannot be meant."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "a folder, its name below runs/, or runs/ itself"
    parser.add_argument("run", nargs="?", type=Path, help=where)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--once", action="store_true", help="tell what is known and leave")
    chosen.add_argument("--list", action="store_true", help="all runs, the best first")
    chosen.add_argument("--compare", nargs="+", type=Path, metavar="RUN")
    chosen.add_argument("--report", action="store_true", help="write report.html into the run")
    chosen.add_argument("--export", choices=("csv", "tensorboard"))
    parser.add_argument("--out", type=Path, help="of --export: a file for csv, else a folder")
    args = parser.parse_args(argv)
    if args.compare and args.run:
        parser.error("name all runs after --compare")
    if args.out and not args.export:
        parser.error("--out goes with --export")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the monitor; the exit code of errors.py, or 1 where --once has alarms."""
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as end:
        return USAGE if end.code else OK
    try:
        return act(args)
    except Refusal as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:  # of what only the report or a table needs
        print(f"{error}; pip install -r requirements.txt", file=sys.stderr)
        return UNAVAILABLE
    except KeyboardInterrupt:
        return OK
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # Its reader has seen enough, or its terminal was closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def act(args: argparse.Namespace) -> int:
    """Do what the command line asks for; Refusal for what cannot be done."""
    width = (os.get_terminal_size().columns or None) if sys.stdout.isatty() else None
    if args.list:
        import compare

        print(*compare.list_runs(named(args.run or RUNS), width), sep="\n")
    elif args.compare:
        import compare

        print(*compare.compare_runs([named(run) for run in args.compare], width), sep="\n")
    elif args.report or args.export:
        run = find(args.run)
        if run is None:
            raise Refusal(MISSING, f"no run: there is no {_place(args.run)}")
        return _write_report(run) if args.report else _export(run, args.export, args.out)
    elif args.once:
        return show_once(args.run)
    elif sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        follow_on_screen(args.run)
    else:
        follow_in_lines(args.run)
    return OK


def _write_report(run: Path) -> int:
    import report

    print(printable(report.write_report(run), 300))
    return OK


def _export(run: Path, form: str, out: Path | None) -> int:
    import export

    if form == "tensorboard":
        folder = out or Path("tensorboard", run.resolve().name)
        count = export.export_tensorboard(run, folder)
        print(f"{count:,} numbers in {printable(folder, 300)}; tensorboard --logdir shows them")
    elif out is None:
        export.export_csv(run, sys.stdout)
    else:
        export.write_csv(run, out)
    return OK


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.stdout.reconfigure(errors="backslashreplace")  # names may not fit the terminal's encoding
    sys.exit(main())
