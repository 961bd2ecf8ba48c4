"""The student on the Hugging Face Hub: its card and its push."""
