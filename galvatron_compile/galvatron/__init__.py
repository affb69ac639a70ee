"""Galvatron's profiles, plans and published cost formulas, so that searchers can be compared.

Galvatron (PKU-DAIR Hetu-Galvatron, Apache-2.0; Miao et al., PVLDB 16(3), 2022) measures a model and
a machine, prices plans by closed formulas and searches them by dynamic programming. Here are

- :mod:`.profile`: its folders of measurements, read and checked;
- :mod:`.formulas` and :mod:`.pricing`: what a plan costs by its formulas;
- :mod:`.plans`: its plan files, to and from :class:`galvatron_compile.plans.Plan`;
- :mod:`.cells` and :mod:`.search`: the exact optimum of its space under these very formulas;
- :mod:`.report`: what ``galvatron-compile plan --from-galvatron`` and ``price`` say;
- :mod:`.cluster`: its measurements of the machine as a ClusterProfile.

Nothing here imports torch, scipy or numpy. In these formulas a MB is 2**20 bytes.
"""
