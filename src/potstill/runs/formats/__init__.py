"""Students as files for other programs: GGUF for llama.cpp, read back and measured there."""
