"""Artifacts out: safetensors, report, model card."""
