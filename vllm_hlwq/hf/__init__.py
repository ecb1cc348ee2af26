"""HLWQ checkpoints in Hugging Face transformers: its quantizer plug-in, and the modules that compute from codes."""
