"""What an answer is: exact, a refusal, or one of four other outcomes."""
