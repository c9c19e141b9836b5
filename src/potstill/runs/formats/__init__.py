"""Students as files for other programs: GGUF for llama.cpp, ONNX for onnxruntime, read back and measured there."""
