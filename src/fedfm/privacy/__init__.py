"""What is spent of clients' privacy."""
