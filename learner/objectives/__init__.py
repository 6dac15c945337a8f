"""The losses: how each objective turns rows into a LossSum.

base.py is the contract; trajectory.py what the clipped policy gradients share; draws.py and matching.py what the
forward-process methods share. An objective never divides by a batch count: the rank does, by the global one.
"""
