"""Weights in and out: this project's own, OpenAI's, Hugging Face's and the book's."""
