"""From score tables to advantages, numpy only: aggregation, the filter before the claim, advantages, preference pairs.

aggregation/ makes one reward a sample of many scores; rewards.py looks at one group before the claim; group.py and
gae.py yield advantages; pairs.py picks preferences; run_credit.py keeps the state of all of it. base.py is the contract
of an advantage entry.
"""
