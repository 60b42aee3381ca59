"""What training reads from outside: prompts."""
