"""The playground's differentiable scorer: its network (network.py) and the weights that `playground.train` fitted.

What a reward server needs, and no more: torch, no training code.
"""
