"""The losses inside other projects: one module a project, and nothing of it is imported before use."""
