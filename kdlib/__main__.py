"""The one command: ``kdlib``, or ``python -m kdlib``.

::

    kdlib run notebooks/04_student.ipynb --profile quick --set objective=kd --set seed=1
    kdlib make "student kd seed 1" --profile quick    # a run by label or id, with whatever it reads
    kdlib list 04_student                             # its parameters, with allowed values and meaning
    kdlib list --runs --profile quick                 # the runs that a profile plans
    kdlib paper --profile laptop                      # the PDF from results as they are
    kdlib revisions keep                              # declare what an edit of the code did

Exit status: 0 done; 1 a notebook failed; 2 the input was wrong; 130, 143 stopped by Ctrl-C or SIGTERM.
"""

import argparse
import io
import signal
import sys
from pathlib import Path

from kdlib.errors import KdlibError


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no β is told of its code
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except KdlibError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdlib", description="Distil a language model into an ensemble of small students.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run one notebook with checked parameters", allow_abbrev=False)
    run.add_argument("notebook", help="path or name, as in notebooks/04_student.ipynb")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="one parameter; the value is YAML; repeatable"
    )
    run.add_argument("--output", type=Path, help="the executed notebook (default: results/<profile>/executed)")

    make = commands.add_parser("make", help="make runs, with whatever they read; what exists is kept", allow_abbrev=False)
    make.add_argument("names", nargs="*", metavar="RUN", help="ids or labels of planned runs")
    make.add_argument("--all", action="store_true", help="every run of the profile's comparison, or of --grids")
    make.add_argument("--grids", nargs="+", default=[], help="with --all: those of these grids too, or of all")
    make.add_argument("--kinds", nargs="+", help="with --all: only runs of these kinds")
    make.add_argument(
        "--share", default="0/1", metavar="I/N", help="with --all: every N-th, from the I-th (0 is the first)"
    )
    make.add_argument(
        "--pack", type=int, metavar="K", help="students trained at once, at most; 1: one by one (default: several on a GPU)"
    )
    make.add_argument("--notebooks", action="store_true", help="each in its notebook, which is kept executed")
    make.add_argument("--with-artefact", action="store_true", help="also what later runs read of one whose results exist")

    listing = commands.add_parser("list", help="parameters of a notebook, or runs of a profile")
    listing.add_argument("notebook", nargs="?", help="as in 04_student; default: all")
    listing.add_argument("--runs", action="store_true", help="instead: the runs that the profile plans")

    paper = commands.add_parser("paper", help="tables, numbers and PDF from results as they are")
    paper.add_argument("--analyses", action="store_true", help="only name the notebooks it is drawn from")

    for command, function in ((run, _run), (make, _make), (listing, _list), (paper, _paper)):
        command.add_argument("--profile", default="smoke", help="name, or path of a .yaml file (default: smoke)")
        command.set_defaults(command=function)

    revisions = commands.add_parser("revisions", help="declare what edits of the code did to results")
    revisions.add_argument("action", nargs="?", choices=("status", "keep", "bump"), default="status")
    revisions.add_argument("kinds", nargs="*", metavar="KIND", help="kinds of run (keep: default all that were edited)")
    revisions.set_defaults(command=_revisions)
    return parser


def _run(options: argparse.Namespace) -> int:
    from kdlib.study import runner

    return runner.run(options.notebook, options.profile, runner.assignments(options.set), options.output)


def _make(options: argparse.Namespace) -> int:
    from kdlib.study import design, runner

    if bool(options.names) == options.all:
        raise KdlibError("make must be given ids or labels of runs, or --all. See them with: kdlib list --runs")
    if options.pack is not None and (options.pack < 1 or options.notebooks):
        raise KdlibError(f"--pack must be 1 or more, and stand without --notebooks, got {options.pack}.")
    profile = runner.whole_profile(options.profile)
    if options.all:
        steps = design.share(profile, options.grids, options.kinds, options.share)
    else:
        steps = [design.find(profile, name) for name in options.names]
    if options.notebooks:
        return max((runner.run_step(step, options.with_artefact) for step in steps), default=0)
    from kdlib.runs.make import make_all

    make_all(steps, options.with_artefact, options.pack)
    return 0


def _list(options: argparse.Namespace) -> int:
    from kdlib.study import listing

    text = listing.runs(options.profile) if options.runs else listing.parameters(options.notebook, options.profile)
    print(text)
    return 0


def _paper(options: argparse.Namespace) -> int:
    from kdlib.analysis import paper

    return paper.main(options.profile, options.analyses)


def _revisions(options: argparse.Namespace) -> int:
    from kdlib.study import revisions

    if options.action == "status":
        print("\n".join(revisions.undeclared()) or "all code is as declared")
    elif options.action == "keep":
        print("kept:", ", ".join(revisions.keep(options.kinds)) or "nothing was edited")
    elif not options.kinds:
        raise KdlibError("bump must be given kinds of run, got none. See which were edited with: kdlib revisions")
    else:
        print("bumped:", ", ".join(revisions.bump(options.kinds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
