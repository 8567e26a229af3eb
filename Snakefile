"""The whole study as a graph: the runs, the analyses that read them, the paper.

    snakemake --config profile=quick            # on this machine; what `make paper` calls
    snakemake --config profile=paper --dry-run  # the plan, without network or models
    snakemake --config profile=gpu --workflow-profile profiles/slurm

Every job is one command that a person could type. Which runs there are, and what each reads, is in kdlib/study/plan.py.
"""

import os
import sys
from pathlib import Path

from kdlib.analysis import outputs
from kdlib.study import notebooks, plan, store
from kdlib.errors import KdlibError
from kdlib.study.profiles import load
from kdlib.study.revisions import code_hash

PROFILE = str(config.get("profile", "quick"))
if PROFILE.endswith((".yaml", ".yml")):
    PROFILE = str(Path(PROFILE).resolve())  # jobs run elsewhere
try:
    # Those that were asked for with `make paper GRIDS=…`, or `python -m kdlib.study.plan PROFILE GRID …`.
    GRIDS = plan.begun(PROFILE)
    STUDY = {step.id: step for step in plan.study(PROFILE, GRIDS)}
except KdlibError as error:
    sys.exit(str(error))

# A finished run is never made again: its id carries all that shaped it. So only missing runs are outputs of a rule; finished
# ones are plain input files, which Snakemake neither deletes nor remakes, whatever their date.
MISSING = [run for run in STUDY if not store.find(PROFILE, run)]

RESULTS = store.results(PROFILE).relative_to(store.home())
METRICS = f"{RESULTS}/runs/{{run}}/metrics.json"
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
shell.prefix(f"export PATH={str(Path(sys.executable).parent)!r}:$PATH; ")


onstart:
    plan.write(PROFILE, GRIDS)


localrules: all

rule all:
    # Every file by name: Snakemake does not remake a missing one that only a finished file was made from.
    input: PAPER, WRITTEN.values(), expand(METRICS, run=STUDY)
    message: f"Done: {PAPER}"


if MISSING:
    rule run:
        input: lambda wildcards: [METRICS.format(run=step.id) for step in STUDY[wildcards.run].inputs.values()]
        output: METRICS
        wildcard_constraints: run="|".join(MISSING)
        params:
            label=lambda wildcards: STUDY[wildcards.run].label,
            command=lambda wildcards: plan.command(STUDY[wildcards.run]),
        threads: os.cpu_count()  # one at a time on one machine; a cluster profile sets its own
        message: "{params.label} ({wildcards.run})"
        shell: "{params.command}"


# Analyses and the paper are made again when what they read, their code (not the bytes of a notebook) or what it calls changes.
for name, analysis in ANALYSES.items():
    rule:
        name: f"analysis_{name}"
        input: expand(METRICS, run=STUDY)
        output: WRITTEN[name]
        params:
            name=name,
            command=" ".join(analysis.arguments),
            profile=PROFILE,
            code=notebooks.code_hash(notebooks.find(f"notebooks/{analysis.notebook}.ipynb")),
            library=[code_hash(module) for module in ("study/store", "analysis")],
            plan=store.digest([[step.id, step.label] for step in STUDY.values()]),
            settings=store.digest(load(PROFILE).model_dump(mode="json")),
        message: "analysis {params.name}"
        shell: "python -m kdlib.study.runner {params.command} --profile {params.profile:q}"


rule paper:
    input: WRITTEN.values(), TEX
    output: PAPER
    params:
        profile=PROFILE,
        library=[code_hash("analysis")],
    message: "paper {output}"
    shell: "python -m kdlib.analysis.paper --profile {params.profile:q}"
