"""The commands that show why requests go where they go."""
