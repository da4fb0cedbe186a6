"""What is looked at while others train: each said once, and nothing changed."""
