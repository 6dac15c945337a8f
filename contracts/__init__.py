"""What crosses a process boundary in Salon: config, wire types, codec, registry, metrics catalogue, errors.

The floor of the house. Imports pydantic, numpy, safetensors and the standard library only: no torch, ray,
deepspeed or vllm, so that listing and validating answer within a second.
"""
