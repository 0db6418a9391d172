"""Writing so that a crash leaves nothing half-done, and copying without looking."""
