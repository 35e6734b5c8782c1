"""Named arrays in files, read one at a time: safetensors, PyTorch's state dicts; what is expected of their names."""
