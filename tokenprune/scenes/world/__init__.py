"""The generated scenes: what is drawn, what is asked about it, and how answers are judged."""
