"""What `mlx_flashhead.benchmark` times, a file for each subject, and the choices of its flags.

The choices are here so that ``--help`` imports no library of models.
"""

# The vocab_size and hidden_size of known heads.
SHAPES = {
    "smollm2": (49152, 576),
    "gemma-3-270m": (262144, 640),
    "gemma-3-1b": (262144, 1152),
    "gemma-4-e2b": (262144, 1536),
    "qwen3-0.6b": (151936, 1024),
    "qwen3-4b": (151936, 2560),
    "qwen3.5-0.8b": (248320, 1024),
    "llama-3.2-1b": (128256, 2048),
    "llama-3.1-8b": (128256, 4096),
}
SAMPLERS = {"greedy": {"temp": 0.0}, "top-p": {"temp": 0.8, "top_p": 0.95}}
