"""The exact search over pipelines: stage boundaries and a strategy for every layer.

Read in this order: ``problem`` (what is given), ``closed_form`` (what is minimised), ``searcher``
(best family first), ``family`` (bounds, then exact stages where they matter), ``stage`` (one
pipeline group), ``patterns`` and ``knapsack`` (switching, and alike layers under a capacity).
``tables``, ``ranges``, ``bounds``, ``cuts``, ``choices`` and ``menu`` are their parts; ``certify``
checks an answer by other means. Needs numpy alone (``certify`` SciPy, when called).
"""
