"""Thin adapters from a server to the guard: TorchServe and ASGI."""
