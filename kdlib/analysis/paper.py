"""Builds the paper of a profile from its results: numbers, tables and findings as LaTeX, then the PDF. Trains nothing.

    kdlib paper --profile laptop

``paper/generated/<profile>/`` receives the LaTeX, ``paper/build/<profile>/`` everything one would submit, and
``paper/kdlib-<profile>.pdf`` the result. The system's pdflatex is used if there is one, else a TinyTeX that is
downloaded as data. The README is redrawn with the profile it shows.
"""

import calendar
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kdlib.analysis import outputs, report
from kdlib.data import archives, sources
from kdlib.errors import KdlibError
from kdlib.study import profiles, store

SOURCE = profiles.REPOSITORY / "paper"
TINYTEX = {"linux-x86_64": "x86_64-linux", "darwin-x86_64": "universal-darwin", "darwin-arm64": "universal-darwin"}


def missing(profile: str) -> list[Path]:
    """Analysis outputs that the paper needs and that are not there."""
    tables, drawn = store.results(profile), store.figures(profile)
    analyses = outputs.analyses(store.grids(profile))
    wanted = [tables / "numbers" / f"{name}.json" for name in analyses]
    for one in analyses.values():
        wanted += [tables / f"{stem}.csv" for stem in one.tables] + [drawn / f"{stem}.pdf" for stem in one.figures]
    return [path for path in wanted if not path.is_file()]


def shown(tex: str) -> set[str]:
    r"""Names of the numbers that a LaTeX text shows: ``\result{…}``, and its short forms ``\setting{…}``,
    ``\counted{…}{noun}`` and ``\amount{…}``."""
    text = re.sub(r"(?<!\\)%.*", "", tex)
    names = {f"setup/{name}/value" for name in re.findall(r"\\(?:setting|counted)\{([^}#]+)\}", text)}
    names |= {f"setup/{name}/si" for name in re.findall(r"\\amount\{([^}#]+)\}", text)}
    return names | set(re.findall(r"\\result\{([^}#]+)\}", text))


def generate(profile: str) -> Path:
    r"""Write ``numbers.tex`` and the tables and findings that ``main.tex`` reads; returns their folder.

    Raises:
        KdlibError: an analysis has not been run, or ``main.tex`` shows a number that this profile does not have.
    """
    if absent := missing(profile):
        first = ", ".join(str(path) for path in absent[:4]) + (" …" if len(absent) > 4 else "")
        name = Path(profile).stem
        raise KdlibError(
            f"The paper of profile {name!r} needs {len(absent)} files that its analyses have not written: {first}. "
            f"Write them with: make paper PROFILE={name}"
        )
    found = report.numbers(profile)
    if unknown := sorted(shown((SOURCE / "main.tex").read_text(encoding="utf-8")) - set(found)):
        raise KdlibError(
            f"paper/main.tex shows numbers that profile {profile!r} does not have: {', '.join(unknown)}. "
            "The study must hold both objectives, ce and kd, and the probability pool."
        )
    folder = store.home() / "paper" / "generated" / Path(profile).stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "numbers.tex").write_text(report.latex_macros(found), encoding="utf-8")
    for name, table in report.tables(profile).items():
        (folder / f"table-{name}.tex").write_text(report.latex_table(table, profile), encoding="utf-8")
    analyses = outputs.analyses(store.grids(profile)).values()
    for stem in [stem for analysis in analyses for stem in analysis.findings]:
        items = [f"\\item {report.latex(sentence)}\n" for sentence in report.findings(profile, stem)]
        (folder / f"findings-{stem}.tex").write_text("".join(items), encoding="utf-8")
    # A grid of the profile's own has no text in paper/ to bring it in.
    own = [(one.grid, one.tables[0]) for one in analyses if one.grid and one.findings and not (SOURCE / f"{one.tables[0]}.tex").is_file()]
    calls = [f"\\owngrid{{{report.latex(grid)}}}{{{stem}}}\n" for grid, stem in own]
    (folder / "own-grids.tex").write_text("".join(calls), encoding="utf-8")
    return folder


def build(profile: str) -> Path:
    """Generate the LaTeX, gather it with the text and the figures, and compile; returns the PDF's path.

    The same results give the same bytes: the PDF's date is that of the newest run.

    Raises:
        KdlibError: as :func:`generate`; or LaTeX failed, told by its first error.
    """
    generated, name = generate(profile), Path(profile).stem
    folder = store.home() / "paper" / "build" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(generated, folder)
    for path in [*SOURCE.glob("*.tex"), *store.figures(profile).glob("*.pdf")]:
        shutil.copy(path, folder)
    date = report.look_up(profile, {"csv": "setup", "where": {"name": "date"}, "format": "{value}"})
    compile_latex(folder, calendar.timegm(time.strptime(date, "%Y-%m-%d")))
    pdf = store.home() / "paper" / f"kdlib-{name}.pdf"
    os.replace(folder / "main.pdf", pdf)
    return pdf


def compile_latex(folder: Path, epoch: int) -> None:
    """Run pdflatex twice on ``main.tex`` in ``folder``, first for the references alone; shell escapes are off.

    Raises:
        KdlibError: LaTeX failed; the message holds its first error.
    """
    command = [engine(), "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error"]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "FORCE_SOURCE_DATE": "1"}
    for mode in (["-draftmode"], []):
        result = subprocess.run([*command, *mode, "main.tex"], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
        if result.returncode:
            raise KdlibError(
                f"LaTeX could not compile {folder / 'main.tex'}: {first_error(folder / 'main.log', result.stdout)}"
            )


def first_error(log: Path, output: bytes) -> str:
    """The first error of a LaTeX log, with the line it names, in one sentence that says where to read on."""
    text = log.read_text(errors="replace") if log.is_file() else output.decode(errors="replace")
    if found := re.search(r"^! (.*(?:\n(?!l\.\d).*){0,12}?)\n(l\.\d+ .*)$", text, flags=re.MULTILINE):
        return f"{found[1].splitlines()[0]} at {found[2].strip()} (the whole log: {log})"
    first = next(
        (line for line in text.splitlines() if line.startswith("!")), (text.strip().splitlines() or ["no output"])[-1]
    )
    return f"{first} (the whole log: {log})"


def engine() -> str:
    """Path of pdflatex: the system's, else TinyTeX's, fetched and extracted into the cache once.

    Raises:
        KdlibError: neither is to be had on this machine.
    """
    if found := shutil.which("pdflatex"):
        return found
    platform = f"{sys.platform}-{os.uname().machine}"
    if platform not in TINYTEX:
        raise KdlibError(
            f"There is no pdflatex here and no TinyTeX for {platform} (only for {', '.join(TINYTEX)}). "
            "Install TeX Live, then try again."
        )
    source = sources.catalogue()["tinytex"]
    folder = sources.cache_folder() / "extracted" / source.sha256[:12]
    root = source.members[0].rstrip("*")
    # Written last: a tree whose extraction was cut short has none, and is gone over again.
    if not (folder / "complete").is_file():
        archives.extract(
            sources.fetch(source),
            [f"{root}bin/{TINYTEX[platform]}/pdflatex", f"{root}texmf-*", f"{root}LICENSE*"],
            folder,
        )
        (folder / "complete").touch()
    return str(folder / root / "bin" / TINYTEX[platform] / "pdflatex")


def main(profile: str, analyses: bool = False) -> int:
    """Build the paper of a profile and redraw the README, or only tell how ``kdlib run`` is called for what it is drawn from."""
    if analyses:
        found = outputs.analyses(store.grids(profile)).values()
        print(*(" ".join(one.arguments) for one in found), sep="\n")
        return 0
    print(build(profile))
    # A results home apart from the repository has no README to redraw.
    if Path(profile).stem == report.README_PROFILE and (store.home() / "README.md").is_file():
        report.update_readme()
    return 0
