"""Engines behind one interface (base.py): plain torch and DeepSpeed."""
