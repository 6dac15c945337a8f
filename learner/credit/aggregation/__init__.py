"""From many rewards to one signal: one rule a file, chosen by credit.aggregation.name. Numpy, float64.

base.py is the contract of a rule; columns.py reads tables and sums terms with their validity; statistics.py holds what
several rules share. Does not own: advantages (group.py, gae.py), the filter before the claim (rewards.py).
"""
