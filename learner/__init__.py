"""The learner: objectives, credit, engines and the rank that updates the policy. Plain torch and numpy, no Ray.

Start reading at types.py (what flows), plan.py (who trains on what), rank.py (one rank's step).
"""
