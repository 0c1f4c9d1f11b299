"""CoRL for unified multimodal models: GRPO that improves understanding and drawing together."""

__version__ = "0.1.0"
