"""The whole study as a graph: runs, the analyses that read them, the paper.

    snakemake --config profile=quick            # on this machine; what `make paper` calls
    snakemake --config profile=paper --dry-run  # the plan, without network or models
    snakemake --config profile=gpu --workflow-profile profiles/slurm

Every job is one command that a person could type; plan.py says which, and how they depend on each other.
"""

import sys
from pathlib import Path

from kdlib import notebooks, plan, runs
from kdlib.errors import KdlibError
from kdlib.revisions import code_hash

PROFILE = str(config.get("profile", "quick"))
try:
    STUDY = {step.id: step for step in plan.study(PROFILE)}
except KdlibError as error:
    sys.exit(str(error))

workdir: runs.home()
RESULTS = runs.results(PROFILE).relative_to(runs.home())
NAME = RESULTS.name

# A finished run is never made again: its id carries everything that shaped it. So only missing runs are outputs here, and
# finished ones are plain input files, which Snakemake neither deletes nor remakes, whatever their date.
MISSING = [run for run in STUDY if not runs.find(PROFILE, run)]
METRICS = f"{RESULTS}/runs/{{run}}/metrics.json"
NUMBERS = f"{RESULTS}/numbers/{{notebook}}.json"
PAPER = f"paper/kdlib-{NAME}.pdf"

onstart:
    plan.write(PROFILE)

# Jobs use this interpreter, also where its environment is not activated.
shell.prefix(f"export PATH={Path(sys.executable).parent}:$PATH; ")


localrules: all

rule all:
    input: PAPER


if MISSING:
    rule run:
        input: lambda wildcards: [METRICS.format(run=step.id) for step in STUDY[wildcards.run].inputs.values()]
        output: METRICS
        wildcard_constraints: run="|".join(MISSING)
        params: command=lambda wildcards: plan.command(STUDY[wildcards.run])
        threads: workflow.cores
        message: "{wildcards.run}"
        shell: "{params.command}"


rule analysis:
    input: expand(METRICS, run=STUDY)
    output: NUMBERS
    wildcard_constraints: notebook="|".join(plan.ANALYSES)
    params:
        code=lambda wildcards: notebooks.code_hash(notebooks.find(wildcards.notebook)),
        library=[code_hash(module) for module in ("runs", "statistics", "comparison", "figures", "report")],
        plan=runs.digest([[step.id, step.label] for step in STUDY.values()]),
        settings=plan.load(PROFILE).analysis.model_dump_json(exclude={"profile"}),
    message: "{wildcards.notebook}"
    shell: f"python -m kdlib.run notebooks/{{wildcards.notebook}}.ipynb --profile {PROFILE}"


rule paper:
    input: expand(NUMBERS, notebook=plan.ANALYSES)
    output: PAPER
    params: code=[code_hash(module) for module in ("report", )]
    message: "{output}"
    shell: f"python -m kdlib.paper --profile {PROFILE}"
