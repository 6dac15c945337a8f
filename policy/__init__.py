"""What the policy is, shared by actors and learner: model families, transition kernels, rollout, replay, weights.

Plain torch, diffusers and peft: no Ray, no engine, no scorer. Start with policy.py (the model) and samplers/base.py
(the one transition kernel that sampling and replay share).
"""
