"""Scorers as Ray Serve deployments: each in replicas of its own, scaled on its own queue, reached by its name.

`deployments` puts one up, lists and removes them; `names` finds the URLs behind a name, `seen` where each replica tells
its series; `scaling` says when a replica is added; `replica` is what runs in one. Ray and Serve are imported when they
are needed.
"""
