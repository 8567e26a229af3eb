"""The whole study as a graph: the runs, the analyses that read them, the paper.

    snakemake --config profile=quick            # on this machine; what `make paper` calls
    snakemake --config profile=paper --dry-run  # the plan, without network or models
    snakemake --config profile=gpu --workflow-profile profiles/slurm

Every job is one command that a person could type. Which runs there are, and what each reads, is in kdlib/plan.py.
"""

import os
import sys
from pathlib import Path

from kdlib import notebooks, plan, runs
from kdlib.errors import KdlibError
from kdlib.profiles import load
from kdlib.revisions import code_hash

PROFILE = str(config.get("profile", "quick"))
try:
    STUDY = {step.id: step for step in plan.study(PROFILE)}
except KdlibError as error:
    sys.exit(str(error))

# A finished run is never made again: its id carries all that shaped it. So only missing runs are outputs of a rule; finished
# ones are plain input files, which Snakemake neither deletes nor remakes, whatever their date.
MISSING = [run for run in STUDY if not runs.find(PROFILE, run)]

RESULTS = runs.results(PROFILE).relative_to(runs.home())
METRICS = f"{RESULTS}/runs/{{run}}/metrics.json"
NUMBERS = f"{RESULTS}/numbers/{{notebook}}.json"
PAPER = f"paper/kdlib-{RESULTS.name}.pdf"
TEX = [str(path) for path in (Path(workflow.basedir) / "paper").glob("*.*") if path.suffix in (".tex", ".bib")]

workdir: runs.home()
# Jobs use the interpreter that reads this file, also where its environment is not activated.
shell.prefix(f"export PATH={str(Path(sys.executable).parent)!r}:$PATH; ")


onstart:
    plan.write(PROFILE)


localrules: all

rule all:
    # Every file by name: Snakemake does not remake a missing one that only a finished file was made from.
    input: PAPER, expand(NUMBERS, notebook=plan.ANALYSES), expand(METRICS, run=STUDY)
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


# Analyses and the paper are made again when the runs they read, their code (not the bytes of a notebook), or what the code
# calls has changed.
rule analysis:
    input: expand(METRICS, run=STUDY)
    output: NUMBERS
    wildcard_constraints: notebook="|".join(plan.ANALYSES)
    params:
        code=lambda wildcards: notebooks.code_hash(notebooks.find(f"notebooks/{wildcards.notebook}.ipynb")),
        library=[code_hash(module) for module in ("runs", "statistics", "comparison", "figures", "report")],
        plan=runs.digest([[step.id, step.label] for step in STUDY.values()]),
        settings=load(PROFILE).analysis.model_dump_json(exclude={"profile"}),
        profile=PROFILE,
    message: "analysis {wildcards.notebook}"
    shell: "python -m kdlib.run notebooks/{wildcards.notebook}.ipynb --profile {params.profile:q}"


rule paper:
    input: expand(NUMBERS, notebook=plan.ANALYSES), TEX
    output: PAPER
    params:
        library=[code_hash(module) for module in ("paper", "report")],
        profile=PROFILE,
    message: "paper {output}"
    shell: "python -m kdlib.paper --profile {params.profile:q}"
