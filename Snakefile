"""The whole study as a graph: the runs, the analyses that read them, the paper.

    snakemake --config profile=quick                   # on this machine; what `make paper` calls
    snakemake --config profile=laptop grids="losses data"
    snakemake --config profile=paper --dry-run         # the plan, without network or models
    snakemake --config profile=gpu --workflow-profile profiles/slurm

Every job is one command that a person could type. Which runs there are, and what each reads, is in kdlib/study/design.py.
"""

import os
import shlex
import sys
from pathlib import Path

from kdlib.analysis import outputs
from kdlib.errors import KdlibError
from kdlib.study import design, notebooks, store
from kdlib.study.closure import code_hash, room
from kdlib.study.profiles import load
from kdlib.study.runner import whole_profile

PROFILE = whole_profile(str(config.get("profile", "quick")))  # jobs run elsewhere
try:
    # Those that were asked for once, with `make paper GRIDS=…`, stay part of the study.
    GRIDS = design.begun(PROFILE, str(config.get("grids") or "").split())
    STUDY = {step.id: step for step in design.study(PROFILE, GRIDS)}
    WANTED = design.wanted(PROFILE, GRIDS)
except KdlibError as error:
    sys.exit(str(error))

# A finished run is never made again: its id carries all that shaped it. So only missing runs are outputs of a rule; finished
# ones are plain input files, which Snakemake neither deletes nor remakes, whatever their date. What a missing run reads of a
# finished one (data, targets, a model) may be missing too, as it is in a clone: then that is an output of its own.
MISSING, LACKING = design.missing(PROFILE, STUDY, WANTED)

RESULTS = store.results(PROFILE).relative_to(store.home())
METRICS = f"{RESULTS}/runs/{{run}}/metrics.json"
ARTEFACT = {run: f"{RESULTS}/runs/{run}/{store.Run(store.results(PROFILE) / 'runs' / run).artefact.name}" for run in LACKING}
PAPER = f"paper/kdlib-{RESULTS.name}.pdf"
TEX = [str(path) for path in (Path(workflow.basedir) / "paper").glob("*.tex")]
ANALYSES = outputs.analyses(GRIDS)
WRITTEN = {
    name: [
        f"{RESULTS}/numbers/{name}.json",
        *[f"{RESULTS}/{table}.csv" for table in analysis.tables],
        *[f"figures/{RESULTS.name}/{figure}.{kind}" for figure in analysis.figures for kind in ("pdf", "png")],
    ]
    for name, analysis in ANALYSES.items()
}

workdir: store.home()
# Jobs use the interpreter that reads this file, also where its environment is not activated.
shell.prefix(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; ".replace("{", "{{").replace("}", "}}"))


def read_by(run):
    """Files of the runs that ``run`` reads: results, and what is made again for it."""
    inputs = [step.id for step in STUDY[run].inputs.values()]
    return [METRICS.format(run=one) for one in inputs] + [ARTEFACT[one] for one in inputs if one in ARTEFACT]


onstart:
    design.write(PROFILE, GRIDS)


localrules: all

rule all:
    # Every file by name: Snakemake does not remake a missing one that only a finished file was made from.
    input: PAPER, WRITTEN.values(), expand(METRICS, run=WANTED)
    message: f"Done: {PAPER}"


if MISSING:
    rule run:
        input: lambda wildcards: read_by(wildcards.run)
        output: METRICS
        wildcard_constraints: run="|".join(MISSING)
        params:
            label=lambda wildcards: STUDY[wildcards.run].label,
            profile=PROFILE,
        threads: os.cpu_count()  # one at a time on one machine; a cluster profile sets its own
        message: "{params.label} ({wildcards.run})"
        shell: "python -m kdlib make {wildcards.run} --notebooks --profile {params.profile:q}"


for run, folder in ARTEFACT.items():
    rule:
        name: f"artefact_{run.replace('-', '_')}"
        input: lambda wildcards, run=run: read_by(run)
        output: directory(folder)
        params:
            run=run,
            profile=PROFILE,
        threads: os.cpu_count()
        message: "{params.run} again, of which only the results are here"
        shell: "python -m kdlib make {params.run} --with-artefact --profile {params.profile:q}"


# Analyses and the paper are made again when what they read, their code (not the bytes of a notebook) or what it calls changes.
for name, analysis in ANALYSES.items():
    rule:
        name: f"analysis_{name}"
        input: expand(METRICS, run=WANTED)
        output: WRITTEN[name]
        params:
            name=name,
            command=" ".join(analysis.arguments),
            profile=PROFILE,
            code=notebooks.code_hash(notebooks.find(f"notebooks/{analysis.notebook}.ipynb")),
            library=code_hash(["kdlib.study.store", *room("analysis")]),
            plan=store.digest([[step.id, step.label] for step in STUDY.values()]),
            settings=store.digest(load(PROFILE).model_dump(mode="json")),
        message: "analysis {params.name}"
        shell: "python -m kdlib run {params.command} --profile {params.profile:q}"


rule paper:
    input: WRITTEN.values(), TEX
    output: PAPER
    params:
        profile=PROFILE,
        library=code_hash(room("analysis")),
    message: "paper {output}"
    shell: "python -m kdlib paper --profile {params.profile:q}"
