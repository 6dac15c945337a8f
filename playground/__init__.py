"""The playground: a tiny world of coloured shapes in which every reward is exact.

`playground.world` (numpy and PIL only) makes scenes, captions, pictures and verdicts.
`playground.train` (torch) makes the small base model and the differentiable scorer.
`playground/base` and `playground/scorer` are what those scripts wrote.
"""
