"""Automatic parallel training: ``compile(model, cluster_profile)`` plans, rewrites and runs."""
