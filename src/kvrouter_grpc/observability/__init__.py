"""What the process tells its operators."""
