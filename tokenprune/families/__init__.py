"""What is known of each model family, and what loads, builds or describes its models."""
