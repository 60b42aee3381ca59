"""Reading prompts from caption files."""
