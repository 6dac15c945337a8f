"""What is watched between two learner steps: guards warn, or stop the run. Numbers of the step alone, so no torch.

base.py is the contract of a guard; limit.py and held_out_divergence.py are guards; run_guards.py keeps a run's guards
and their state.
"""
