"""From score tables to advantages, numpy only: rewards, the filter before the claim, advantages, preference pairs.

rewards.py combines tables into one reward a sample and says which groups are never trained; group.py and gae.py yield
advantages; pairs.py picks preferences. base.py is the contract of an entry.
"""
