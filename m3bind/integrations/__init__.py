"""The losses inside other projects: one module a project."""
