"""The paper is compiled from results alone; what is missing or wrong is told in one paragraph."""

import re
import shutil

import pytest

from kdlib.__main__ import main
from kdlib.analysis import outputs, paper, report
from kdlib.errors import KdlibError
from kdlib.study import store


@pytest.fixture(scope="module")
def latex():
    """Skips where there is neither a pdflatex nor a network to fetch one."""
    try:
        return paper.engine()
    except KdlibError as error:
        pytest.skip(str(error))


@pytest.fixture
def copy(analysed, tmp_path, monkeypatch):
    """The analysed results, to change."""
    for name in ("results", "figures"):
        shutil.copytree(analysed / name, tmp_path / name)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return tmp_path


def test_the_numbers_that_a_text_shows_are_found():
    text = r"\newcommand{\setting}[1]{\result{setup/#1/value}} \setting{seeds} \amount{tokens} \result{a/b c/d}"
    text += r" \counted{layers}{layer} % \result{no}"
    assert paper.shown(text) == {"setup/seeds/value", "setup/tokens/si", "setup/layers/value", "a/b c/d"}


def test_a_count_agrees_with_its_noun(tmp_path, latex):
    main = (paper.SOURCE / "main.tex").read_text(encoding="utf-8")
    needed = ["defineresult", "result", "setting", "counted"]
    macros = [re.search(rf"\\newcommand{{\\{name}}}.*(\n  .*)*", main)[0] for name in needed]
    values = {"repeats": "1", "members": "2", "seeds": "12", "epochs": "0.5", "ten": "10"}
    defined = [f"\\defineresult{{setup/{name}/value}}{{{value}}}" for name, value in values.items()]
    told = "\\typeout{told: " + ", ".join(f"\\counted{{{name}}}{{one word}}" for name in values) + ".}"
    fonts = "\\usepackage[T1]{fontenc}\\IfFileExists{lmodern.sty}{\\usepackage{lmodern}}{}"
    document = ["\\documentclass{article}", fonts, *macros, *defined, "\\begin{document}x", told, "\\end{document}"]
    (tmp_path / "main.tex").write_text("\n".join(document))
    paper.compile_latex(tmp_path, 0)
    log = (tmp_path / "main.log").read_text(errors="replace")
    assert "told: 1 one word, 2 one words, 12 one words, 0.5 one words, 10 one words." in log.replace("\n", "")


def test_no_count_of_the_paper_stands_before_a_plural_of_its_own():
    text = " ".join(path.read_text(encoding="utf-8") for path in paper.SOURCE.glob("*.tex"))
    counts = ("seeds", "repeats", "members", "layers", "epochs", "near_duplicates")
    assert [one for one in counts if f"\\setting{{{one}}}" in text] == []
    assert all(f"\\counted{{{one}}}" in text for one in counts)


@pytest.mark.slow
def test_missing_analysis_outputs_are_named(copy):
    (copy / "results" / "smoke" / "cost.csv").unlink()
    (copy / "figures" / "smoke" / "methods.pdf").unlink()
    with pytest.raises(KdlibError, match=r"(?s)2 files.*methods\.pdf.*cost\.csv.*make paper PROFILE=smoke"):
        paper.generate("smoke")


@pytest.mark.slow
def test_a_number_the_profile_does_not_have_is_named(copy, monkeypatch):
    known = report.numbers("smoke")
    known.pop("methods_differences/KD ensemble (probability pool)/its best member/test/sentence")
    monkeypatch.setattr(report, "numbers", lambda profile: known)
    with pytest.raises(KdlibError, match=r"its best member/test/sentence"):
        paper.generate("smoke")


@pytest.mark.slow
def test_generated_tables_hold_a_line_for_every_row_of_their_csv(copy):
    folder = paper.generate("smoke")
    written = [stem for one in outputs.analyses(store.grids("smoke")).values() for stem in one.tables]
    shown = {name: table for name, table in report.TABLES.items() if table.csv in written}
    shown |= {name: report.tables("smoke")[name] for name in ("kd_weight", "chain", "chain_growth")}
    assert {path.stem for path in folder.glob("table-*")} == {f"table-{name}" for name in shown}
    for name, table in shown.items():
        text = (folder / f"table-{name}.tex").read_text(encoding="utf-8")
        assert text.count(r"\\") == 1 + len(report.rows("smoke", table.csv, table.where))
    assert (folder / "findings-methods_differences.tex").read_text(encoding="utf-8").count(r"\item") >= 3


@pytest.mark.slow
def test_the_paper_compiles_and_the_same_results_give_the_same_bytes(copy, latex):
    pdf = paper.build("smoke")
    first, log = pdf.read_bytes(), (copy / "paper" / "build" / "smoke" / "main.log").read_text(errors="replace")
    assert first.startswith(b"%PDF") and len(first) > 100_000
    assert "undefined" not in log and "Overfull" not in log
    assert paper.build("smoke").read_bytes() == first


@pytest.mark.slow
def test_the_first_latex_error_is_told_with_its_line(tmp_path, latex):
    document = "\\documentclass{article}\n\\begin{document}\nfine\n\\nonsense here\n\\worse\n\\end{document}\n"
    (tmp_path / "main.tex").write_text(document)
    with pytest.raises(KdlibError, match=r"Undefined control sequence.* at l\.4 \\nonsense") as caught:
        paper.compile_latex(tmp_path, 0)
    assert "worse" not in str(caught.value)


@pytest.mark.slow
def test_latex_cannot_run_commands(tmp_path, latex):
    fonts = r"\usepackage[T1]{fontenc}\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}"
    body = r"\begin{document}x\immediate\write18{touch escaped}\end{document}"
    (tmp_path / "main.tex").write_text(r"\documentclass{article}" + fonts + body)
    paper.compile_latex(tmp_path, 0)
    assert (tmp_path / "main.pdf").is_file() and not (tmp_path / "escaped").exists()


@pytest.mark.slow
def test_the_command_ends_with_two_and_a_paragraph(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    assert main(["paper", "--profile", "smoke"]) == 2
    told = capsys.readouterr().err.strip()
    assert "make paper PROFILE=smoke" in told and "\n" not in told


def test_a_log_without_an_error_line_is_still_told(tmp_path):
    assert "killed" in paper.first_error(tmp_path / "absent.log", b"This is pdfTeX\nkilled\n")
    log = tmp_path / "main.log"
    error = "! LaTeX Error: File `x.sty' not found.\n\nType X to quit\n\nl.3 \\usepackage\n"
    log.write_text(error + "               {x}\n! Emergency stop.\n")
    assert paper.first_error(log, b"").startswith("LaTeX Error: File `x.sty' not found. at l.3")
