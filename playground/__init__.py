"""The playground: a tiny world of coloured shapes in which every reward is exact.

`playground.world` (numpy and PIL only) makes scenes, captions, pictures and verdicts.
`playground.scorer` (torch) is a differentiable stand-in for the verdicts.
`playground.train` (torch) makes the small base model, the scorer's weights and a small judge; `playground/base`,
`playground/scorer/scorer.safetensors` and `playground/judge` are what it wrote.
"""
