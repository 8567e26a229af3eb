"""The kinds of run, one module each; nothing else needs to be told about a kind.

A module holds, without importing torch at its top:

- ``NOTEBOOK``: the notebook that makes such a run,
- ``LEAVES``: the folder that later runs read of it (large, not committed), or None,
- ``Parameters``: what the notebook takes, also the profile's section of the kind's name,
- ``inputs(values, plan)``: the runs that it reads, by name, asked for with :class:`kdlib.study.plan.Planner`,
- ``downloads(values)``: what it reads from outside, by name, told apart by content or pin,
- ``label(values)``: what to call it,
- ``produce(step, inputs, folder)``: make it in ``folder`` and return its metrics.
"""

KINDS = ("corpus", "teacher", "targets", "scores", "student", "ensemble", "fidelity")
