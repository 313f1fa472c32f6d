"""What a path holds, told by its content and loaded without running it."""
