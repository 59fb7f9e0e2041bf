"""Who generates: the engine seam, our Hugging Face engine, and what turns prompts into scored rollouts."""
