"""The kinds of run, one module each, and what they share: making runs and reading what earlier ones left.

A module of a kind (:data:`kdlib.study.kinds.KINDS`) holds, without importing torch at its top:

- ``NOTEBOOK``: the notebook that makes such a run,
- ``LEAVES``: the folder that later runs read of it (large, not committed), or None,
- ``Parameters``: what the notebook takes, also the profile's section of the kind's name,
- ``inputs(values, plan)``: the runs that it reads, by name, asked for with :class:`kdlib.study.plan.Planner`,
- ``downloads(values)``: what it reads from outside, by name, told apart by content or pin,
- ``label(values)``: what to call it,
- ``produce(step, inputs, folder)``: make it in ``folder`` and return its metrics.
"""
