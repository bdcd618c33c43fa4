"""GGUF files of llama.cpp: full models and LoRAs, under the names and in the layout of transformers."""

__all__: list[str] = []
