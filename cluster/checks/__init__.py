"""The checks behind `validate`, by subject; each yields ConfigErrors and loads no model.

declared.py what the chosen plug-ins declare; method.py objective, sampler, batches; jury.py scorers, rewards, judging;
aggregation.py from scores to a signal;
inputs.py model folder, prompts, run folder; machines.py engine, devices, the cluster's resources.
"""
