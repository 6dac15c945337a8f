"""Trains reward models on preferences: `python -m reward_servers train CONFIG`.

config.py the settings; data.py preferences, strengths and splits; losses.py the pair loss; model.py the network;
state.py checkpoints; trainer.py the loop; evaluation.py accuracy and calibration; card.py the evaluation card.
Does not own: serving what was trained (scorers/).
"""
