"""vllm-hlwq: an expert cache for stock vLLM, and the HLWQ weight codec around it."""
