"""What src.benchmark times."""
