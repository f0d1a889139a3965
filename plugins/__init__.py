"""What runs a plan: the PyTorch reference, its cache, and how it hooks into Transformers."""
