"""The decoder, its loss and cache, how it lies on a mesh of devices, and its form on Hugging Face."""
